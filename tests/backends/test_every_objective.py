"""One step for every objective: its gradients and figures are those of the objective's public function of arrays.

The parameters are the log-probabilities themselves, so that a gradient shows the derivative by each of them.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from frameworks import LIBRARIES, Library

import gapo
from gapo import objectives

N = 4
RNG = np.random.default_rng(0)
LOGPS = {"chosen": RNG.normal(size=N) - 1.5, "rejected": RNG.normal(size=N) - 2.0}
BATCH = {f"{side}_lengths": RNG.integers(2, 9, N) for side in LOGPS}
BATCH |= {f"ref_{side}_logps": BATCH[f"{side}_lengths"] * (x + 0.3 * RNG.normal(size=N)) for side, x in LOGPS.items()}
CONFIG = gapo.GAPOConfig(rho=0.4, beta=1.5, gamma=0.3, anchor="exact")
LENGTHS = [jnp.asarray(BATCH[f"{side}_lengths"]) for side in LOGPS]


def objective_of(name: str) -> Any:
    """An objective by its name, or one of a user's own."""
    return {"own": own, "own with anchor": own_with_anchor}.get(name, name)


def own(logps: objectives.LogProbs) -> Any:
    return (1.0 - logps.margins) ** 2 + 0.1 * logps.chosen


def own_with_anchor(logps: objectives.LogProbs) -> Any:
    return (0.5 - logps.anchor_gaps) ** 2 * (1.0 + logps.z**2)


own_with_anchor.needs_anchor = True  # type: ignore[attr-defined]


def probe(averages: Any) -> Any:
    return objectives.simpo(*averages, beta=CONFIG.beta, gamma=CONFIG.gamma)


def expected_loss(name: str, averages: Any, anchor: Any) -> Any:
    """The mean loss by the public functions of arrays, on length-normalised log-probabilities (chosen, rejected)."""
    chosen, rejected = averages
    margins, gaps = chosen - rejected, (chosen - rejected) - (anchor[0] - anchor[1])
    sums = [x * n for x, n in zip(averages, LENGTHS, strict=True)]
    references = [jnp.asarray(BATCH[f"ref_{side}_logps"]) for side in LOGPS]
    if name == "own":
        return jnp.mean((1.0 - margins) ** 2 + 0.1 * sums[0])
    if name == "own with anchor":
        z = sums[0] - sums[1] - references[0] + references[1]
        return jnp.mean((0.5 - gaps) ** 2 * (1.0 + z**2))
    if name == "gapo":
        return gapo.loss(*averages, *anchor, beta=CONFIG.beta, gamma=CONFIG.gamma)
    if name == "simpo":
        return probe(averages)
    entry = objectives.OBJECTIVES[name]
    if entry.average:
        references = [x / n for x, n in zip(references, LENGTHS, strict=True)]
    arrays = [*(averages if entry.average else sums), *(references if entry.needs_reference else [])]
    if entry.needs_anchor:
        arrays += anchor if entry.average else [x * n for x, n in zip(anchor, LENGTHS, strict=True)]
    settings = {name: getattr(CONFIG, name) for name in entry.step_settings}
    function = getattr(objectives, name)
    counts = {f"{side}_lengths": n for side, n in zip(LOGPS, LENGTHS, strict=True)}
    counts = {x: counts[x] for x in inspect.signature(function).parameters if x in counts}
    return function(*arrays, **counts, **settings)


def moved(averages: Any) -> Any:
    """The anchor's log-probabilities: theta + rho theta^2 g / ||theta g||, method document, step 3."""
    g = jax.grad(probe)(averages)
    norm = jnp.sqrt(sum(jnp.sum((x * y) ** 2) for x, y in zip(averages, g, strict=True)))
    return [x + CONFIG.rho * x**2 * y / norm for x, y in zip(averages, g, strict=True)]


def margin_fn(library: Library) -> Any:
    return lambda params, batch: tuple(1.0 * models.flat(library, params)[side] for side in LOGPS)


NAMES = [name for name in objectives.OBJECTIVES if "+" not in name] + ["own", "own with anchor"]


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:first_order_ratio")  # a radius of 0.4 on eight numbers is far from linear
def test_gradients_are_those_of_the_public_function(backend: Library, name: str, sft_weight: float) -> None:
    averages = [jnp.asarray(x) for x in LOGPS.values()]
    anchor = moved(averages)

    def loss_of(averages: Any) -> Any:
        return expected_loss(name, averages, anchor) - sft_weight * jnp.mean(averages[0])

    loss, expected = jax.value_and_grad(loss_of)(averages)
    config = gapo.GAPOConfig(**{**vars(CONFIG), "sft_weight": sft_weight})
    step = gapo.value_and_grad(margin_fn(backend), config, objective_of(name), backend=backend.name)
    result, grads = step(models.to_backend(backend, LOGPS, "float64"), BATCH)
    rtol = {"mlx": 1e-5, "numpy": 1e-8}.get(backend.name, 1e-9)  # MLX: exp in float32; NumPy: central differences
    for side, gradient in zip(LOGPS, expected, strict=True):
        np.testing.assert_allclose(
            models.flat_grads(backend, grads)[side], gradient, rtol=rtol, atol=rtol, err_msg=side
        )
    np.testing.assert_allclose(backend.numpy(result.loss), loss, rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(backend.numpy(result.weights), N * np.asarray(expected[1]), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(backend.numpy(result.margins), averages[0] - averages[1], rtol=rtol)
    anchored = name == "own with anchor" or (name in NAMES[:-2] and objectives.OBJECTIVES[name].needs_anchor)
    assert (result.anchor_gaps is not None, result.radius is not None) == (anchored, anchored)
    if anchored:
        gaps = averages[0] - averages[1] - (anchor[0] - anchor[1])
        np.testing.assert_allclose(backend.numpy(result.anchor_gaps), gaps, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", ["gapo", "simpo", "dpo"])
@pytest.mark.filterwarnings("ignore:first_order_ratio")
def test_a_result_leaves_jit_with_fields_that_are_none(name: str) -> None:
    library = LIBRARIES["jax"]
    params = models.to_backend(library, LOGPS, "float64")
    step = gapo.value_and_grad(margin_fn(library), CONFIG, name, backend="jax")
    eager, jitted = step(params, BATCH)[0], jax.jit(step)(params, BATCH)[0]
    assert isinstance(jitted, gapo.StepResult)
    assert (jitted.anchor_gaps is None) == (name != "gapo")
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
