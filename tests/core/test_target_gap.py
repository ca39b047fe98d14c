"""`target_gap`: the spread that the gaps end up with, against NumPy's own, and the radius, by which it is reached."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import models
import numpy as np
import pytest
from frameworks import Library, require

import gapo
from gapo.backends.numpy import NumpyBackend
from gapo.radius import Spread, secant_factor
from gapo.step import run

TARGET = 0.3


def take_step(backend: Library, batch: dict[str, np.ndarray], seed: int = 1, **options: Any) -> dict[str, Any]:
    config = gapo.GAPOConfig(**{"target_gap": TARGET, **options})
    step = gapo.value_and_grad(models.make_margin_fn(backend), config, backend=backend.name)
    params = models.to_backend(backend, models.make_params(layers=1, seed=seed), "float64")
    result, _ = step(params, batch, rng=models.generator(backend, 0))
    return {name: None if x is None else backend.numpy(x) for name, x in vars(result).items()}


@pytest.mark.parametrize(
    "options", [{}, {"adaptive": False}, {"direction": "gaussian"}, {"probe": "margin", "perturb": "all"}], ids=str
)
def test_first_order_reaches_the_target(backend: Library, options: dict[str, Any]) -> None:
    batch = models.make_batch(pairs=4, seed=5)
    found = take_step(backend, batch, anchor="first_order", **options)
    tolerance = 1e-4 if backend.name == "mlx" else 1e-6
    assert np.std(found["anchor_gaps"], ddof=1) == pytest.approx(TARGET, rel=tolerance)
    assert found["rho"] == pytest.approx(found["radius"], rel=1e-4)
    # The same radius, set by hand, makes the same gaps: another way through the step.
    by_hand = take_step(backend, batch, anchor="first_order", target_gap=None, rho=float(found["rho"]), **options)
    np.testing.assert_allclose(found["anchor_gaps"], by_hand["anchor_gaps"], rtol=1e-3, atol=1e-5)
    assert by_hand["rho"] == pytest.approx(found["rho"])


def test_one_secant_step_brings_the_exact_gaps_there(backend: Library) -> None:
    batch = models.make_batch(pairs=4, seed=5)
    found = take_step(backend, batch, anchor="exact")
    first = take_step(backend, batch, anchor="first_order")
    alone = take_step(backend, batch, anchor="exact", target_gap=None, rho=float(first["rho"]))
    off, left = (abs(np.std(x["anchor_gaps"], ddof=1) / TARGET - 1) for x in (alone, found))
    assert off > 0.05 > 0.02 > left, (off, left)
    assert found["radius"] == pytest.approx(found["rho"], rel=1e-4)
    by_hand = take_step(backend, batch, anchor="exact", target_gap=None, rho=float(found["rho"]))
    np.testing.assert_allclose(found["anchor_gaps"], by_hand["anchor_gaps"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["weights"], by_hand["weights"], rtol=1e-3)
