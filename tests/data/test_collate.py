"""Tokenised rows that are no pairs are named before they are padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gapo import data

ROW = {"chosen_input_ids": [7, 8, 9], "chosen_labels": [-100, 8, 9],
       "rejected_input_ids": [7, 6], "rejected_labels": [-100, 6]}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"chosen_labels": [-100, 8]}, r"row 1 has 3 chosen_input_ids and 2 chosen_labels"),
        ({"chosen_labels": [8, 9, -100]}, r"the chosen_labels of row 1 are shifted: put each label at the position"),
        ({"rejected_labels": [-100, -100]}, r"no token of the rejected answer of row 1 counts"),
        ({"rejected_labels": [7, -100]}, r"no token of the rejected answer of row 1 counts: .* except perhaps the f"),
        ({"chosen_input_ids": [], "chosen_labels": []}, r"chosen_input_ids of row 1 must be a list of whole numbers"),
        ({"chosen_input_ids": [7, 8.5, 9]}, r"chosen_input_ids of row 1 must be a list of whole numbers"),
        ({"chosen_input_ids": [[7, 8, 9]]}, r"chosen_input_ids of row 1 must be a list of whole numbers"),
        ({"chosen_input_ids": "789"}, r"chosen_input_ids of row 1 must be a list of whole numbers"),
        ({"chosen_input_ids": [-1, 8, 9]}, r"row 1: chosen ids must be >= 0, labels >= 0 or -100"),
        ({"chosen_labels": [-100, -1, 9], "id": "x"}, r"row 1 \(id x\): chosen ids must be >= 0, labels >= 0 or -100"),
        ({"ref_chosen_logps": None, "ref_rejected_logps": 0.0}, r"the reference log-probabilities of row 1 are not"),
    ],
)  # fmt: skip
def test_tokenised_rows_that_would_train_on_something_else(wrong: dict[str, Any], match: str) -> None:
    first = {**ROW, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    rows = [first, {**ROW, **wrong}]
    with pytest.raises(ValueError, match=match):
        data.collate_pairs(rows, pad_token_id=0)
    with pytest.raises(ValueError, match=match):
        list(data.batches(rows, 1, pad_token_id=0, seed=0))


def test_ids_of_any_whole_kind_are_padded_alike() -> None:
    kinds = [{name: np.array(ids, dtype=kind) for name, ids in ROW.items()} for kind in (np.int8, np.int32, np.int64)]
    batch = data.collate_pairs([ROW, *kinds], pad_token_id=0)
    for array in batch.values():
        assert array.dtype == np.int64
        assert (array == array[0]).all()


@pytest.mark.parametrize("multiple", ["auto", 2.0, -8, True])
def test_lengths_are_rounded_to_whole_numbers(multiple: Any) -> None:
    with pytest.raises(ValueError, match=f"pad_to_multiple_of must be a whole number .*, got {multiple!r}"):
        data.collate_pairs([ROW], pad_token_id=0, pad_to_multiple_of=multiple)


def test_what_is_missing_is_named() -> None:
    short = {name: ids for name, ids in ROW.items() if name != "rejected_labels"}
    with pytest.raises(ValueError, match=r"'rejected_labels' is missing in row 1 \(id b\)"):
        data.collate_pairs([ROW, {**short, "id": "b"}], pad_token_id=0)
    with pytest.raises(ValueError, match=r"pad_token_id must be a whole number, got None"):
        data.collate_pairs([ROW], pad_token_id=None)  # type: ignore[arg-type]
