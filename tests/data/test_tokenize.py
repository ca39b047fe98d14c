"""Where a pair's answers begin: beside TRL's own reading, and written out by hand for tokens of one byte each."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_pairs import bytes_tokenizer, tokenizer

from gapo.data import generate_pairs, tokenize_pair, tokenize_pairs
from gapo.data.chat import warn_once

TURNS = "{% for m in messages %}{{ m.role }}:{{ m.content }}<e>{% endfor %}"
OPENED = TURNS + "{% if add_generation_prompt %}assistant:{% endif %}"
TEMPLATES = {
    "tools": "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}<e>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "thoughts": TURNS + "{% if add_generation_prompt %}assistant:{% if enable_thinking is defined and not "
    "enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "markers": "<b>{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content | trim }}<e>{% endgeneration %}{% else %}{{ m.content | trim }}<e>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "closes every conversation": TURNS + "{% if add_generation_prompt %}assistant:{% else %}{{ eos_token }}{% endif %}",
    "no generation prompt": TURNS,
}
# Of those that TRL brings along: each prints tools, thoughts or the end in another way.
OF_TRL = ("qwen3", "qwen3_5_think", "qwen2_5", "llama3_1", "gemma", "gemma4", "phi3", "cohere2", "deepseekv3",
          "gptoss", "glm4moe", "deepseek_r1_distill")  # fmt: skip

CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": CITY}}
CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"city": "Rome"}}}]


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


ASKED = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
ROWS = [
    ASKED,
    {**ASKED, "prompt": [{"role": "system", "content": "Be kind."}, user("hi"), assistant("well?"), user("go ")]},
    {**ASKED, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
    {**ASKED, "tools": [TOOL], "chosen": [assistant("", tool_calls=CALL)]},
    {**ASKED, "tools": [TOOL], "chosen": [assistant(None, tool_calls=CALL)]},
    {**ASKED, "chosen": [assistant("yes", reasoning_content="hm")], "chat_template_kwargs": {"enable_thinking": True}},
    {**ASKED, "tools": [TOOL], "prompt": [user("hi"), assistant("", tool_calls=CALL),
                                          {"role": "tool", "name": "look_up", "content": "sun"}]},
]  # fmt: skip


def templates() -> dict[str, str]:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    found = {name: folder / f"{name}.jinja" for name in OF_TRL}
    return TEMPLATES | {name: path.read_text() for name, path in found.items() if path.exists()}


@pytest.mark.parametrize("name", [*TEMPLATES, *OF_TRL])
def test_conversations_begin_their_answers_where_trl_does(name: str) -> None:
    """TRL's `apply_chat_template` parts the texts; with tokens of one byte, text and tokens part at one place."""
    # TRL 0.24 refuses conversations that end in a tool's answer, 1.9 some calls that its own templates of today render.
    pytest.importorskip("trl", minversion="1.10")
    from trl.data_utils import apply_chat_template

    if name not in (known := templates()):
        pytest.skip("this version of TRL does not bring the template")
    t, read = bytes_tokenizer(known[name]), 0
    for row in ROWS:
        plain = {key: value for key, value in row.items() if key != "tools"}
        try:
            theirs = apply_chat_template(plain, t, tools=row.get("tools"))
        except Exception:  # the template's own refusal
            with pytest.raises(ValueError, match="chat template"):
                tokenize_pair(row, t)
            continue
        if row["chosen"][0].get("tool_calls") and "look_up" not in theirs["chosen"]:
            with pytest.raises(ValueError, match="leaves the call of the tool 'look_up' out of the chosen answer"):
                tokenize_pair(row, t)
            continue
        ours = tokenize_pair(row, t, max_length=None)
        for side in ("chosen", "rejected"):
            answer = t(theirs[side], add_special_tokens=False)["input_ids"]
            whole = t(theirs["prompt"] + theirs[side], add_special_tokens=False)["input_ids"]
            assert ours[f"{side}_input_ids"] == whole
            assert ours[f"{side}_labels"] == [-100] * (len(whole) - len(answer)) + answer
        as_text = {key: json.dumps(row[key]) for key in ("tools", "chat_template_kwargs") if key in row}
        assert tokenize_pair({**row, **as_text}, t, max_length=None) == ours
        read += 1
    assert read >= 3


def test_tools_reach_the_template_and_a_call_is_an_answer() -> None:
    t = bytes_tokenizer(TEMPLATES["tools"])
    row = {**ASKED, "tools": [TOOL], "chosen": [assistant(None, tool_calls=CALL)]}
    printed = t.decode(tokenize_pair(row, t)["chosen_input_ids"]).replace(" ", "")
    expected = f"[[{json.dumps(TOOL)}]]user:hi<e>assistant:<call>{json.dumps(CALL[0]['function'])}<e>"
    assert printed == expected.replace(" ", "")


def parts(row: dict[str, Any], t: Any, **limits: Any) -> list[tuple[str, str]]:
    """(prompt, answer) of both sides, as text."""
    x = tokenize_pair(row, t, **limits)
    found = []
    for side in ("chosen", "rejected"):
        ids, labels = x[f"{side}_input_ids"], x[f"{side}_labels"]
        start = labels.count(-100)
        assert labels == [-100] * start + ids[start:]
        found.append((t.decode(ids[:start]), t.decode(ids[start:])))
    return found


def test_a_prompt_that_the_answers_repeat_is_taken_from_them() -> None:
    t, right = bytes_tokenizer(OPENED), [("user:hi<e>assistant:", "yes<e>"), ("user:hi<e>assistant:", "no<e>")]
    whole = {side: [user("hi"), *ASKED[side]] for side in ("chosen", "rejected")}
    nulls = {**whole, "chosen": [{**user("hi"), "tool_calls": None}, *ASKED["chosen"]]}  # as Arrow fills them in
    for row in (ASKED, whole, {**ASKED, **whole}, {**ASKED, **nulls}, {"prompt": "hi", **whole}):
        assert parts(row, t) == right


@pytest.mark.parametrize(
    ("row", "template", "match"),
    [
        (ASKED, "{{ messages | length }}" + OPENED, r"renders the prompt differently once the chosen answer follows\. "
         r"Alone, it continues with '1user:hi<e>assistant:'; before the answer, with '2user"),
        (ASKED, "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}", "renders the prom"),
        (ASKED, TURNS + "{% if add_generation_prompt %}bot:{% endif %}", "renders the prompt differently"),
        (ASKED, TURNS + "{% if add_generation_prompt %}answer:{% endif %}", "Alone, it continues with 'nswer:';"),
        ({**ASKED, "chosen": [user("hi"), assistant("yes")]}, OPENED, "'chosen' repeats the messages of the prompt"),
        ({**ASKED, "chosen": [user("you"), assistant("yes")]}, OPENED, "'chosen', without the prompt, begins with a m"),
        ({**ASKED, "chosen": [assistant("yes"), user("so?")]}, OPENED, "ends with a message of the role 'user'"),
        ({**ASKED, "prompt": []}, OPENED, "the prompt has no message"),
        ({**ASKED, "prompt": [user([{"type": "text", "text": "hi"}])]}, OPENED, "cannot render a content that is a"),
        ({**ASKED, "prompt": [user([{"type": "image"}])]}, OPENED, "column 'prompt' has a part of the type 'image'"),
        ({**ASKED, "images": ["a.png"]}, OPENED, "column 'images' holds media, not text, and would be dropped"),
        ({**ASKED, "tools": "{"}, OPENED, "column 'tools' is text that is not valid JSON"),
        ({**ASKED, "tools": {"a": 1}}, OPENED, "column 'tools' must be a list, or JSON of one; got dict"),
        ({**ASKED, "chat_template_kwargs": {"tokenize": False}}, OPENED, "chat_template_kwargs may hold variables"),
        (ASKED, "{% for m in messages %}{{ m.role }}{% endfor %}", "are the same tokens as the tokenizer and its cha"),
        (ASKED, "{% for m in messages %}{{ 'a' + 1 }}{% endfor %}", "chat template refuses messages of the roles user"),
    ],
)  # fmt: skip
def test_conversations_whose_answer_cannot_be_told(row: Any, template: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tokenize_pair(row, bytes_tokenizer(template))


def test_parts_of_text_go_where_the_template_has_a_place_for_them() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}<e>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = {name: [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in ASKED[name]] for name in ASKED}
    assert parts({**row, "images": []}, bytes_tokenizer(template))[0] == ("user:hi<e>assistant:", "yes<e>")


@pytest.mark.parametrize("closes", ["", "<e>"])
@pytest.mark.parametrize("opens", ["", "<b>"])
@pytest.mark.parametrize("prompt", ["", "hi: ", "<b>user:hi<e>", "<e>", "<b>"])
@pytest.mark.parametrize("end", ["", "<e>"])
def test_one_frame_around_a_text_whatever_the_tokenizer_sets(opens: str, closes: str, prompt: str, end: str) -> None:
    t = bytes_tokenizer(opens=opens, closes=closes)
    row = {"prompt": prompt, "chosen": "yes" + end, "rejected": "no" + end}
    opened = prompt if prompt.startswith("<b>") else opens + prompt
    before = opened or "<b>"  # the first token needs one that predicts it
    assert parts(row, t) == [(before, "yes<e>"), (before, "no<e>")]


def test_texts_part_where_trl_parts_them() -> None:
    """A tokenizer with merges across spaces; TRL: the prompt's tokens that open both wholes."""
    t = tokenizer()
    for row in generate_pairs(20):
        row = {**row, "prompt": row["prompt"].rstrip() + " "}
        alone, *both = (t(row["prompt"] + text)["input_ids"] for text in ("", row["chosen"], row["rejected"]))
        start = max(n for n in range(len(alone) + 1) if all(whole[:n] == alone[:n] for whole in both))
        x = tokenize_pair(row, t)
        for side, whole in zip(("chosen", "rejected"), both, strict=True):
            assert x[f"{side}_input_ids"] == [*whole, t.eos_token_id]
            assert x[f"{side}_labels"] == [-100] * start + [*whole[start:], t.eos_token_id]


def test_a_tokenizer_that_draws_at_random_is_refused() -> None:
    row = {"prompt": "a" * 30 + "?", "chosen": "yes", "rejected": "no"}

    class Drawing:
        bos_token_id = eos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            return {"input_ids": [len(text), *range(len(text))]}

    with pytest.raises(ValueError, match=r"splits the prompt differently once an answer follows: only 0 of its 32"):
        tokenize_pair(row, Drawing())


def test_an_empty_prompt_needs_a_token_that_predicts() -> None:
    t = bytes_tokenizer()
    t.bos_token = t.eos_token = None
    with pytest.raises(ValueError, match=r"the prompt is empty, and the tokenizer has neither a beginning-of-text nor"):
        tokenize_pair({"prompt": "", "chosen": "yes", "rejected": "no"}, t)


@given(
    prompt=st.integers(0, 12),
    answers=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    most=st.integers(2, 24) | st.none(),
    of_prompt=st.integers(1, 12) | st.none(),
)
def test_both_sides_are_cut_at_one_place_and_keep_their_bos(
    prompt: int, answers: tuple[int, int], most: int | None, of_prompt: int | None
) -> None:
    """Everything that fits is kept: the places that stay are counted from the ends, token by token."""
    text = "abcdefghijkl"[:prompt]
    row = {"prompt": text, "chosen": "123456789"[: answers[0]], "rejected": "ABCDEFGHI"[: answers[1]]}
    (before, chosen), (other, rejected) = parts(row, BYTES, max_length=most, max_prompt_length=of_prompt)
    assert before == other
    assert before.startswith("<b>")
    room = most or 1000
    for kept, whole in ((chosen, row["chosen"] + "<e>"), (rejected, row["rejected"] + "<e>")):
        tokens = [*whole[:-3], "<e>"]
        assert kept == "".join(tokens[: room - 1])
        room_left = room - min(len(tokens), room - 1)
        most_prompt = min(room_left, of_prompt or 1000)
        assert len(before) - 2 <= most_prompt  # "<b>" is one token
    longest = max(min(n + 1, room - 1) for n in answers)
    fits = min(room - longest, of_prompt or 1000)
    assert before == "<b>" + (text if prompt < fits else text[prompt - fits + 1 :])


BYTES = bytes_tokenizer(opens="<b>")


def test_what_was_cut_and_left_out_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "ab", "chosen": "1", "rejected": "2"},
        {"prompt": "abcdef", "chosen": "1", "rejected": "2"},
        {"prompt": "ab", "chosen": "01234567", "rejected": "0123"},
        {"prompt": "ab", "chosen": "01234567", "rejected": "01234599"},
    ]
    with caplog.at_level(logging.WARNING, logger="gapo"):
        kept = tokenize_pairs(rows, BYTES, max_length=6, name="pairs.jsonl")
        assert caplog.messages == [
            "pairs.jsonl: max_length=6, max_prompt_length=None cut the prompts of 3 (row 1, 2, 3) and the ends of the "
            "answers of 2 (row 2, 3) of 4 pairs; left out, since their answers are the same tokens: 1 (row 3)"
        ]
        assert [row["chosen"] for row in kept] == ["1", "1", "01234567"]
        caplog.clear()
        assert len(tokenize_pairs(rows, BYTES, max_length=None)) == 4
        assert not caplog.messages
        tokenize_pair(rows[3], BYTES, max_length=6)
        assert "are the same tokens within max_length=6: such a pair teaches nothing" in caplog.messages[-1]
    with pytest.raises(ValueError, match=r"pairs: no pair is left; .*Raise max_length"):
        tokenize_pairs(rows[3:], BYTES, max_length=6)
    with pytest.raises(ValueError, match=r"row 1 of pairs: column 'image' holds media, not text"):
        tokenize_pairs([rows[0], {**rows[1], "image": "a.png"}], BYTES)


@pytest.mark.parametrize("limit", ["512", 51.2, True])
def test_limits_are_whole_numbers(limit: Any) -> None:
    for name in ("max_length", "max_prompt_length"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number or None, got {limit!r}"):
            tokenize_pair({"prompt": "", "chosen": "a", "rejected": "b"}, BYTES, **{name: limit})


def test_what_stays_as_in_trl_though_it_may_surprise_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    t = bytes_tokenizer(OPENED)
    several = [assistant("wait"), {"role": "tool", "content": "sun"}, assistant("yes")]
    with caplog.at_level(logging.WARNING, logger="gapo"):
        for _ in range(2):
            found = parts({**ASKED, "chosen": several, "tools": [TOOL]}, t)
            tokenize_pair({"prompt": "a b", "chosen": "a b c", "rejected": "a b d"}, t)
    assert found[0] == ("user:hi<e>assistant:", "wait<e>tool:sun<e>assistant:yes<e>")
    for part in ("does not render tools", "messages that the policy did not write", "begin with the whole prompt"):
        assert sum(part in message for message in caplog.messages) == 1
