"""Rows in memory: what every function that takes them accepts, and what it refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from token_pairs import bytes_tokenizer

import gapo
from gapo import data
from gapo.data.reading import pairs_of
from gapo.records import ACCEPTED

ROWS = [
    {"prompt": "1+1?", "chosen": "2", "rejected": "11", "score": 3},
    {"prompt": "1+2?", "chosen": "3", "rejected": "12", "score": None},
]
TURNS = [{"role": "user", "content": "hi"}]


def written(rows: Any, folder: Path) -> list[Any]:
    data.write_rows(folder / "rows.jsonl", rows)
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


TAKE_ROWS: dict[str, Callable[[Any, Path], Any]] = {
    "write_rows": written,
    "flip_pairs": lambda rows, _: data.flip_pairs(rows, rate=0.5, seed=1),
    "flip_pairs by length": lambda rows, _: data.flip_pairs(rows, rate=0.5, mode="length"),
    "tokenize_pairs": lambda rows, _: data.tokenize_pairs(rows, bytes_tokenizer()),
    "pairs_of": lambda rows, _: list(pairs_of(rows).rows),
}


TAKE_TOKENS: dict[str, Callable[[Any, Path], Any]] = {
    "with_reference_logps": lambda rows, _: data.with_reference_logps(
        rows, lambda batch: (-np.ones(len(batch["chosen_labels"])),) * 2, pad_token_id=0, progress=None
    ),
    "collate_pairs": lambda rows, _: comparable([data.collate_pairs(rows, pad_token_id=0)]),
    "batches": lambda rows, _: comparable(data.batches(rows, 2, pad_token_id=0)),
}


def comparable(batches: Iterable[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    return [{name: x.tolist() for name, x in batch.items()} for batch in batches]


def frame(rows: Any) -> Any:
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", TAKE_ROWS | TAKE_TOKENS)
@pytest.mark.parametrize("held", [frame, datasets.Dataset.from_list, tuple, iter])
def test_rows_are_the_same_whatever_holds_them(name: str, held: Callable[[Any], Any], tmp_path: Path) -> None:
    rows = data.tokenize_pairs(ROWS, bytes_tokenizer()) if name in TAKE_TOKENS else ROWS
    take = (TAKE_ROWS | TAKE_TOKENS)[name]
    assert list(take(held(rows), tmp_path)) == list(take(rows, tmp_path))


def test_a_table_of_pandas_keeps_messages_and_numbers_and_what_is_missing_is_none(tmp_path: Path) -> None:
    rows = [{"n": 1, "x": 0.5, "b": True, "turns": TURNS}, {"n": 2, "x": None, "b": False, "turns": None}]
    assert written(pd.DataFrame(rows), tmp_path) == rows
    table = pd.DataFrame([[1, 2]], columns=["a", "a"])
    with pytest.raises(TypeError, match="rows have the column 'a' twice"):
        data.write_rows(tmp_path / "rows.jsonl", table)


@pytest.mark.parametrize("name", TAKE_ROWS | TAKE_TOKENS)
@pytest.mark.parametrize(
    ("rows", "got"),
    [
        ({"train": ROWS, "test": ROWS}, r"got a dict of train, test: choose a split, such as \['train'\]"),
        (
            {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]},
            r"got one dict of prompt, chosen, rejected: .*from_dict",
        ),
        ({}, "got a dict of nothing"),
        ("pairs.jsonl", "got 'pairs.jsonl': read a file with gapo.data.read_pairs"),
        (Path("pairs.jsonl"), "got 'pairs.jsonl': read a file with"),
        (None, "got None"),
        (3, "got int"),
    ],
)
def test_what_is_no_rows_is_refused(name: str, rows: Any, got: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"must be {ACCEPTED}, {got}"):
        (TAKE_ROWS | TAKE_TOKENS)[name](rows, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_row_that_is_no_dict_is_named(tmp_path: Path) -> None:
    for name in ("write_rows", "flip_pairs", "flip_pairs by length"):
        with pytest.raises(TypeError, match=r"row [12] of rows must be a dict, got str"):
            TAKE_ROWS[name]([ROWS[0], "oops"], tmp_path)
    assert not list(tmp_path.iterdir())
    tokens = data.tokenize_pairs(ROWS, bytes_tokenizer())
    for name in TAKE_TOKENS:
        with pytest.raises(TypeError, match="row 2 of tokenized must be a dict, got str"):
            TAKE_TOKENS[name]([*tokens, "oops"], tmp_path)
    checked = pairs_of([ROWS[0], "oops", None])
    assert [(problem.line, problem.reason) for problem in checked.problems] == [
        (2, "not an object with columns, but str"),
        (3, "not an object with columns, but null"),
    ]


def test_rows_without_answers_are_not_called_flipped() -> None:
    with pytest.raises(ValueError, match="row 0 of rows: it has no chosen and rejected to swap, but question, chosen"):
        data.flip_pairs([{"question": "a", "chosen": "b"}], rate=1.0)
    with pytest.raises(ValueError, match="row 1 of rows: column 'rejected' is missing"):
        data.flip_pairs([ROWS[0], {"chosen": "b"}], rate=0.5, mode="length")


def test_an_audit_refuses_splits() -> None:
    with pytest.raises(TypeError, match="got a dict of train: choose a split"):
        gapo.audit(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)))
