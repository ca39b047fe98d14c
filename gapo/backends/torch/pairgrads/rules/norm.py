"""Norms over the last axis, which are asked how their weight enters."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.torch.pairgrads.parts import Explicit, Parts
from gapo.backends.torch.pairgrads.rules.registry import Rule, owns, register_family

# What was asked of a norm, once, since on a GPU each look waits for the work before it: whether it gives something for
# a weight of 0; whether it is affine in its weight, and of which code that was found.
_offsets: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_affine_norms: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()


def norm(module: Any, a: Any, g: Tensor) -> Parts:
    # Linear in its weight, or, as Gemma's, in 1 + weight: the derivative is what a weight of 1 gives beyond one of 0.
    if module.weight.requires_grad:
        weight = module.weight.detach()
        bias = {"bias": torch.zeros_like(weight)} if isinstance(getattr(module, "bias", None), Tensor) else {}
        unit = _computed(module, {"weight": torch.ones_like(weight), **bias}, a)
        zero = {"weight": torch.zeros_like(weight), **bias}
        if module not in _offsets:
            ramp = torch.linspace(1, 2, a.shape[-1], dtype=a.dtype, device=a.device)  # a row of a may be all zeros
            _offsets[module] = bool(_computed(module, zero, ramp[None, None, None]).any())
        if _offsets[module]:
            unit = unit - _computed(module, zero, a)
        yield "weight", Explicit((g * unit).sum((0, 2)))
    if isinstance(getattr(module, "bias", None), Tensor) and module.bias.requires_grad:
        yield "bias", Explicit(g.sum((0, 2)))


def _computed(module: nn.Module, parameters: dict[str, Tensor], a: Tensor) -> Tensor:
    """What `module` makes of `a` with these parameters, without its hooks."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = {**module._parameters, **parameters}
    output: Tensor = type(module).forward(other, a)
    return output


def is_affine(module: Any, a: Tensor, output: Tensor) -> bool:
    """Whether a norm is what its rule takes it for, asked once for each: its output is an offset plus the weight times
    what does not depend on it, channel by channel and token by token. True for layers of other rules.
    """
    if not module.weight.requires_grad:
        return True
    key = (type(module), type(module).forward, module.training)
    kept, affine = _affine_norms.get(module, (None, False))
    if kept != key:
        affine = _asked(module, a.detach(), output.detach())
        _affine_norms[module] = key, affine
        _offsets.pop(module, None)
    return affine


@torch.no_grad()
def _asked(module: Any, a: Tensor, output: Tensor) -> bool:
    half = a.dtype in (torch.float16, torch.bfloat16)
    tokens = a.flatten(1, -2)  # what reads other tokens' places as they were gives something else here
    again = _computed(module, {}, tokens).reshape(output.shape)
    if not torch.allclose(again.float(), output.float(), rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-5):
        return False
    wide = tokens.float() if half else tokens
    weight = module.weight.detach().to(wide.dtype)
    bias = {"bias": torch.zeros_like(weight)} if isinstance(getattr(module, "bias", None), Tensor) else {}
    drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    zero, one, other = (
        _computed(module, {"weight": w, **bias}, wide)
        for w in (torch.zeros_like(weight), torch.ones_like(weight), 4 * drawn - 2)
    )
    meant = zero + (4 * drawn - 2) * (one - zero)
    return bool(((other - meant).norm() <= 1e-4 * meant.norm()).logical_and(meant.isfinite().all()))


def _belongs(layer: Any) -> bool:
    if type(layer) is nn.LayerNorm:
        return len(layer.normalized_shape) == 1 and {"weight"} <= owns(layer)
    named = type(layer).__name__.endswith("RMSNorm")
    return named and owns(layer) == {"weight"} and layer.weight.ndim == 1


register_family(_belongs, Rule(norm, confirms=is_affine))
