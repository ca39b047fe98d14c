"""`update="anchor"`: the gradient at theta + delta, against autograd at weights that are moved here, by hand.

The right gradients are PyTorch's, of each objective's loss written out in its formula, as a function of leaves that
start at theta + delta. The gap is a constant there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import numpy as np
import pytest
import torch
from features import FEATURES, LENGTHS, PARAMS, REFERENCE, Sides, batch_of, margin_fn, sides
from frameworks import Library

import gapo
from gapo.objectives import LogProbs

RHO, BETA, GAMMA = 0.4, 2.0, 0.3
SELECTED = ["up", "down"]  # all but the head


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.log(1 + torch.exp(x))


def dpo(logps: Sides, beta: float = 0.1) -> torch.Tensor:
    chosen, rejected = (x * torch.tensor(n) for x, n in zip(logps, LENGTHS.values(), strict=True))
    reference = torch.tensor(REFERENCE["ref_chosen_logps"] - REFERENCE["ref_rejected_logps"])
    return softplus(-beta * (chosen - rejected - reference))


def of_gap(gaps: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(BETA * gaps - GAMMA))


def capped_squares(logps: LogProbs) -> Any:
    """A user's own objective, of what it can ask about the anchor: where the pair's margin is there, and its gap."""
    return (1.0 - logps.margins) ** 2 * (1 + logps.anchor_margins**2) + (logps.anchor_gaps - 0.5) ** 2


capped_squares.needs_anchor = True  # type: ignore[attr-defined]

# Objective: (loss of each pair, of the sides where the gradient is taken and the gap; loss reported, of the policy's).
Loss = Callable[[Sides, torch.Tensor, torch.Tensor], torch.Tensor]
LOSSES: dict[str, tuple[Any, Loss]] = {
    "gapo": (
        "gapo",
        lambda at, gaps, there: softplus(GAMMA - BETA * (gaps + (at[0] - at[1]) - (at[0] - at[1]).detach())),
    ),
    "simpo": ("simpo", lambda at, gaps, there: softplus(GAMMA - BETA * (at[0] - at[1]))),
    "dpo": ("dpo", lambda at, gaps, there: dpo(at)),
    "gapo+dpo": ("gapo+dpo", lambda at, gaps, there: of_gap(gaps) / of_gap(gaps).mean() * dpo(at)),
    "own": (
        capped_squares,
        lambda at, gaps, there: (
            (1.0 - (at[0] - at[1])) ** 2 * (1 + there**2)
            + (gaps + (at[0] - at[1]) - (at[0] - at[1]).detach() - 0.5) ** 2
        ),
    ),
}


def expected(loss_of: Loss, *, adaptive: bool = True, sft_weight: float = 0.0) -> dict[str, Any]:
    """A step at theta + delta, delta of the SimPO probe over all but the head."""
    theta = {name: torch.tensor(x, requires_grad=True) for name, x in PARAMS.items()}
    clean = sides(theta)
    probe = softplus(GAMMA - BETA * (clean[0] - clean[1])).mean()
    g = dict(zip(SELECTED, torch.autograd.grad(probe, [theta[n] for n in SELECTED]), strict=True))
    scale = {n: theta[n].detach().abs() if adaptive else torch.ones_like(g[n]) for n in SELECTED}
    norm = torch.sqrt(sum((scale[n] * g[n]).square().sum() for n in SELECTED))
    delta = {n: RHO * scale[n] ** 2 * g[n] / norm for n in SELECTED}
    moved = {n: (x.detach() + delta.get(n, 0)).requires_grad_() for n, x in theta.items()}
    there = sides(moved)
    clean = tuple(x.detach() for x in clean)  # type: ignore[assignment]
    anchor_margins = (there[0] - there[1]).detach()
    gaps = clean[0] - clean[1] - anchor_margins
    loss = (loss_of(there, gaps, anchor_margins) - sft_weight * there[0]).mean()
    *grads, slopes = torch.autograd.grad(loss, [*moved.values(), there[1]])
    reported = (loss_of(clean, gaps, anchor_margins) - sft_weight * clean[0]).mean()  # type: ignore[arg-type]
    return {
        "grads": {n: x.numpy() for n, x in zip(moved, grads, strict=True)},
        "loss": reported.numpy(),
        "margins": (clean[0] - clean[1]).numpy(),
        "chosen_logps": clean[0].numpy(),
        "anchor_margins": anchor_margins.numpy(),
        "anchor_gaps": gaps.numpy(),
        "weights": len(gaps) * slopes.numpy(),
    }


def step_of(backend: Library, objective: Any, **options: Any) -> Callable[..., Any]:
    config = gapo.GAPOConfig(**{"rho": RHO, "beta": BETA, "gamma": GAMMA, "anchor": "exact", **options})
    return gapo.value_and_grad(margin_fn(backend), config, objective, backend=backend.name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LOSSES),
        ("gapo", {"adaptive": False, "sft_weight": 0.7}),
        ("dpo", {"adaptive": False, "sft_weight": 0.7}),
    ],
)
@pytest.mark.filterwarnings("ignore:first_order_ratio")  # so large a radius is far from linear
def test_the_gradient_is_that_at_moved_weights(backend: Library, name: str, options: dict[str, Any]) -> None:
    objective, loss_of = LOSSES[name]
    wanted = expected(loss_of, **options)
    params = models.to_backend(backend, PARAMS, "float64")
    result, grads = step_of(backend, objective, update="anchor", **options)(params, batch_of(backend))
    tolerance = {"mlx": 2e-5, "numpy": 1e-7}.get(backend.name, 1e-9)
    for parameter, gradient in models.flat_grads(backend, grads).items():
        np.testing.assert_allclose(
            gradient, wanted["grads"][parameter], rtol=tolerance, atol=tolerance, err_msg=parameter
        )
    for figure in ("loss", "margins", "chosen_logps", "anchor_margins", "anchor_gaps", "weights"):
        value = backend.numpy(getattr(result, figure))
        np.testing.assert_allclose(value, wanted[figure], rtol=tolerance, atol=tolerance, err_msg=figure)
    assert float(result.radius) == pytest.approx(RHO, rel=1e-4)
    for parameter, x in models.flat(backend, params).items():
        np.testing.assert_array_equal(backend.numpy(x), PARAMS[parameter])


@pytest.mark.parametrize("objective", ["gapo", "dpo"])
def test_without_a_radius_it_is_the_policys_update(backend: Library, objective: str) -> None:
    results = {}
    for update in ("policy", "anchor"):
        params = models.to_backend(backend, PARAMS, "float64")
        step = step_of(backend, objective, update=update, rho=0.0)
        results[update] = models.flat_grads(backend, step(params, batch_of(backend))[1])
    for name, gradient in results["policy"].items():
        np.testing.assert_array_equal(results["anchor"][name], gradient)


def test_of_a_vanishing_radius_it_is_nearly_so(backend: Library) -> None:
    """Another way to the same: here the anchor is taken, and lies where the policy is."""
    grads = {}
    for update in ("policy", "anchor"):
        params = models.to_backend(backend, PARAMS, "float64")
        grads[update] = step_of(backend, "dpo", update=update, rho=1e-5)(params, batch_of(backend))[1]
    for name, gradient in models.flat_grads(backend, grads["policy"]).items():
        near = models.flat_grads(backend, grads["anchor"])[name]
        np.testing.assert_allclose(near, gradient, rtol=1e-3, atol=1e-5)
        assert not np.array_equal(near, gradient)


def test_a_radius_found_for_a_target_gap_is_taken_for_the_update_too(backend: Library) -> None:
    found, by_hand = {}, {}
    for options, into in (({"target_gap": 1.0, "rho": gapo.GAPOConfig.rho}, found), ({}, by_hand)):
        options = options or {"rho": float(found["result"].rho)}
        params = models.to_backend(backend, PARAMS, "float64")
        result, grads = step_of(backend, "gapo", update="anchor", **options)(params, batch_of(backend))
        into |= {"result": result, "grads": models.flat_grads(backend, grads)}
    assert float(found["result"].rho) > 0.05
    for name, gradient in by_hand["grads"].items():
        np.testing.assert_allclose(found["grads"][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["gapo", "dpo"])
def test_a_forward_that_fails_at_the_anchor_leaves_the_weights(backend: Library, objective: str) -> None:
    params = models.to_backend(backend, PARAMS, "float64")
    before = {name: backend.numpy(x).copy() for name, x in models.flat(backend, params).items()}

    def fails(moved: Any, batch: Any) -> Any:
        outputs = margin_fn(backend)(moved, batch)
        up = backend.numpy(models.flat(backend, moved)["up"]) if backend.name != "jax" else outputs[0]
        if backend.name == "jax" or not np.allclose(up, before["up"], rtol=1e-3):
            calls.append(1)
        if len(calls) > (1 if backend.name == "jax" else 0):  # JAX's weights are constants: its second run is moved
            raise RuntimeError("at the anchor")
        return outputs

    calls: list[int] = []
    config = gapo.GAPOConfig(rho=RHO, update="anchor", anchor="exact")
    with pytest.raises(RuntimeError, match="at the anchor"):
        gapo.value_and_grad(fails, config, objective, backend=backend.name)(params, batch_of(backend))
    for name, x in models.flat(backend, params).items():
        np.testing.assert_array_equal(backend.numpy(x), before[name])


def test_running_statistics_are_of_the_policy(backend: Library) -> None:
    running = {}
    for update in ("policy", "anchor"):
        params = models.to_backend(backend, PARAMS, "float64")
        running[update] = step_of(backend, "re_po", update=update)(params, batch_of(backend))[0].running
    assert running["policy"].keys() == running["anchor"].keys() != set()
    for name, value in running["policy"].items():
        assert float(running["anchor"][name]) == pytest.approx(float(value), rel=1e-6)


def bends(logps: LogProbs) -> Any:
    """Finite at the policy, and infinite where the margin falls, as it does at the anchor."""
    falls = logps.xp.astype(logps.margins < BEND[0], logps.margins.dtype)
    return logps.margins - falls * logps.margins / (0 * falls)


BEND = [0.0]


def test_a_loss_that_is_infinite_at_the_anchor_alone_is_no_silent_gradient() -> None:
    margins = expected(LOSSES["simpo"][1])["margins"]
    batch = {name: torch.tensor(x[:1]) for name, x in {**FEATURES}.items()}
    BEND[0] = float(margins[0]) - 1e-3
    torch_library = models.BACKENDS["torch"]
    step = step_of(torch_library, bends, update="anchor")
    with pytest.raises(FloatingPointError, match="loss of objective 'bends' at the anchor is"):
        step(models.to_backend(torch_library, PARAMS, "float64"), batch)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"update='anchor' takes a gradient at theta .* set anchor='exact' or 'auto'"):
        gapo.GAPOConfig(update="anchor", anchor="first_order")
    library = models.BACKENDS["torch"]
    params = models.to_backend(library, PARAMS, "bfloat16")
    batch = {name: torch.tensor(x, dtype=torch.bfloat16) for name, x in FEATURES.items()}
    with pytest.raises(ValueError, match=r"which is rounded here: weights that move have 16 bits. Keep weights and"):
        step_of(library, "simpo", update="anchor", anchor="auto")(params, batch)
    own = {f"anchor_{side}_logps": torch.zeros(3) for side in FEATURES}
    with pytest.raises(ValueError, match="the batch brings its own anchor"):
        step_of(library, "gapo", update="anchor")(params, {**batch, **own})


@pytest.mark.filterwarnings("error")
def test_rounded_weights_are_told_with_what_helps_here() -> None:
    library = models.BACKENDS["torch"]
    params = models.to_backend(library, PARAMS, "bfloat16")
    batch = {name: torch.tensor(x, dtype=torch.bfloat16) for name, x in FEATURES.items()}
    with pytest.raises(RuntimeWarning, match=r"16-bit weights .* since update='anchor' needs theta"):
        step_of(library, "simpo", update="anchor", rho=0.02)(params, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "anchor"}, "update='anchor' is not supported on"),
        ({"perturb": {"up": np.ones(4)}}, "perturb with masks is"),
    ],
    ids=str,
)
def test_shards_are_refused(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str) -> None:
    monkeypatch.setattr("gapo.backends.torch.backend.fsdp_units", lambda module: [module])
    library = models.BACKENDS["torch"]
    with pytest.raises(ValueError, match=f"{message}.* sharded parameters"):
        step_of(library, "gapo", **options)(models.to_backend(library, PARAMS, "float64"), batch_of(library))
