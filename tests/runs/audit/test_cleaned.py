"""Which pairs are flipped or dropped, and what becomes of their columns."""

from typing import Any

import numpy as np
import pytest

from gapo.data.flip import swapped
from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.cleaned import DROP, FLIP, KEEP, actions, cleaned_rows

P = np.array([0.1, 0.9, 0.4, 0.8, 0.2, 0.05, 0.7, 0.3, 0.6, 0.15])


def acts(marks: dict[int, str] | None = None, **options: Any) -> list[int]:
    config = AuditConfig(pairs="pairs.jsonl", clean_output="clean.jsonl", **options)
    return actions(config, P, marks or {}, 0.42).tolist()


@pytest.mark.parametrize(
    ("options", "flipped", "dropped"),
    [
        ({"drop": 0.3}, set(), {1, 3, 6}),
        ({"flip": 0.2}, {1, 3}, set()),
        ({"flip": 0.2, "drop": 0.5}, {1, 3}, {6, 8, 2}),
        ({"threshold": 0.6}, set(), {1, 3, 6, 8}),
        ({"threshold": 0.75, "drop": 0.5}, set(), {1, 3}),
        ({"threshold": 0.5, "flip": 1.0}, {1, 3, 6, 8}, set()),
        ({"drop": 0.0}, set(), set()),
        ({"drop": "auto"}, set(), {1, 3, 6, 8}),
        ({"drop": "auto", "flip": 0.2}, {1, 3}, {6, 8}),
        ({"drop": "auto", "flip": 0.5}, {1, 2, 3, 6, 8}, set()),
        ({"drop": "auto", "threshold": 0.75}, set(), {1, 3}),
    ],
)
def test_the_most_suspicious_pairs_are_touched(options: dict[str, Any], flipped: set[int], dropped: set[int]) -> None:
    action = acts(**options)
    assert {i for i, a in enumerate(action) if a == FLIP} == flipped
    assert {i for i, a in enumerate(action) if a == DROP} == dropped


@pytest.mark.parametrize("name", ["drop", "flip", "threshold"])
def test_true_is_no_share(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\].*, got True"):
        acts(**{name: True})


@pytest.mark.parametrize(("marked", "action"), [("flip", FLIP), ("drop", DROP), ("leave", KEEP)])
def test_marks_come_before_probabilities(marked: str, action: int) -> None:
    marks = {5: "wrong", 1: "right", 3: "unsure"}
    assert acts(marks, apply="marks.json", marked=marked) == [KEEP] * 5 + [action] + [KEEP] * 4
    both = acts(marks, apply="marks.json", marked=marked, drop=0.2)
    assert (both[5], both[1], both[3], both[6]) == (action, KEEP, DROP, DROP)
    assert both.count(DROP) == 2 + (action == DROP)


def test_cleaned_pairs_keep_their_order_and_columns() -> None:
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b", "id": i} for i in range(4)]
    action = np.array([KEEP, FLIP, DROP, KEEP])
    cleaned = cleaned_rows(rows, action, np.array([0.25, 0.9, 0.5, 0.1]))
    assert [row["id"] for row in cleaned] == [0, 1, 3]
    assert cleaned[1] == {
        "prompt": "1", "chosen": "b", "rejected": "a", "id": 1, "p_wrong": 0.1, "flipped_by_audit": True
    }  # fmt: skip
    assert cleaned[0] == {**rows[0], "p_wrong": 0.25, "flipped_by_audit": False}
    assert cleaned_rows(rows, np.array([KEEP, DROP, KEEP, KEEP]), None) == [rows[0], rows[2], rows[3]]


def test_all_that_belongs_to_an_answer_is_swapped_with_it() -> None:
    row = {"chosen": "a", "rejected": "b", "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "is_flipped": True}
    row |= {"chosen_by": "me", "note": "chosen"}
    assert swapped(row) == {
        "chosen": "b", "rejected": "a", "ref_chosen_logps": -2.0, "ref_rejected_logps": -1.0, "is_flipped": False,
        "chosen_by": "me", "note": "chosen",
    }  # fmt: skip
    assert swapped(swapped(row)) == row


@pytest.mark.parametrize(
    ("before", "after"), [(0.93, 0.07), (1, 0.0), ("0.25", "0.75"), (None, None), ("unknown", "unknown"), (93.0, 93.0)]
)
def test_the_probability_of_a_wrong_label_is_that_of_the_label_after_the_swap(before: Any, after: Any) -> None:
    assert swapped({"chosen": "a", "rejected": "b", "p_wrong": before})["p_wrong"] == after
