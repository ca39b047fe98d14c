"""`target_gap`: the spread that the gaps end up with, against NumPy's own, and the radius, by which it is reached."""

from __future__ import annotations

import logging
import threading
from typing import Any

import models
import numpy as np
import pytest
from frameworks import LIBRARIES, Library, require

import gapo
from gapo.backends.numpy import NumpyBackend
from gapo.radius import secant_factor
from gapo.step import run

TARGET = 0.3


def take_step(backend: Library, batch: dict[str, np.ndarray], seed: int = 5, **options: Any) -> dict[str, Any]:
    config = gapo.GAPOConfig(**{"target_gap": TARGET, **options})
    step = gapo.value_and_grad(models.make_margin_fn(backend), config, backend=backend.name)
    params = models.to_backend(backend, models.make_params(layers=1, seed=seed), "float64")
    result, _ = step(params, batch, rng=models.generator(backend, 0))
    return {name: None if x is None else backend.numpy(x) for name, x in vars(result).items()}


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "direction": "gaussian"}], ids=str)
def test_first_order_reaches_the_target(backend: Library, options: dict[str, Any]) -> None:
    batch = models.make_batch(pairs=6, seed=10)
    found = take_step(backend, batch, anchor="first_order", **options)
    tolerance = 1e-4 if backend.name == "mlx" else 1e-6
    assert np.std(found["anchor_gaps"]) == pytest.approx(TARGET, rel=tolerance)
    assert found["rho"] == pytest.approx(found["radius"], rel=1e-4)
    # The same radius, set by hand, makes the same gaps: another way through the step.
    by_hand = take_step(backend, batch, anchor="first_order", target_gap=None, rho=float(found["rho"]), **options)
    np.testing.assert_allclose(found["anchor_gaps"], by_hand["anchor_gaps"], rtol=1e-3, atol=1e-5)
    assert by_hand["rho"] == pytest.approx(found["rho"])


def test_one_secant_step_brings_the_exact_gaps_there(backend: Library) -> None:
    batch = models.make_batch(pairs=6, seed=10)
    found = take_step(backend, batch, anchor="exact")
    first = take_step(backend, batch, anchor="first_order")
    alone = take_step(backend, batch, anchor="exact", target_gap=None, rho=float(first["rho"]))
    off, left = (abs(np.std(x["anchor_gaps"]) / TARGET - 1) for x in (alone, found))
    assert off > 0.05 > 0.02 > left, (off, left)
    assert found["radius"] == pytest.approx(found["rho"], rel=1e-4)
    by_hand = take_step(backend, batch, anchor="exact", target_gap=None, rho=float(found["rho"]))
    np.testing.assert_allclose(found["anchor_gaps"], by_hand["anchor_gaps"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["weights"], by_hand["weights"], rtol=1e-3)


@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.1])
def test_the_secant_step_solves_curves_of_both_kinds(ratio: float) -> None:
    x = float(secant_factor(np.asarray(ratio), np))
    excess = ratio - 1
    # At radius x, with first order's radius and the target as units of both axes.
    spread = x / (1 - excess / ratio * x) if ratio < 1 else x + excess * x * x
    assert spread == pytest.approx(1)


@pytest.mark.parametrize(("ratio", "factor"), [(0.0, 4.0), (0.3, 4.0), (1e9, 0.25)])
def test_a_secant_step_is_bounded(ratio: float, factor: float) -> None:
    assert float(secant_factor(np.asarray(ratio), np)) == pytest.approx(factor)


class Ranks(NumpyBackend):
    """One of several ranks, which are threads: reduces by what all of them put on the table."""

    def __init__(self, table: dict[int, Any], rank: int, barrier: threading.Barrier) -> None:
        self._table, self._rank, self._barrier = table, rank, barrier

    def all_reduce(self, x: np.ndarray, op: str) -> np.ndarray:
        self._table[self._rank] = x
        self._barrier.wait(60)
        reduced = {"sum": np.sum, "mean": np.mean, "max": np.max}[op](np.stack(list(self._table.values())), axis=0)
        self._barrier.wait(60)
        return reduced


@pytest.mark.parametrize("anchor", ["first_order", "exact"])
def test_ranks_share_one_radius_whatever_their_numbers_of_pairs(anchor: str) -> None:
    library = LIBRARIES["numpy"]
    params, config = models.make_params(layers=1, seed=5), gapo.GAPOConfig(target_gap=TARGET, anchor=anchor)
    barrier, table, results = threading.Barrier(2), {}, {}

    def rank(number: int) -> None:
        backend = Ranks(table, number, barrier)
        batch = models.make_batch(pairs=(2, 3)[number], seed=10 + number)
        forward = backend.forward(models.make_margin_fn(library), params, batch, config)
        results[number] = run(forward, config, backend)[0]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert float(results[0].rho) == float(results[1].rho) > 0
    gaps = np.concatenate([results[0].anchor_gaps, results[1].anchor_gaps])
    tolerance = 1e-9 if anchor == "first_order" else 0.03  # one secant step leaves a few percent
    assert gaps.std() == pytest.approx(TARGET, rel=tolerance)
    assert abs(results[0].anchor_gaps.std() / TARGET - 1) > 0.05  # no rank's own spread


@pytest.mark.parametrize(
    ("kind", "anchor"), [("one pair", "exact"), ("answers alike", "exact"), ("one pair twice", "first_order")]
)
def test_gaps_that_do_not_spread_leave_the_weights_alone(
    backend: Library, caplog: pytest.LogCaptureFixture, kind: str, anchor: str
) -> None:
    batch = models.make_batch(pairs=1 if kind != "answers alike" else 3, seed=10)
    if kind == "one pair twice":
        batch = {name: np.concatenate([x, x]) for name, x in batch.items()}
    if kind == "answers alike":
        batch |= {name.replace("chosen", "rejected"): x for name, x in batch.items() if name.startswith("chosen")}
    with caplog.at_level(logging.WARNING, "gapo.rounding"):
        found = take_step(backend, batch, anchor=anchor)
    lines = [r.getMessage() for r in caplog.records if "target_gap=0.3 cannot be reached" in r.getMessage()]
    assert len(lines) == 1
    assert found["rho"] == found["radius"] == 0
    np.testing.assert_array_equal(found["anchor_gaps"], 0)
    np.testing.assert_allclose(found["weights"], 2.5 / (1 + np.exp(-0.25)), rtol=1e-5)


@pytest.mark.parametrize("anchor", ["first_order", "exact"])
def test_a_compiled_step_finds_the_same_radius(anchor: str) -> None:
    jax = require("jax")
    library, batch = LIBRARIES["jax"], models.make_batch(pairs=6, seed=10)
    params = models.to_backend(library, models.make_params(layers=1, seed=5), "float64")
    config = gapo.GAPOConfig(target_gap=TARGET, anchor=anchor)
    step = gapo.value_and_grad(models.make_margin_fn(library), config, backend="jax")
    found, _ = jax.jit(lambda p: step(p, batch))(params)
    assert float(found.rho) == pytest.approx(take_step(library, batch, anchor=anchor)["rho"], rel=1e-6)


@pytest.mark.parametrize("value", [0.0, -0.1, float("inf"), float("nan"), "0.3", True])
def test_a_target_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="target_gap must be a finite number > 0"):
        gapo.GAPOConfig(target_gap=value)


def test_a_target_and_a_radius_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"target_gap=0\.3 sets the radius itself, and rho=0\.5 was given too"):
        gapo.GAPOConfig(target_gap=0.3, rho=0.5)
