"""`perturb` as a mask: the perturbation and its gaps, against PyTorch's autograd and a delta that is masked by hand."""

from __future__ import annotations

import re
from typing import Any

import hf_models
import models
import numpy as np
import pytest
import torch
from features import PARAMS, batch_of, margin_fn, sides
from frameworks import Library, require

import gapo
from gapo.adapters.hf.margins import pair_logps
from gapo.mask import Mask

RHO = 0.4
UP = np.array([1, 0, 1, 1])
MASKS = {"up": UP, "^lm_": np.ones(1, dtype=bool)}  # by its name, and by a pattern
BY_NAME = {"up": UP, "lm_head": np.ones(4)}


def by_hand(adaptive: bool) -> dict[str, Any]:
    """Both kinds of gaps, the norm of the masked gradient, and the moved weights."""
    theta = {name: torch.tensor(x, requires_grad=True) for name, x in PARAMS.items()}
    chosen, rejected = sides(theta)
    margins = chosen - rejected
    probe = torch.log(1 + torch.exp(0.25 - 2.5 * margins)).mean()
    whole = dict(zip(theta, torch.autograd.grad(probe, list(theta.values()), retain_graph=True), strict=True))
    g = {name: whole[name] * torch.tensor(mask) for name, mask in BY_NAME.items()}
    scale = {name: theta[name].detach().abs() if adaptive else torch.ones_like(g[name]) for name in g}
    norm = torch.sqrt(sum((scale[name] * g[name]).square().sum() for name in g))
    delta = {name: RHO * scale[name] ** 2 * g[name] / norm for name in g}
    there = sides({name: x.detach() + delta.get(name, 0) for name, x in theta.items()})
    rows = [torch.autograd.grad(m, [theta[name] for name in g], retain_graph=True) for m in margins]
    along = [sum((row * delta[name]).sum() for row, name in zip(grads, g, strict=True)) for grads in rows]
    return {
        "exact": (margins - (there[0] - there[1])).detach().numpy(),
        "first_order": -torch.stack(along).numpy(),
        "grad_norm": float(torch.sqrt(sum(x.square().sum() for x in g.values()))),
    }


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
@pytest.mark.filterwarnings("ignore:first_order_ratio")  # so large a radius is far from linear
def test_only_masked_entries_move(backend: Library, anchor: str, adaptive: bool) -> None:
    config = gapo.GAPOConfig(rho=RHO, perturb=MASKS, anchor=anchor, adaptive=adaptive)
    step = gapo.value_and_grad(margin_fn(backend), config, backend=backend.name)
    result, _ = step(models.to_backend(backend, PARAMS, "float64"), batch_of(backend))
    wanted = by_hand(adaptive)
    tolerance = {"mlx": 1e-5, "numpy": 1e-8}.get(backend.name, 1e-9)
    np.testing.assert_allclose(backend.numpy(result.anchor_gaps), wanted[anchor], rtol=tolerance, atol=tolerance)
    assert float(result.grad_norm) == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert float(result.radius) == pytest.approx(RHO, rel=1e-5)
    assert float(result.changed_fraction) == pytest.approx(1.0)


def test_a_gaussian_direction_is_masked_too(backend: Library) -> None:
    moved = []

    def watched(params: Any, batch: Any) -> Any:
        moved.append({name: backend.numpy(x).copy() for name, x in models.flat(backend, params).items()})
        return margin_fn(backend)(params, batch)

    if backend.name in ("jax", "mlx"):
        pytest.skip("weights are traced there; the direction is masked in one place for all")
    config = gapo.GAPOConfig(rho=RHO, perturb=MASKS, direction="gaussian", anchor="exact")
    step = gapo.value_and_grad(watched, config, backend=backend.name)
    step(models.to_backend(backend, PARAMS, "float64"), batch_of(backend), rng=models.generator(backend, 0))
    changed = next(x for x in moved if (x["up"] != PARAMS["up"]).sum() > 1)  # NumPy differentiates entry by entry
    np.testing.assert_array_equal(changed["up"] != PARAMS["up"], UP == 1)
    assert (changed["lm_head"] != PARAMS["lm_head"]).all()
    assert (changed["down"] == PARAMS["down"]).all()


def test_a_mask_of_ones_is_no_mask(backend: Library) -> None:
    results = {}
    for name, perturb in (("ones", {".": backend.asarray(np.ones(()))}), ("all", "all")):
        config = gapo.GAPOConfig(rho=0.1, perturb=perturb)
        step = gapo.value_and_grad(margin_fn(backend), config, backend=backend.name)
        results[name] = step(models.to_backend(backend, PARAMS, "float64"), batch_of(backend))[0]
    for figure in ("anchor_gaps", "radius", "changed_fraction", "grad_norm"):
        ones, whole = (backend.numpy(getattr(results[name], figure)) for name in ("ones", "all"))
        np.testing.assert_array_equal(ones, whole)


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_the_one_pass_step_takes_masks(anchor: str) -> None:
    """Columns of down_proj, as ShaPO moves them; with last_layers, which leaves one of two masks without parameters."""
    torch.manual_seed(0)
    masks = {
        f"layers.{i}.mlp.down_proj": (torch.rand(hf_models.make("llama").config.intermediate_size) < 0.3)
        for i in (0, 1)
    }
    results = []
    for one_pass in (True, False):
        model, batch = hf_models.make("llama"), hf_models.batch()
        config = gapo.GAPOConfig(rho=0.5, perturb=masks, anchor=anchor, last_layers=1)
        step = gapo.value_and_grad(pair_logps, config, backend="torch", one_pass=one_pass)
        results.append(step(model, batch))
    (fast, fast_grads), (slow, slow_grads) = results
    torch.testing.assert_close(fast.anchor_gaps, slow.anchor_gaps, rtol=1e-4, atol=1e-6)
    assert float(slow.anchor_gaps.abs().max()) > 1e-4
    for name, g in slow_grads.items():
        torch.testing.assert_close(fast_grads[name], g, rtol=1e-3, atol=1e-5)


def test_a_compiled_step_takes_masks() -> None:
    jax, library = require("jax"), models.BACKENDS["jax"]
    step = gapo.value_and_grad(margin_fn(library), gapo.GAPOConfig(rho=RHO, perturb=MASKS), backend="jax")
    result, _ = jax.jit(step)(models.to_backend(library, PARAMS, "float64"), batch_of(library))
    np.testing.assert_allclose(result.anchor_gaps, by_hand(True)["exact"], rtol=1e-6)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "perturb must hold a mask for at least one parameter"),
        (
            {"up": [1, 0, 1, 1]},
            "the mask of 'up' must be an array of 0 and 1, got list: a YAML file and a command line",
        ),
        ({"up": np.array([1, 0, 2, 1])}, "the mask of 'up' must hold 0 and 1 alone"),
        ({"up": np.array([1.0, np.nan, 1.0, 1.0])}, "the mask of 'up' must hold 0 and 1 alone"),
        ({"up": np.zeros(4)}, "the mask of 'up' selects nothing"),
        ({"(": np.ones(4)}, "perturb maps names or regular expressions to masks; got the key '('"),
        ({3: np.ones(4)}, "perturb maps names or regular expressions to masks; got the key 3"),
    ],
    ids=str,
)
def test_a_wrong_mask_is_refused_when_it_is_given(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gapo.GAPOConfig(perturb=masks)


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"sideways": np.ones(4)}, ValueError, "a mask for 'sideways', and no trainable parameter has this name"),
        ({"up": np.ones(4), "u": np.ones(4)}, ValueError, "two masks for 'up', by 'up' and 'u': give one"),
        ({"up": np.ones(3)}, ValueError, "has shape (3,), and cannot be broadcast to 'up' of shape (4,)"),
        ({"up": np.ones((1, 4))}, ValueError, "has shape (1, 4), and cannot be broadcast"),
    ],
    ids=str,
)
def test_a_mask_that_fits_no_parameter_is_refused(
    backend: Library, masks: Any, error: type[Exception], message: str
) -> None:
    step = gapo.value_and_grad(margin_fn(backend), gapo.GAPOConfig(perturb=masks), backend=backend.name)
    with pytest.raises(error, match=re.escape(message)):
        step(models.to_backend(backend, PARAMS, "float64"), batch_of(backend))


def test_of_another_library_it_is_refused() -> None:
    require("jax")
    library = models.BACKENDS["jax"]
    config = gapo.GAPOConfig(perturb={"up": torch.ones(4)})
    with pytest.raises(TypeError, match="the mask of 'up' is an array of torch, and the parameters are of jax"):
        gapo.value_and_grad(margin_fn(library), config, backend="jax")(
            models.to_backend(library, PARAMS, "float64"), batch_of(library)
        )


def test_settings_with_a_mask_can_be_copied_and_described() -> None:
    config = gapo.GAPOConfig(perturb=MASKS)
    assert isinstance(config.perturb, Mask)
    assert gapo.GAPOConfig(**vars(config)) == config
    assert gapo.config.plain(config)["perturb"] == "Mask(up: 0.75 of its entries, ^lm_: 1 of its entries)"
