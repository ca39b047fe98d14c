"""The page of `gapo score`: what it shows, that it is self-contained, and that it escapes and cuts what users gave."""

import re
from typing import Any

import numpy as np
import pytest
from quick_runs import Page

from gapo import data
from gapo.runs.output import plots
from gapo.runs.score import score_page as score_report

SETTINGS = {
    "pairs": "pairs.jsonl",
    "models": ["a", "b"],
    "repeats": 2,
    "batch_size": 8,
    "rho": 0.1,
    "adaptive": True,
    "anchor": "exact",
    "first_order_ratio": 0.98765,
    "versions": {"gapo": "0.0"},
}

pytestmark = pytest.mark.pictures


def scored(n: int = 20, checkpoints: tuple[str, ...] = ("a",), seed: int = 0) -> list[dict[str, Any]]:
    """Scores of n pairs, the gap of pair i near i."""
    rng = np.random.default_rng(seed)
    rows = []
    for name in checkpoints:
        for i in range(n):
            gaps = (i + 0.1 * rng.standard_normal(2)).tolist()
            rows.append(
                {"row": i, "checkpoint": name, "margin": i - 5.5, "gap": float(np.mean(gaps)), "weight": 2 - i / n}
                | {"gaps": gaps}
            )
    return rows


def pairs(n: int = 20, flips: int | None = 4) -> list[dict[str, Any]]:
    """Generated pairs, the last ones flipped (None: not known)."""
    rows = data.generate_pairs(n)
    return rows if flips is None else [{**row, "is_flipped": i >= n - flips} for i, row in enumerate(rows)]


def test_the_page_is_self_contained_and_follows_the_theme() -> None:
    text = score_report.render(pairs(), scored(checkpoints=("a", "b")), SETTINGS, "scores.jsonl")
    page = Page(text)
    assert page.counts["svg"] == 5
    assert page.links == []
    assert "script" not in page.counts
    assert "url(http" not in text
    assert plots._INK not in text
    assert "prefers-color-scheme: dark" in text
    for part in ("Mean gap at each checkpoint", "mean over the models", "dropped 0.988 times", "agreement of repeats"):
        assert part in text


def test_flips_are_shown_where_they_are_known() -> None:
    text = score_report.render(pairs(), scored(), SETTINGS, "scores.jsonl")
    assert "20.0 % of the labels are flipped" in text
    words = " ".join(text.split())
    assert "a larger gap than a clean one with a chance of 1.000 (AUROC" in words
    assert "a smaller weight with 1.000, and, for comparison, a smaller margin with 0.000." in words
    cells = text[text.index("fifth of the weights") :]
    shares = [cells.index(f">{share} %</td>") for share in ("100.0", "0.0")]
    assert shares == sorted(shares)
    assert Page(text).counts["svg"] == 4
    plain = score_report.render(pairs(flips=None), scored(), SETTINGS, "scores.jsonl")
    for part in ("AUROC", "flipped", "Flipped"):
        assert part not in plain
    assert Page(plain).counts["svg"] == 3


def test_accuracy_is_by_true_labels() -> None:
    """Margins from -5.5 up, the 10 highest flipped: 14 of 20 above 0 by the labels given, 4 by the true ones."""
    text = score_report.render(pairs(flips=10), scored(), SETTINGS, "scores.jsonl")
    row = text[text.index("<td>a</td>") :]
    shares = re.findall(r'<td class="n">([\d.]+) %</td>', row)
    assert shares[:2] == ["70.0", "20.0"]
    assert "right by true labels" in text
    every = score_report.render(pairs(flips=20), scored(), SETTINGS, "scores.jsonl")
    assert re.findall(r'<td class="n">([\d.]+) %</td>', every)[:2] == ["70.0", "30.0"]
    assert "true labels" not in score_report.render(pairs(flips=None), scored(), SETTINGS, "scores.jsonl")


def test_pairs_known_in_part_count_in_part() -> None:
    rows = [row if i % 2 else {k: v for k, v in row.items() if k != "is_flipped"} for i, row in enumerate(pairs())]
    text = score_report.render(rows, scored(), SETTINGS, "scores.jsonl")
    assert "20.0 % of the labels are flipped" in text  # 2 of the 10 that are known


def test_most_brittle_first_and_what_users_wrote_is_escaped_and_cut() -> None:
    evil = "<script>alert(1)</script>"
    rows = pairs()
    rows[19] |= {"prompt": evil + "x" * 300 + "END", "id": evil}
    rows[18]["chosen"] = [{"role": "assistant", "content": evil}]
    text = score_report.render(rows, scored(), SETTINGS | {"pairs": evil, "models": [evil]}, evil)
    assert evil not in text
    assert text.count("&lt;script&gt;") == 8  # title, pairs: twice; models; prompt, id and chosen
    assert "END" not in text
    assert "x…" in text


def test_order_of_the_tables() -> None:
    text = score_report.render(pairs(), scored(), SETTINGS, "scores.jsonl")
    brittle, trusted = text[text.index("Most brittle") :].split("Most trusted")
    for part, ids in ((brittle, range(19, 9, -1)), (trusted, range(10))):
        places = [part.index(f">train-0-{i}<") for i in ids]
        assert places == sorted(places)


def test_agreement_of_repeats() -> None:
    assert score_report.agreement(scored()) == pytest.approx(1, abs=1e-2)
    opposite = [{"gaps": [1.0, -1.0, 1.0]}, {"gaps": [2.0, -2.0, 2.0]}, {"gaps": [3.0, -3.0, 3.0]}]
    assert score_report.agreement(opposite) == pytest.approx(-1 / 3)
    for none in ([], [{"gap": 1.0}], [{"gaps": [1.0, 2.0]}], [{"gaps": [0.0, 1.0]}, {"gaps": [0.0, 2.0]}]):
        assert score_report.agreement(none) is None


@pytest.mark.parametrize("n", [1, 3, 7])
def test_few_pairs_make_a_page_too(n: int) -> None:
    text = score_report.render(pairs(n, flips=1), scored(n), SETTINGS, "scores.jsonl")
    assert Page(text).counts["svg"] == (4 if n >= 5 else 3)
    equal = [row | {"gap": 0.0, "weight": 1.0, "gaps": [0.0, 0.0]} for row in scored(n)]
    assert "Anchor gaps" in score_report.render(pairs(n, flips=1), equal, SETTINGS | {"first_order_ratio": None}, "s")
