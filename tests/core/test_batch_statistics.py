"""Statistics over the pairs of all ranks, and running ones, against the statistics module and arithmetic by hand."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from frameworks import Library

import gapo
from gapo.objectives import LogProbs
from gapo.pairs import BatchConstants

pytestmark = pytest.mark.filterwarnings("ignore:.*float64.*:UserWarning")

RANKS = [[0.3, -1.2, 2.5], [0.7, 4.0]]  # two ranks of unequal size
JOINED = [x for rank in RANKS for x in rank]


def of(library: Library, margins: list[float], **options: Any) -> LogProbs:
    return LogProbs.of_step((library.asarray(np.array(margins), "float64"),), BatchConstants(), **options)


def on_both_ranks(library: Library, ask: Callable[[LogProbs], Any]) -> list[np.ndarray]:
    """What `ask` gives on each of two threads, which reduce with one another."""
    barrier, table, answers = threading.Barrier(2), {}, {}

    def rank(number: int) -> None:
        def reduce(x: Any, op: str) -> Any:
            table[number] = x
            barrier.wait(30)
            other = table[1 - number]
            barrier.wait(30)
            return x + other if op == "sum" else max(x, other, key=float)

        answers[number] = library.numpy(ask(of(library, RANKS[number], reduce=reduce)))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [answers[0], answers[1]]


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_one_rank(library: Library) -> None:
    logps = of(library, JOINED)
    mean, deviation = statistics.mean(JOINED), statistics.stdev(JOINED)
    close(library.numpy(logps.mean(logps.margins)), mean)
    close(library.numpy(logps.deviation(logps.margins)), deviation)
    close(library.numpy(logps.zscore(logps.margins)), [(x - mean) / deviation for x in JOINED])
    close(library.numpy(logps.pairs_in_batch(logps.margins)), 5)
    weights = [math.exp(x) for x in JOINED]
    expected = [5 * w / sum(weights) for w in weights]
    close(library.numpy(logps.weights_of_mean_one(logps.margins)), expected)
    far = library.numpy(logps.weights_of_mean_one(logps.margins - 1e4))  # each of them underflows
    np.testing.assert_allclose(far, expected, rtol=2e-2)  # a float32 of 1e4 has three digits behind its point


def test_ranks_of_unequal_size_are_one_batch(library: Library) -> None:
    if library.name != "numpy":
        pytest.skip("the sums are the same lines on every library; threads and evaluation do not mix in all")
    mean, deviation = statistics.mean(JOINED), statistics.stdev(JOINED)
    total = sum(math.exp(x) for x in JOINED)
    for number, values in enumerate(RANKS):
        close(on_both_ranks(library, lambda s: s.mean(s.margins))[number], mean)
        close(on_both_ranks(library, lambda s: s.deviation(s.margins))[number], deviation)
        scores = on_both_ranks(library, lambda s: s.zscore(s.margins))[number]
        close(scores, [(x - mean) / deviation for x in values])
        weights = on_both_ranks(library, lambda s: s.weights_of_mean_one(s.margins))[number]
        close(weights, [5 * math.exp(x) / total for x in values])


def test_a_zscore_takes_each_sum_over_the_ranks_once() -> None:
    operations: list[str] = []

    def reduce(x: Any, op: str) -> Any:
        operations.append(op)
        return x

    logps = LogProbs.of_step((np.array(JOINED),), BatchConstants(), reduce=reduce)
    logps.zscore(logps.margins)
    assert sorted(operations) == ["max", "sum", "sum", "sum"]  # the largest; pairs, values, squares


@pytest.mark.parametrize("margins", [[0.4], [0.4, 0.4, 0.4]])
def test_pairs_that_do_not_differ_have_no_deviation(library: Library, margins: list[float]) -> None:
    logps = of(library, margins)
    close(library.numpy(logps.deviation(logps.margins)), 0)
    close(library.numpy(logps.zscore(logps.margins)), np.zeros(len(margins)))


def tracking(logps: LogProbs, *, rate: float = 0.25) -> Any:
    """A user's own: SimPO's margins against their running mean."""
    mean = logps.running("mean", logps.mean(logps.margins), initial=1.0, rate=rate)
    return (2.0 + mean - logps.margins) ** 2


def linear(backend: Library, weights: np.ndarray) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Parameters w of `features @ w` in the backend's own form, and the margin function; the gradient's name is w."""
    if backend.name == "torch":
        from torch import nn

        module = nn.Module()
        module.w = nn.Parameter(backend.asarray(weights, "float64"))
        return module, lambda m, x: x @ m.w
    if backend.name == "mlx":
        from mlx import nn as mlx_nn

        layer = mlx_nn.Module()
        layer.w = backend.asarray(weights, "float64")
        return layer, lambda m, x: x @ m.w
    return {"w": backend.asarray(weights, "float64")}, lambda p, x: x @ p["w"]


def test_running_statistics_go_on_from_step_to_step(backend: Library) -> None:
    features = np.array([[1.0, 0.5], [0.2, -1.0], [0.7, 0.1]])
    weights = np.array([0.3, -0.2])
    margins = [sum(x * w for x, w in zip(row, weights, strict=True)) for row in features]
    params, margin_fn = linear(backend, weights)
    step = gapo.value_and_grad(margin_fn, objective=tracking, backend=backend.name)
    running, before = None, 1.0
    for _ in range(3):
        result, grads = step(params, backend.asarray(features, "float64"), running=running)
        running = result.running
        expected = [-2 * (2 + before - m) / 3 for m in margins]  # the statistic is a constant
        by_weight = [sum(s * row[j] for s, row in zip(expected, features, strict=True)) for j in range(2)]
        np.testing.assert_allclose(backend.numpy(grads["w"]), by_weight, rtol=1e-5)
        before = 0.75 * before + 0.25 * statistics.mean(margins)
        assert float(running["mean"]) == pytest.approx(before, rel=1e-5)


def test_a_second_step_without_them_is_told(caplog: pytest.LogCaptureFixture) -> None:
    step = gapo.value_and_grad(lambda p, x: x @ p["w"], objective=tracking, backend="numpy")
    for _ in range(3):
        step({"w": np.array([0.3])}, np.array([[1.0]]))
    lines = [record.getMessage() for record in caplog.records if "running statistics" in record.getMessage()]
    assert len(lines) == 1
    assert "pass running=result.running" in lines[0]


def test_an_anchor_of_the_batchs_own() -> None:
    """The gradient is that of `gapo.loss` by finite differences, and no other anchor is made."""
    features = np.array([[1.0, 0.5], [0.2, -1.0]])
    anchor = {"anchor_chosen_logps": np.array([-1.0, -1.3]), "anchor_rejected_logps": np.array([-1.4, -1.1])}

    def logps(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return features @ w - 1.0, features @ w[::-1] - 1.5

    step = gapo.value_and_grad(lambda p, batch: logps(p["w"]), gapo.GAPOConfig(rho=0.5), backend="numpy")
    w = np.array([0.3, -0.2])
    result, grads = step({"w": w}, anchor)
    assert result.radius is None
    expected = []
    for j in range(2):
        values = [float(gapo.loss(*logps(w + h * np.eye(2)[j]), *anchor.values())) for h in (1e-5, -1e-5)]
        expected.append((values[0] - values[1]) / 2e-5)
    np.testing.assert_allclose(grads["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(
        result.anchor_gaps, [logps(w)[0][i] - logps(w)[1][i] - g for i, g in enumerate((0.4, -0.2))]
    )
    with pytest.raises(ValueError, match="anchor_chosen_logps alone"):
        step({"w": w}, {"anchor_chosen_logps": anchor["anchor_chosen_logps"]})
