"""What is a pair, and the one form in which its prompt and answers stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from frameworks import require
from token_pairs import CONVERSATION, GOOD

from gapo import data


def turn(role: str, text: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


WHOLE = {part: CONVERSATION["prompt"] + CONVERSATION[part] for part in ("chosen", "rejected")}
CALL = turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])
HUMAN = "\n\nHuman: Which?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        ({"prompt": "Q?", **WHOLE}, CONVERSATION["prompt"], CONVERSATION["chosen"]),  # UltraFeedback
        ({"prompt": " Q?\n", **WHOLE, "score_chosen": 8.0}, CONVERSATION["prompt"], CONVERSATION["chosen"]),
        ({"prompt": "", **WHOLE}, CONVERSATION["prompt"], CONVERSATION["chosen"]),
        ({**CONVERSATION, **WHOLE}, CONVERSATION["prompt"], CONVERSATION["chosen"]),
        ({**CONVERSATION, "chosen": [CALL]}, CONVERSATION["prompt"], [CALL]),
        ({"chosen": f"{HUMAN} The cat", "rejected": f"{HUMAN} The dog"}, HUMAN, " The cat"),
        ({"chosen": f"{HUMAN} A.{HUMAN} The cat", "rejected": f"{HUMAN} A.{HUMAN} The dog"}, f"{HUMAN} A.{HUMAN}",
         " The cat"),
    ],
)  # fmt: skip
def test_the_prompt_stands_apart_from_the_answers(tmp_path: Path, row: Any, prompt: Any, chosen: Any) -> None:
    data.write_rows(tmp_path / "a.jsonl", [row])
    (read,) = data.read_pairs(tmp_path / "a.jsonl").rows
    assert (read["prompt"], read["chosen"]) == (prompt, chosen)
    assert {name: read[name] for name in row if name not in GOOD} == {k: v for k, v in row.items() if k not in GOOD}
    data.write_rows(tmp_path / "b.jsonl", [read])
    assert data.read_pairs(tmp_path / "b.jsonl").rows == [read]


@pytest.mark.parametrize(
    ("ask", "head"),
    [
        ("<|im_start|>user\nQ<|im_end|>\n", "<|im_start|>assistant\n"),
        ("<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>",
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("<start_of_turn>user\nQ<end_of_turn>\n", "<start_of_turn>model\n"),
        ("<|user|>\nQ</s>\n", "<|assistant|>\n"),
        ("[INST] Q ", "[/INST]"),
        ("### Instruction:\nQ\n\n", "### Response:"),
    ],
)  # fmt: skip
def test_answers_of_rendered_texts_begin_behind_their_head(tmp_path: Path, ask: str, head: str) -> None:
    before = ask + head + " A. " + ask  # an earlier turn, and words that both answers begin with
    same, other = f"{before}{head}The cat", f"{before}{head}The dog"
    parted = {side: f"{before}{ask}?\n{head} b" for side, ask in (("chosen", "more"), ("rejected", "less"))}
    data.write_rows(tmp_path / "a.jsonl", [{"chosen": same, "rejected": other}, parted])
    found = data.read_pairs(tmp_path / "a.jsonl")
    (row,) = found.rows
    assert row == {"prompt": before + head, "chosen": "The cat", "rejected": "The dog"}
    assert "differ within a turn of the user" in found.problems[0].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Other?", **WHOLE}, "column 'prompt' is text, and none of the messages that both answers"),
        ({**CONVERSATION, "chosen": WHOLE["chosen"]}, "'chosen' repeats the messages of the prompt, the other"),
        ({**WHOLE, "chosen": [turn("user", "A?"), turn("assistant", "b")]}, "begins with a message of the role 'user'"),
        ({**CONVERSATION, "rejected": [turn("assistant", "b"), turn("user", "?")]}, "ends with a message of the role"),
        ({**CONVERSATION, "chosen": [turn("assistant", None)]}, "column 'chosen' is neither text nor a list of mes"),
        ({**CONVERSATION, "chosen": [turn("assistant", "\n")]}, "column 'chosen' is empty"),
        ({**GOOD, "chosen": json.dumps(WHOLE["chosen"])}, "column 'chosen' is a list of messages written out as text"),
        ({**GOOD, "prompt": str(CONVERSATION["prompt"])}, "column 'prompt' is a list of messages written out as text"),
        ({**GOOD, "prompt": CONVERSATION["prompt"]}, "text and messages are mixed"),
        ({"chosen": f"{HUMAN} A\n\nHuman: b", "rejected": f"{HUMAN} A\n\nHuman: c"}, "differ within a turn of the u"),
    ],
)  # fmt: skip
def test_rows_whose_prompt_and_answers_do_not_agree(tmp_path: Path, row: Any, reason: str) -> None:
    data.write_rows(tmp_path / "a.jsonl", [GOOD, row])
    (problem,) = data.read_pairs(tmp_path / "a.jsonl").problems
    assert problem.line == 2
    assert reason in problem.reason


def test_a_flip_that_is_not_told_is_no_flip(tmp_path: Path) -> None:
    datasets = require("datasets")

    rows = [{**GOOD, "is_flipped": True}, {**GOOD, "is_flipped": None}, GOOD]
    data.write_rows(tmp_path / "a.jsonl", [*rows, {**GOOD, "is_flipped": 0}])
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,is_flipped\nQ? ,yes,no,true\nQ? ,yes,no,\n")
    numbers = datasets.Dataset.from_list([{**GOOD, "is_flipped": x} for x in (1.0, float("nan"), 0.0)])
    numbers.to_parquet(tmp_path / "a.parquet")
    for name, expected in (("a.jsonl", [True, None, None, False]), ("a.csv", [True, None]),
                           ("a.parquet", [True, None, False])):  # fmt: skip
        found = data.read_pairs(tmp_path / name)
        assert not found.problems
        assert [row.get("is_flipped") for row in found.rows] == expected
        assert all("is_flipped" in row for row, x in zip(found.rows, expected, strict=True) if x is not None)
        assert data.flip_pairs(found.rows, rate=1)[1]["is_flipped"] is True
