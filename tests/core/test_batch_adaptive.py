"""Objectives that look at the batch or at past ones: over ranks, from step to step, and their warning."""

from __future__ import annotations

import statistics
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from frameworks import Library

import gapo
from gapo.columns import BatchConstants
from gapo.objectives import OBJECTIVES, LogProbs, batch_adaptive

RNG = np.random.default_rng(8)
PAIRS = 10
COLUMNS = {
    "chosen": RNG.normal(size=PAIRS) - 1.5,
    "rejected": RNG.normal(size=PAIRS) - 2.0,
    "chosen_lengths": RNG.integers(2, 9, PAIRS),
    "rejected_lengths": RNG.integers(2, 9, PAIRS),
    "ref_chosen": RNG.normal(size=PAIRS) - 6,
    "ref_rejected": RNG.normal(size=PAIRS) - 9,
}
NAMES = ("amapo", "alpha_dpo", "beta_dpo", "re_po")


def log_probs(columns: Any, reduce: Any = None, running: Any = None) -> LogProbs:
    constants = BatchConstants(**{name: columns[name] for name in list(COLUMNS)[2:]})
    return LogProbs.of_step((columns["chosen"], columns["rejected"]), constants, reduce=reduce, running=running)


RUNNING = {
    name: np.float64(x) for name, x in (("mean", 0.4), ("deviation", 0.6), ("weight", 0.7), ("reliability", 0.8))
}


def on_two_ranks(name: str, **settings: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The losses of the pairs by two threads that each hold half of them, and what each recorded."""
    barrier, numbers, outcomes = threading.Barrier(2, timeout=20), [0.0, 0.0], [None, None]

    def of_rank(rank: int) -> None:
        def reduce(x: Any, op: str) -> Any:
            numbers[rank] = x
            barrier.wait()
            total = {"sum": sum, "max": max}[op](numbers)
            barrier.wait()
            return total

        half = {key: column[5 * rank : 5 * rank + 5] for key, column in COLUMNS.items()}
        logps = log_probs(half, reduce, RUNNING)
        outcomes[rank] = (OBJECTIVES[name].losses(logps, **settings), logps.recorded)

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (first, told), (second, also_told) = outcomes  # type: ignore[misc]
    return np.concatenate([first, second]), [told, also_told]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_share_means_and_deviations(name: str) -> None:
    settings = {"keep": 1.0} if name == "beta_dpo" else {}  # each rank drops pairs of its own
    logps = log_probs(COLUMNS, running=RUNNING)
    whole = OBJECTIVES[name].losses(logps, **settings)
    parts, recorded = on_two_ranks(name, **settings)
    np.testing.assert_allclose(parts, whole, rtol=1e-12)
    for told in recorded:
        assert told.keys() == logps.recorded.keys()
        for key, value in told.items():
            np.testing.assert_allclose(value, logps.recorded[key], rtol=1e-12)
    batches = [log_probs({key: column[half] for key, column in COLUMNS.items()}, running=RUNNING) for half in HALVES]
    halves = [OBJECTIVES[name].losses(batch, **settings) for batch in batches]
    # RE-PO's eta is the last step's: only what it records tells of the ranks
    assert np.allclose(np.concatenate(halves), whole) == (name == "re_po")


HALVES = (slice(0, 5), slice(5, 10))


def test_beta_dpo_drops_pairs_of_each_rank_by_the_mean_of_all() -> None:
    losses, _ = on_two_ranks("beta_dpo", keep=0.6)
    sums = {side: COLUMNS[side] * COLUMNS[f"{side}_lengths"] for side in ("chosen", "rejected")}
    z = sums["chosen"] - sums["rejected"] - COLUMNS["ref_chosen"] + COLUMNS["ref_rejected"]
    far = np.abs(z - (0.9 * 0.4 + 0.1 * z.mean()) / (0.9 * 0.7 + 0.1))
    expected = np.concatenate([far[half] <= sorted(far[half])[2] for half in HALVES])
    np.testing.assert_array_equal(losses > 0, expected)


def steps(name: str, settings: dict[str, Any], batches: list[dict[str, Any]]) -> list[gapo.StepResult]:
    """One step on each batch, at parameters that stay, each with the running statistics of the last one."""
    step = gapo.value_and_grad(
        lambda params, batch: (params["shift"] + batch["chosen"], batch["rejected"] + 0 * params["shift"]),
        objective=name,
        objective_settings=settings,
        backend="numpy",
    )
    results: list[gapo.StepResult] = []
    for columns in batches:
        batch = {name + ("_logps" if "ref_" in name else ""): x for name, x in columns.items()}
        running = results[-1].running if results else None
        results.append(step({"shift": np.zeros(())}, batch, running=running)[0])
    return results


BATCHES = [{name: column[half] for name, column in COLUMNS.items()} for half in (*HALVES, slice(2, 9))]


def log_ratios(columns: Any, per_token: bool) -> list[float]:
    values = []
    for i in range(len(columns["chosen"])):
        n, m = columns["chosen_lengths"][i], columns["rejected_lengths"][i]
        chosen, rejected = columns["chosen"][i] * n - columns["ref_chosen"][i], columns["rejected"][i] * m
        rejected -= columns["ref_rejected"][i]
        values.append(float(chosen / n - rejected / m if per_token else chosen - rejected))
    return values


def test_the_reliability_runs_from_step_to_step() -> None:
    settings = {"beta": 0.3, "reliability": 0.7, "rate": 0.25}
    eta = 0.7
    for columns, result in zip(BATCHES, steps("re_po", settings, BATCHES), strict=True):
        p = [1 / (1 + np.exp(-0.3 * z)) for z in log_ratios(columns, per_token=False)]
        w = [eta * q / (eta * q + (1 - eta) * (1 - q)) for q in p]
        loss = statistics.mean(-x * np.log(q) - (1 - x) * np.log(1 - q) for x, q in zip(w, p, strict=True))
        np.testing.assert_allclose(result.loss, loss, rtol=1e-12)
        eta += 0.25 * (statistics.mean(w) - eta)


def average_of(values: list[float], rate: float) -> float:
    """The mean of past values, each counting 1 - rate times as much as the next."""
    shares = [(1 - rate) ** age for age in reversed(range(len(values)))]
    return sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)


def test_alpha_dpo_compares_with_the_moving_averages() -> None:
    means, spreads = [], []
    results = steps("alpha_dpo", {"beta": 2.0, "gamma": 0.3, "alpha": 0.4, "rate": 0.25}, BATCHES)
    for columns, result in zip(BATCHES, results, strict=True):
        z, margins = log_ratios(columns, per_token=True), columns["chosen"] - columns["rejected"]
        means.append(statistics.mean(z))
        spreads.append(statistics.stdev(z))
        scores = (np.array(z) - average_of(means, 0.25)) / average_of(spreads, 0.25)
        loss = np.log1p(np.exp(0.3 + 2.0 * (0.4 * scores - margins))).mean()
        np.testing.assert_allclose(result.loss, loss, rtol=1e-12)


def test_beta_dpo_compares_with_the_moving_average() -> None:
    means = []
    results = steps("beta_dpo", {"beta": 0.2, "alpha": 0.3, "keep": 0.8, "rate": 0.25}, BATCHES)
    for columns, result in zip(BATCHES, results, strict=True):
        z = log_ratios(columns, per_token=False)
        means.append(statistics.mean(z))
        mean = average_of(means, 0.25)
        kept = sorted(z, key=lambda value: abs(value - mean))[: len(z) * 4 // 5]
        beta = max(0.001, 0.2 * (1 + 0.3 * (statistics.mean(kept) - mean)))
        np.testing.assert_allclose(result.loss, statistics.mean(np.log1p(np.exp(-beta * x)) for x in kept), rtol=1e-12)


def test_beta_dpos_beta_has_a_floor() -> None:
    """A batch far below the average: beta' would be negative, and training would turn round."""
    columns = {name: column[:1] for name, column in COLUMNS.items()}
    running = {"mean": np.float64(50.0), "weight": np.float64(1.0)}
    loss = OBJECTIVES["beta_dpo"].losses(log_probs(columns, running=running), alpha=0.6)
    (z,) = log_ratios(columns, per_token=False)
    np.testing.assert_allclose(loss, [np.log1p(np.exp(-0.001 * z))], rtol=1e-12)


def test_re_po_has_the_gradient_of_the_likelihood(autodiff: Library) -> None:
    """Of labels that are true with probability eta."""
    z = np.linspace(-30, 30, 7)
    ones, zeros = (autodiff.asarray(x) for x in (np.ones(7), np.zeros(7)))

    def re_po(chosen: Any) -> Any:
        lengths = {"chosen_lengths": ones, "rejected_lengths": ones}
        logps = LogProbs(chosen=chosen, rejected=zeros, ref_chosen=zeros, ref_rejected=zeros, **lengths)
        return OBJECTIVES["re_po"].losses(logps, beta=0.4, reliability=0.8).sum()

    (gradient,) = autodiff.grad(re_po, autodiff.asarray(z))
    p = 1 / (1 + np.exp(-0.4 * z))
    expected = -0.4 * p * (1 - p) * (0.8 - 0.2) / (0.8 * p + 0.2 * (1 - p))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["amapo", "alpha_dpo", "beta_dpo"])
def test_fewer_than_eight_pairs_are_told_of_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_adaptive, "_warned", set())
    few = log_probs({key: column[:7] for key, column in COLUMNS.items()})
    enough = log_probs({key: column[:8] for key, column in COLUMNS.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OBJECTIVES[name].losses(enough)
    with pytest.warns(RuntimeWarning, match=f"objective '{name}' compares .* these are 7, fewer than 8: raise the"):
        OBJECTIVES[name].losses(few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OBJECTIVES[name].losses(few)


def test_the_pairs_of_all_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_adaptive, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_two_ranks("amapo")
    assert not batch_adaptive._warned
