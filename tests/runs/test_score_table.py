"""The batches of a scoring, a pair's row of scores, and the selection by gap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapo.runs.score.score_table import MEASURES, by_pair, digits, plan, score_rows, select_pairs


@given(n=st.integers(1, 40), size=st.integers(1, 12), repeats=st.integers(1, 3), seed=st.integers(0, 5))
def test_every_pair_once_a_repeat_in_even_batches(n: int, size: int, repeats: int, seed: int) -> None:
    batches = list(plan(n, size, repeats, seed))
    for repeat in range(repeats):
        own = [(batch, rows) for r, batch, rows in batches if r == repeat]
        assert [batch for batch, _ in own] == list(range(-(-n // size)))
        assert sorted(np.concatenate([rows for _, rows in own])) == list(range(n))
        sizes = [len(rows) for _, rows in own]
        assert max(sizes) <= size
        assert max(sizes) - min(sizes) <= 1
    again = list(plan(n, size, repeats, seed))
    assert all((a[2] == b[2]).all() for a, b in zip(batches, again, strict=True))


def test_repeats_and_seeds_shuffle_anew() -> None:
    orders = {
        tuple(np.concatenate([r[2] for r in plan(30, 30, 2, seed) if r[0] == k])) for seed in (0, 1) for k in (0, 1)
    }
    assert len(orders) == 4


def line(checkpoint: str, repeat: int, batch: int, rows: list[int], start: float) -> dict:
    """A line of the log whose measures count up from `start`."""
    values = {field: [start + 10 * k + i for i in range(len(rows))] for k, field in enumerate(MEASURES.values())}
    return {"checkpoint": checkpoint, "repeat": repeat, "batch": batch, "rows": rows, **values}


def test_rows_hold_means_over_the_repeats() -> None:
    pairs = [{"id": "a", "is_flipped": True}, {"is_flipped": False}, {}]
    lines = [
        line("m", 0, 0, [2, 0], 1.0),
        line("m", 0, 1, [1], 5.0),
        line("m", 1, 0, [1, 2], 2.0),
        line("m", 1, 1, [0], 9.0),
    ]
    rows = score_rows(pairs, lines, ["m"], 2)
    spread = digits(np.std([2.0, 9.0], ddof=1))
    expected = {"row": 0, "id": "a", "is_flipped": True, "checkpoint": "m", "margin": 5.5, "anchor_margin": 15.5}
    expected |= {"gap": 25.5, "weight": 35.5, "gap_std": spread, "weight_std": spread, "gaps": [22.0, 29.0]}
    assert rows[0] == {**expected, "batches": [0, 1]}
    assert [row["id"] for row in rows] == ["a", None, None]
    assert [row["is_flipped"] for row in rows] == [True, False, None]
    once = score_rows([{}], [line("m", 0, 0, [0], 1.0)], ["m"], 1)
    assert once == [
        {"row": 0, "checkpoint": "m", "margin": 1.0, "anchor_margin": 11.0, "gap": 21.0, "weight": 31.0, "batches": [0]}
    ]


SCORES = [
    {"row": i, "checkpoint": name, "gap": gap, "weight": -gap}
    for name, gaps in (("m", [0.5, 0.1, 0.3, 0.1, 0.9]), ("n", [0.7, 0.1, 0.1, 0.1, 0.1]))
    for i, gap in enumerate(gaps)
]
PAIRS = [{"prompt": str(i)} for i in range(5)]


def test_selection_by_the_mean_over_the_checkpoints() -> None:
    assert by_pair(SCORES, "gap") == pytest.approx([0.6, 0.1, 0.2, 0.1, 0.5])
    assert select_pairs(PAIRS, SCORES, "highest", 0.4) == [
        {"prompt": "0", "gap": 0.6, "weight": -0.6},
        {"prompt": "4", "gap": 0.5, "weight": -0.5},
    ]
    for which, share, rows in (
        ("lowest", 0.01, "1"),
        ("lowest", 0.4, "13"),
        ("lowest", 0.6, "123"),
        ("highest", 1.0, "01234"),
    ):
        assert "".join(row["prompt"] for row in select_pairs(PAIRS, SCORES, which, share)) == rows


def test_among_equal_gaps_the_first_pairs_are_taken() -> None:
    pairs = [{"prompt": i} for i in range(200)]
    scores = [{"row": i, "gap": 1.0 - i // 150, "weight": 1.0} for i in range(200)]
    for which, first in (("lowest", 150), ("highest", 0)):
        assert [row["prompt"] for row in select_pairs(pairs, scores, which, 0.1)] == list(range(first, first + 20))


def test_seven_digits() -> None:
    assert digits(0.123456789) == 0.1234568
    assert digits(float(np.float32(1e-8))) == 1e-8
