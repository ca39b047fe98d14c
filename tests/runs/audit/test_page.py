"""The page of an audit as text: its verdict, what is listed, the reasons, and that text of users stays text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from audits import DIGEST, audited
from quick_runs import Page

from gapo.runs.audit.page import first_line, render, write_page


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and only some tests look at them."""
    if "pictures" not in request.node.name:
        monkeypatch.setattr("gapo.runs.audit.page.pictures", lambda *_: [])


CARD = re.compile(r'<li class="pair".*?</li>', re.DOTALL)


def summary(**more: Any) -> dict[str, Any]:
    return audited(60).summary | more


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({}, "About 18 % of your labels look wrong (15 to 22 %). Here are the 50 most suspicious."),
        ({"pairs": 50}, "About 18 % of your labels look wrong (15 to 22 %). Here they are, by suspicion."),
        ({"share": {"mean": 0.052, "low": 0.043, "high": 0.061}},
         "About 5.2 % of your labels look wrong (4.3 to 6.1 %). Here are the 50 most suspicious."),
        ({"share": {"mean": 0.001, "low": 0.0, "high": 0.03}},
         "Hardly any of your labels looks wrong (0 to 3 %). Here are the 50 most suspicious."),
        ({"share": None}, "The share of wrong labels cannot be estimated. Here are the 50 most suspicious."),
        ({"learned": False, "held_out_accuracy": 0.51, "advice": "try a larger model."},
         "Nothing can be told: the policies did not learn these pairs (held-out accuracy 51 %); try a larger model."),
    ],
)  # fmt: skip
def test_the_verdict(about: dict[str, Any], said: str) -> None:
    assert first_line(summary(**about), 50) == said


@pytest.mark.parametrize(
    ("share", "pairs", "side"),
    [(0.66, 1771, "longer"), (0.34, 1771, "shorter"), (0.54, 10_000, None), (0.66, 60, None), (None, 0, None)],
)
def test_a_rule_of_length_is_told_beyond_chance(share: float | None, pairs: int, side: str | None) -> None:
    result = audited(60, chosen_longer={"share": share, "pairs": pairs})
    page = " ".join(render(result).split())
    for text in (str(result), page):
        assert (f"The {side} answer is the chosen one in 66 % of the pairs whose answers differ" in text) is bool(side)
        assert ("if length alone decided any label" in text) is bool(side)
    assert "length alone" not in str(audited(60, learned=False, chosen_longer={"share": share, "pairs": pairs}))


def test_terminal_and_page_say_the_same_and_the_terminal_names_the_accuracy() -> None:
    said = "About 18 % of your labels look wrong (15 to 22 %)."
    assert str(audited(60)) == f"{said} Held-out accuracy: 71 %."
    assert first_line(audited(60).summary, 60).startswith(said)
    nothing = audited(60, learned=False)
    assert str(nothing) == first_line(nothing.summary, 0)


def test_the_first_line_is_the_verdict_and_the_rest_is_counted() -> None:
    text = render(audited(60), most=50)
    assert re.search(r"<body>\s*<h1>About 18\xa0% of your labels", text)
    words = " ".join(text.split())
    assert "The first 50 of 60 pairs; the other 10 are in pairs.audit.parquet." in words
    assert "They agree with 71.0 % of the labels as they are (69.0 to 73.0 %; 50 % is a coin toss)" in words
    assert len(CARD.findall(text)) == 50
    assert "All 60 pairs." in " ".join(render(audited(60)).split())
    assert len(CARD.findall(render(audited(700)))) == 500
    assert f'data-digest="{DIGEST}" data-pairs="60"' in text


def test_nothing_is_listed_where_nothing_can_be_told() -> None:
    text = render(audited(60, learned=False))
    assert re.search(r"<body>\s*<h1>Nothing can be told", text)
    assert CARD.findall(text) == []
    assert "No pairs are listed: their order would mean nothing." in text
    assert "<script" not in text


def test_a_pair_s_card() -> None:
    result = audited(60, flips=True)
    result.rows[0] |= {"line": None, "id": None, "mark": "right"}
    result.rows[1] |= {
        "gap": None,
        "weight": float("nan"),
        "against": 2,
        "policies": 3,
        "margin": -0.125,
        "is_flipped": None,
    }
    cards = CARD.findall(render(result))
    row = result.rows[0]["row"]
    for part in (f'data-row="{row}" data-line="null" data-id=\'null\'', 'data-mark="right"', 'data-flipped="yes"',
                 f"pair {row + 1}</span>", "97 % likely wrong", "label flipped"):  # fmt: skip
        assert part in cards[0]
    assert ">margin -0.12 nats per token, against the label in 2 of 3 policies</p>" in cards[1]
    assert "data-flipped" not in cards[1]
    assert f"line {result.rows[2]['line']}, {result.rows[2]['id']}</span>" in cards[2]
    assert "label flipped" not in cards[20]


def test_probabilities_are_not_rounded_to_certainty() -> None:
    result = audited(3)
    for row, p in zip(result.rows, (0.9991, 0.5, 0.0004), strict=True):
        row["p_wrong"] = p
    assert re.findall(r'class="p">(.*?)</span>', render(result)) == [
        f"{text} likely wrong" for text in ("over 99 %", "50 %", "under 1 %")
    ]


def test_turns_are_told_apart_and_long_texts_fold() -> None:
    result = audited(3)
    image = {"type": "image_url", "image_url": {"url": "x"}}
    calls = [{"type": "function", "function": {"name": "add"}}]
    result.rows[0] |= {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Look:"}, image]}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "4"}],
    }
    result.rows[1] |= {"prompt": "", "rejected": "x" * 20_010}
    first, second, third = CARD.findall(render(result))
    assert re.findall(r'class="role">(.*?)</p>', first) == ["user", "assistant", "tool"]
    assert ">Look:\n[image_url]</pre>" in first
    assert "&#34;name&#34;: &#34;add&#34;" in first
    assert "<h4>prompt" not in second
    assert "x… (10 more letters)</pre>" in second
    assert ["unfold" in card for card in (first, second, third)] == [False, True, False]


def test_hostile_text_stays_text() -> None:
    evil = "</script><script>alert(1)</script>' \" onload=x \u202e\x00\ud800\r\n<b>"
    result = audited(4, source=evil, model=evil, table=None, settings={evil: evil}, advice=evil)
    for name in ("prompt", "chosen", "rejected", "id"):
        result.rows[0][name] = evil
    result.rows[1] |= {"id": 2**53 + 1, "prompt": [{"role": evil, "content": evil}]}
    result.rows[2]["id"] = float("nan")
    text = render(result, most=3)
    text.encode("utf-8")
    assert text.count("<script>") == text.count("</script>") == 1
    assert not re.search("[\x00\u202e\ud800]", text.partition("Settings and versions")[0])
    assert "<b>" not in text
    page = Page(text)
    assert [link for link in page.links if link[0] != "#"] == []
    ids = re.findall(r"data-id='(.*?)'", text)
    assert len(ids) == 3
    assert ids[1:] == ['"9007199254740993"', '"nan"']  # a browser's numbers would lose digits
    assert "the other 1 are in the table beside this page" in " ".join(text.split())


def test_the_page_names_its_script_and_forbids_all_else() -> None:
    text = render(audited(3))
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy is not None
    assert policy[1].startswith(
        "default-src &#39;none&#39;; style-src &#39;unsafe-inline&#39;; script-src &#39;sha256-"
    )


@pytest.mark.pictures
def test_pictures_have_honest_axes() -> None:
    """Weights from 0 to beta, probabilities from 0 to 100, whatever the pairs have."""
    text = render(audited(60))
    ticks = {title: re.findall(r"<text[^>]*>([\d.]+)</text>", part) for title, part in
             re.findall(r'<svg role="img" aria-label="([^"]*)"(.*?)</svg>', text, re.DOTALL)}  # fmt: skip
    assert "100" in ticks["Probability that a label is wrong"]
    assert {"0.0", "2.5"} <= set(ticks["Weights in a GAPO update"])
    assert "60.0" in ticks["Suspicious labels in each fifth of the weights"]
    flipped = render(audited(60, flips=True))
    assert "clean pairs" in flipped
    assert "0.912" in flipped
    assert "71.0 %" in flipped
    assert "clean pairs" not in text
    assert Page(render(audited(20, learned=False))).counts["svg"] == 2  # margins and weights


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.html"
    write_page(path, audited(5))
    assert path.read_text("utf-8") == render(audited(5))
    assert list(path.parent.iterdir()) == [path]
