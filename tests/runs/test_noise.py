"""What weights and gaps say of flips: shares by fifth, and the area under the ROC curve."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapo.runs.output import noise

LABELLED = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=5, max_size=40)


def test_fifths_of_weights_that_tell_all() -> None:
    weights = np.array([9.0, 1.0, 2.0, 8.0, 3.0, 4.0, 5.0, 7.0, 6.0, 10.0])
    flipped = weights <= 3
    assert noise.fifths(weights, flipped) == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_equal_weights_have_no_lowest_fifth() -> None:
    assert noise.fifths(np.ones(10), np.arange(10) < 2) == pytest.approx([0.2] * 5)
    half_tied = np.array([1.0, 1, 1, 1, 2, 2, 2, 2, 2, 2])  # two flips among the four low ones
    assert noise.fifths(half_tied, np.arange(10) < 2) == pytest.approx([0.5, 0.5, 0, 0, 0])


@given(LABELLED)
def test_fifths_hold_every_flip_once(rows: list[tuple[int, bool]]) -> None:
    weights, flipped = (np.array(column) for column in zip(*rows, strict=True))
    sizes = [len(part) for part in np.array_split(weights, 5)]
    counted = sum(size * share for size, share in zip(sizes, noise.fifths(weights, flipped), strict=True))
    assert counted == pytest.approx(flipped.sum())


@given(LABELLED)
def test_auroc_counts_the_pairs_of_pairs(rows: list[tuple[int, bool]]) -> None:
    score, flipped = (np.array(column) for column in zip(*rows, strict=True))
    if flipped.all() or not flipped.any():
        with pytest.raises(ValueError, match="auroc needs flipped and clean pairs"):
            noise.auroc(score, flipped)
        return
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in score[flipped] for b in score[~flipped]]
    assert noise.auroc(score, flipped) == pytest.approx(np.mean(wins))


def test_what_cannot_be_counted() -> None:
    with pytest.raises(ValueError, match="fifths need at least 5 pairs, got 4"):
        noise.fifths(np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match=r"must be \(n,\) both; got \(6,\) and \(5,\)"):
        noise.fifths(np.ones(6), np.ones(5))
    with pytest.raises(ValueError, match=r"must be \(n,\) both; got \(2, 2\)"):
        noise.auroc(np.ones((2, 2)), np.ones((2, 2)))
    assert noise.weight_diagnostics(np.arange(4.0), np.array([1, 0, 0, 0])) == {}
