"""Weighted objectives, "gapo+NAME" and its kin, for every NAME: losses, gradients and steps.

The weights are worked out pair by pair in Python floats. The objective behind the "+" has its own tests, and stands
here as it is: a weighted loss or gradient is the pair's weight times its own.
"""

from __future__ import annotations

import math
import statistics
import threading
from typing import Any

import models
import numpy as np
import pytest
from frameworks import LIBRARIES, Library

import gapo
from gapo.objectives import OBJECTIVES, WEIGHTINGS, LogProbs, resolve

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*float64.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:first_order_ratio"),  # a large radius on a few numbers is far from linear
]

FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "anchor_chosen", "anchor_rejected")
# Summed log-probabilities in the order of FIELDS, then both lengths. The gaps are -0.3, 0.35, -1.42, 0.5 and 0.5.
ROWS = [
    (-6.0, -9.0, -7.0, -8.0, -5.7, -9.8, 3, 4),
    (-5.0, -7.5, -8.0, -6.0, -5.5, -7.0, 2, 5),
    (-12.0, -4.0, -9.0, -9.5, -7.0, -5.5, 6, 2),
    (-3.0, -3.2, -3.1, -3.3, -3.4, -3.1, 1, 1),
    (-5.0, -7.0, -4.0, -6.5, -6.0, -7.0, 2, 3),
]
COUPLED = [name for name, objective in OBJECTIVES.items() if objective.coupled]
OF_PAIRS = [name for name in OBJECTIVES if name not in COUPLED]
BY_BASE = pytest.mark.parametrize("base", list(OBJECTIVES))


def log_probs(library: Library, rows: Any = ROWS, dtype: str = "float64", anchor: bool = True) -> LogProbs:
    columns = [np.array(column, dtype=float) for column in zip(*rows, strict=True)]
    names = FIELDS if anchor else FIELDS[:4]
    arrays = {name: library.asarray(column, dtype) for name, column in zip(names, columns, strict=False)}
    chosen, rejected = (library.asarray(column.astype(np.int32)) for column in columns[len(FIELDS) :])
    return LogProbs(**arrays, chosen_lengths=chosen, rejected_lengths=rejected)


def margin(row: Any, first: int = 0) -> float:
    return row[first] / row[6] - row[first + 1] / row[7]


def witnesses(weighting: str, rows: Any) -> list[float]:
    """What counts against a pair: its gap, or how many deviations its margin lies below the mean."""
    margins = [margin(row) for row in rows]
    if weighting.startswith("gapo"):
        return [m - margin(row, 4) for m, row in zip(margins, rows, strict=True)]
    return [(statistics.mean(margins) - m) / statistics.stdev(margins) for m in margins]


def weights(weighting: str, rows: Any = ROWS, beta: float = 2.5, gamma: float = 0.25, drop: float = 0.2) -> list[float]:
    """v: sigmoids over their mean, or an equal weight for those that stay."""
    found = witnesses(weighting, rows)
    if weighting.endswith("drop"):  # at most so many pairs are as bad as one that goes
        kept = [sum(other >= x for other in found) > round(drop * len(found), 9) // 1 for x in found]
        return [len(kept) / sum(kept) * stays for stays in kept]
    scores = [1 / (1 + math.exp(beta * x - gamma)) for x in found]
    return [score / statistics.mean(scores) for score in scores]


def tolerance(library: Library) -> dict[str, float]:
    return {"rtol": 2e-5, "atol": 2e-5} if library.name == "mlx" else {"rtol": 1e-9, "atol": 1e-9}


def gradients(library: Library, name: str, logps: LogProbs) -> list[np.ndarray]:
    """Of the mean loss, by each of FIELDS, (N,)."""

    def loss(*arrays: Any) -> Any:
        named = dict(zip(FIELDS, arrays, strict=True))
        moved = LogProbs(**named, chosen_lengths=logps.chosen_lengths, rejected_lengths=logps.rejected_lengths)
        return OBJECTIVES[name].losses(moved).mean()

    return library.grad(loss, *(getattr(logps, field) for field in FIELDS))


@BY_BASE
def test_losses_are_the_weights_times_the_losses(library: Library, base: str) -> None:
    logps = log_probs(library)
    plain = library.numpy(OBJECTIVES[base].losses(logps))
    for weighting in WEIGHTINGS:
        found = library.numpy(OBJECTIVES[f"{weighting}+{base}"].losses(logps))
        scale = 1.0 if base in COUPLED else np.array(weights(weighting))  # one loss of the batch keeps its value
        np.testing.assert_allclose(found, scale * plain, **tolerance(library), err_msg=weighting)


@BY_BASE
def test_gradients_are_the_weights_times_the_gradients(autodiff: Library, base: str) -> None:
    """The weights are constants: no gradient passes through gap or margin. So it is for a loss of the whole batch."""
    logps = log_probs(autodiff)
    plain = gradients(autodiff, base, logps)
    for weighting in WEIGHTINGS:
        found = gradients(autodiff, f"{weighting}+{base}", logps)
        for side in (0, 1):
            expected = np.array(weights(weighting)) * plain[side]
            np.testing.assert_allclose(found[side], expected, **tolerance(autodiff), err_msg=weighting)
        assert not any(grad.any() for grad in found[2:])  # reference and anchor


def test_dr_dpo_by_hand(autodiff: Library) -> None:
    """dL/dz_i = -v_i p_i beta sigmoid(-beta z_i), with p the softmax of the log-likelihoods over beta'."""
    logps = log_probs(autodiff)
    beta, beta_prime = 0.1, 1.0
    z = [row[0] - row[1] - (row[2] - row[3]) for row in ROWS]
    odds = [(1 / (1 + math.exp(-beta * x))) ** (1 / beta_prime) for x in z]
    expected = [
        -v * share / sum(odds) * beta / (1 + math.exp(beta * x))
        for v, share, x in zip(weights("gapo"), odds, z, strict=True)
    ]
    chosen, rejected, *_ = gradients(autodiff, "gapo+dr_dpo", logps)
    np.testing.assert_allclose(chosen, expected, **tolerance(autodiff))
    np.testing.assert_allclose(rejected, [-x for x in expected], **tolerance(autodiff))


def test_equal_gaps_weigh_nothing(library: Library) -> None:
    rows = [(*row[:4], row[0] - 0.3 * row[6], row[1] - 0.1 * row[7], *row[6:]) for row in ROWS]  # a gap of 0.2 each
    logps = log_probs(library, rows)
    for base in OBJECTIVES:
        plain = library.numpy(OBJECTIVES[base].losses(logps))
        found = library.numpy(OBJECTIVES[f"gapo+{base}"].losses(logps))
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6, err_msg=base)
    equal = log_probs(library, [ROWS[0]] * 3)  # without a largest gap or a lowest margin none is dropped
    for weighting in WEIGHTINGS:
        found = library.numpy(OBJECTIVES[f"{weighting}+dpo"].losses(equal))
        np.testing.assert_allclose(found, library.numpy(OBJECTIVES["dpo"].losses(equal)), rtol=1e-5)


@pytest.mark.parametrize("far", [1e3, -1e3])
def test_weights_that_all_underflow_keep_their_ratio(autodiff: Library, far: float) -> None:
    """Gaps of 1e3: every sigmoid is 0 in single precision. Their ratio is exp(-beta * difference)."""
    rows = [(-3.0, -3.2, -3.1, -3.3, -3.0 - far + 0.5 * i, -3.2, 1, 1) for i in range(3)]
    logps = log_probs(autodiff, rows, "float32")
    scores = [math.exp(2.5 * 0.5 * i) if far > 0 else 1.0 for i in range(3)]
    found = autodiff.numpy(OBJECTIVES["gapo+unhinged"].losses(logps))
    plain = autodiff.numpy(OBJECTIVES["unhinged"].losses(logps))
    np.testing.assert_allclose(found, plain * scores / np.mean(scores), rtol=2e-3)
    for side in gradients(autodiff, "gapo+dpo", logps)[:2]:
        assert np.isfinite(side).all()
        assert side.all()


@pytest.mark.parametrize("drop", [0.0, 0.2, 0.4, 0.6, 0.8, 0.99])
@pytest.mark.parametrize("weighting", ["gapo-drop", "margin-drop"])
def test_the_share_that_is_dropped_with_ties(library: Library, weighting: str, drop: float) -> None:
    """Two gaps are equal, the largest: both go, or both stay."""
    rows = [*ROWS[:3], ROWS[3], ROWS[3]]
    logps = log_probs(library, rows)
    found = library.numpy(OBJECTIVES[f"{weighting}+unhinged"].losses(logps, gap_drop=drop))
    plain = library.numpy(OBJECTIVES["unhinged"].losses(logps))
    expected = weights(weighting, rows, drop=drop)
    np.testing.assert_allclose(found, expected * plain, **tolerance(library))
    if weighting == "gapo-drop":
        assert [x == 0 for x in found[3:]] == [drop >= 0.4] * 2


def test_two_ranks_are_one_batch() -> None:
    """Each of two threads holds a part of the pairs; the mean of their weights is taken over both."""
    library, names = LIBRARIES["numpy"], ("gapo+dpo", "margin+dpo", "gapo+simpo")
    parts, seen = [ROWS[:2], ROWS[2:]], {}
    meeting, posted = threading.Barrier(2, timeout=20), {}

    def reduce_of(rank: int) -> Any:
        def reduce(x: Any, op: str) -> Any:
            posted[rank] = x
            meeting.wait()
            total = (np.maximum if op == "max" else np.add)(posted[0], posted[1])
            meeting.wait()
            return total

        return reduce

    def run(rank: int) -> None:
        logps = log_probs(library, parts[rank])
        logps._count_over(reduce_of(rank), None)
        seen[rank] = [OBJECTIVES[name].losses(logps) for name in names]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, name in enumerate(names):
        whole = OBJECTIVES[name].losses(log_probs(library))
        both = np.concatenate([seen[0][place], seen[1][place]])
        np.testing.assert_allclose(both, whole, rtol=1e-12, err_msg=name)


# Settings


def test_settings_are_those_of_the_weights_and_of_the_objective() -> None:
    config = gapo.GAPOConfig(beta=1.7, gamma=0.6)
    assert resolve("gapo+dpo", config).settings == {"beta": 0.1, "gap_beta": 1.7, "gap_gamma": 0.6}
    overridden = resolve("gapo+dpo", config, {"beta": 0.3, "gap_beta": 4.0, "gap_gamma": 0.0})
    assert overridden.settings == {"beta": 0.3, "gap_beta": 4.0, "gap_gamma": 0.0}
    assert resolve("gapo+simpo", config).settings == {"beta": 1.7, "gamma": 0.6, "gap_beta": 1.7, "gap_gamma": 0.6}
    assert resolve("margin-drop+ipo", config).settings == {"tau": 0.1, "gap_drop": 0.2}
    changed = OBJECTIVES["gapo+dpo"].losses(log_probs(LIBRARIES["numpy"]), beta=0.3, gap_beta=1.2, gap_gamma=-0.4)
    plain = OBJECTIVES["dpo"].losses(log_probs(LIBRARIES["numpy"]), beta=0.3)
    np.testing.assert_allclose(changed, plain * weights("gapo", beta=1.2, gamma=-0.4), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gapo+dpo", {"gamma": 1.0}, "objective 'gapo\\+dpo' has no setting 'gamma'; it takes beta"),
        ("gapo+dpo", {"gap_beta": -1.0}, "gap_beta must be a finite number >= 0, got -1.0"),
        ("gapo-drop+dpo", {"gap_drop": 1.0}, r"gap_drop must be a finite number in \[0, 1\), got 1.0"),
        ("gapo-drop+dpo", {"gap_beta": 1.0}, "has no setting 'gap_beta'"),
        ("gapo+simpo", {"beta": 1.0}, "objective 'gapo\\+simpo' takes beta and gamma from gapo.GAPOConfig"),
    ],
)
def test_refused_settings(name: str, given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name, None, given)


@BY_BASE
def test_it_is_evaluated_as_what_it_weights(base: str) -> None:
    """No weights in an evaluation: what an objective with an anchor reports there, this one does too."""
    bare = log_probs(LIBRARIES["numpy"], anchor=False)
    settings = {"beta": 0.3} if base == "dpo" else {}
    for weighting in WEIGHTINGS:
        found = resolve(f"{weighting}+{base}", None, settings).evaluated
        expected = resolve(base, None, settings).evaluated
        assert not found.needs_anchor
        assert (found.name, found.settings) == (expected.name, expected.settings)
        np.testing.assert_array_equal(found.losses(bare), expected.losses(bare))


# The step, on parameters that are the log-probabilities themselves

SIDES = ("chosen", "rejected")
LOGPS = {side: np.array([row[i] / row[6 + i] for row in ROWS]) for i, side in enumerate(SIDES)}
BATCH = {f"{side}_lengths": np.array([row[6 + i] for row in ROWS]) for i, side in enumerate(SIDES)}
BATCH |= {f"ref_{side}_logps": np.array([row[2 + i] for row in ROWS]) for i, side in enumerate(SIDES)}
CONFIG = gapo.GAPOConfig(rho=0.8, beta=1.5, gamma=0.3, anchor="exact")


def stepped(library: Library, name: str) -> tuple[gapo.StepResult, dict[str, np.ndarray]]:
    def margin_fn(params: Any, batch: Any) -> Any:
        return tuple(1.0 * models.flat(library, params)[side] for side in SIDES)

    step = gapo.value_and_grad(margin_fn, CONFIG, name, backend=library.name)
    result, grads = step(models.to_backend(library, LOGPS, "float64"), BATCH)
    return result, models.flat_grads(library, grads)


@BY_BASE
def test_the_step_is_the_objectives_own_weighted(backend: Library, base: str) -> None:
    plain, plain_grads = stepped(backend, base)
    result, grads = stepped(backend, f"gapo+{base}")
    gaps = backend.numpy(result.anchor_gaps).tolist()
    assert max(gaps) - min(gaps) > 0.3
    scores = [1 / (1 + math.exp(CONFIG.beta * gap - CONFIG.gamma)) for gap in gaps]
    v = np.array([score / statistics.mean(scores) for score in scores])
    close = {"rtol": 1e-4, "atol": 1e-5} if backend.name == "mlx" else {"rtol": 1e-7, "atol": 1e-8}
    np.testing.assert_allclose(backend.numpy(result.weights), v * backend.numpy(plain.weights), **close)
    for side in SIDES:
        np.testing.assert_allclose(grads[side], v * plain_grads[side], **close, err_msg=side)
