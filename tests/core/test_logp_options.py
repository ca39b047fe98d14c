"""LD-DPO's alpha and WPO's weights as options: what is measured, what is refused, and what a step makes of weights."""

from __future__ import annotations

import logp_by_hand as hand
import numpy as np
import pytest
from frameworks import Library

from gapo.columns import REFERENCE_ALPHA
from gapo.data import collate_pairs, with_reference_logps
from gapo.logp_options import LogpOptions, PairLogps
from gapo.pairs import REFERENCE, pair_logps


def test_log_probabilities_and_weights_by_hand(library: Library) -> None:
    _, labels = hand.stacked(collate_pairs(hand.rows(), pad_token_id=0))
    logits = np.random.default_rng(1).normal(size=(*labels.shape, 96))
    arrays = library.asarray(logits, "float64"), library.asarray(labels)
    options = LogpOptions(hand.ALPHA, True)
    sums = (hand.log_softmax(logits) * hand.token_factors(labels, hand.ALPHA)).sum((1, 2))
    chosen, rejected = options.logps(*arrays)
    both = np.concatenate([library.numpy(chosen), library.numpy(rejected)])
    np.testing.assert_allclose(both, sums / hand.lengths(labels), rtol=2e-6)
    np.testing.assert_allclose(library.numpy(options.pair_weights(*arrays)), hand.wpo(logits, labels), rtol=2e-5)
    assert LogpOptions().pair_weights(*arrays) is None


@pytest.mark.parametrize(
    ("policy", "reference", "message"),
    [
        (0.4, None, r"ld_alpha=0.4, and the batch's reference log-probabilities with None.*ld_alpha=0.4\)"),
        (None, 0.4, r"ld_alpha=None, and the batch's reference log-probabilities with the column 'ref_ld_alpha'"),
        (0.4, 0.5, "ld_alpha=0.4, and the batch's reference log-probabilities with 0.5 to 0.5"),
        (0.4, 0.4, None),
        (1.0, None, None),
        (None, 1, None),
    ],
)
def test_a_reference_of_another_alpha_is_refused(
    policy: float | None, reference: float | None, message: str | None
) -> None:
    def measure(batch: object) -> object:
        return pair_logps(lambda ids, mask: np.zeros((*ids.shape, 96)), batch, ld_alpha=reference)  # type: ignore[arg-type]

    rows = with_reference_logps(hand.rows(), measure, pad_token_id=0, ld_alpha=reference, progress=None)
    batch = collate_pairs(rows, pad_token_id=0)
    assert (REFERENCE_ALPHA in batch) is (reference not in (None, 1))
    for ask in (
        lambda: LogpOptions(policy).checked(batch),
        lambda: pair_logps(lambda ids, mask: np.zeros((*ids.shape, 96)), batch, ld_alpha=policy),
    ):
        if message is None:
            ask()
        else:
            with pytest.raises(ValueError, match=message):
                ask()
    # measured anew, the old columns are gone
    again = with_reference_logps(
        rows, lambda b: (np.zeros(len(b["chosen_labels"])),) * 2, pad_token_id=0, progress=None
    )
    assert all(REFERENCE_ALPHA not in row and row[REFERENCE[0]] == 0 for row in again)


def test_rows_of_two_measurements_make_no_batch() -> None:
    rows = [{**row, **dict.fromkeys(REFERENCE, -1.0)} for row in hand.rows()]
    rows[2][REFERENCE_ALPHA] = 0.5
    with pytest.raises(ValueError, match="of row 0 were measured without ld_alpha, and those of other rows with it"):
        collate_pairs(rows, pad_token_id=0)


def test_where_values_cannot_be_read_the_reference_is_nan() -> None:
    jax = pytest.importorskip("jax")
    columns = {**dict.fromkeys(REFERENCE, np.ones(3)), REFERENCE_ALPHA: np.array([0.4, 0.5, 0.4])}
    checked = jax.jit(lambda batch: LogpOptions(0.4).checked(batch)[REFERENCE[1]])(columns)
    assert np.isnan(np.asarray(checked)).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ld_alpha": 1.5}, r"ld_alpha must be a finite number in \[0, 1\], or None, got 1.5"),
        ({"ld_alpha": True}, "ld_alpha must be"),
        ({"use_weighting": 1}, "use_weighting must be True or False, got 1"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogpOptions(**options)  # type: ignore[arg-type]


def test_the_weights_are_those_of_the_clean_forward_alone() -> None:
    """An engine calls the function again: at the anchor, and on stand-ins of the batch."""
    labels = np.array([[-100, 1, 2], [-100, 1, -100]])
    batch, stand_in = {"scale": 1.0}, {"scale": 1.0}
    values = np.random.default_rng(3).normal(size=(2, 3, 4))
    logps = PairLogps(lambda model, batch: (model * values, labels), LogpOptions(use_weighting=True))
    logps.await_batch(batch)
    logps(3.0, stand_in)
    assert logps.pair_weights() is None
    logps.await_batch(batch)
    logps(1.0, batch)
    logps(2.0, batch)
    logps(2.0, stand_in)
    np.testing.assert_allclose(logps.pair_weights(), hand.wpo(values, labels))
    assert logps.pair_weights() is None
