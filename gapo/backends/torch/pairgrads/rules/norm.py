"""Norms over the last axis: `y = offset + weight * unit(x) (+ bias)`, channel by channel and token by token.

The name of a class does not say how its weight enters. Llama multiplies by it and Gemma by 1 + weight; others may take
its exponential, where no factor is the derivative. So each norm is asked on numbers of its own, once for its code.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.torch.pairgrads.parts import Explicit, Parts
from gapo.backends.torch.pairgrads.rules.registry import Grads, Rule, owns, register_family


def norm(layer: Any, a: Any, g: Tensor) -> Parts:
    """Of a norm that gives its bias alone for a weight of 0: the derivative is what a weight of 1 gives."""
    return _by_channel(layer, a, g, offset=False)


def norm_with_offset(layer: Any, a: Any, g: Tensor) -> Parts:
    """Of a norm such as Gemma's: the derivative is what a weight of 1 gives beyond one of 0."""
    return _by_channel(layer, a, g, offset=True)


def _by_channel(layer: Any, a: Any, g: Tensor, offset: bool) -> Parts:
    axes = layer.weight.shape[:-1]  # Cohere's norm of queries has a weight for each head
    if axes:
        a, g = (x.unflatten(2, (-1, *axes)) for x in (a, g))
    if layer.weight.requires_grad:
        unit = _at(layer, torch.ones_like(layer.weight), a)
        if offset:
            unit = unit - _at(layer, torch.zeros_like(layer.weight), a)
        yield "weight", Explicit((g * unit).sum((0, 2)))
    if _has_bias(layer) and layer.bias.requires_grad:
        yield "bias", Explicit(g.sum((0, 2)))


@torch.no_grad()
def is_affine(layer: Any, a: Tensor, output: Tensor) -> bool | Grads:
    """`norm` or `norm_with_offset`, whichever `layer` is; False where it is neither.

    It is one if its output is affine in its weight: what a drawn weight gives lies on the line through what weights of
    0 and 1 give, and a drawn bias is added.
    """
    half = a.dtype in (torch.float16, torch.bfloat16)
    # What reads other tokens' places as they were gives something else here.
    tokens = a.flatten(0, -1 - layer.weight.ndim)[None]
    again = _computed(layer, {}, tokens).reshape(output.shape)
    if not torch.allclose(again.float(), output.float(), rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-5):
        return False
    wide = tokens.float() if half else tokens  # in 16 bits a derivative of 0.25 cannot be told from 0.231
    weight = layer.weight.detach().to(wide.dtype)
    drawn = 4 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight) - 2
    zero, unit = (_at(layer, w, wide) for w in (torch.zeros_like(weight), torch.ones_like(weight)))
    bias = {"bias": drawn.flip(-1)} if _has_bias(layer) else {}
    other = _computed(layer, {"weight": drawn, **bias}, wide)
    expected = zero + drawn * (unit - zero) + bias.get("bias", 0)
    if not bool(((other - expected).norm() <= 1e-4 * expected.norm()).logical_and(expected.isfinite().all())):
        return False
    ramp = torch.linspace(1, 2, a.shape[-1], dtype=wide.dtype, device=a.device)  # a row of `a` may be all zeros
    return (
        norm_with_offset if bool(_at(layer, torch.zeros_like(weight), ramp.expand(1, 1, *weight.shape)).any()) else norm
    )


def _at(layer: Any, weight: Tensor, a: Tensor) -> Tensor:
    """What `layer` makes of `a` with this weight, and a bias of 0."""
    weight = weight.detach()
    return _computed(layer, {"weight": weight, **({"bias": torch.zeros_like(weight)} if _has_bias(layer) else {})}, a)


def _computed(layer: nn.Module, parameters: dict[str, Tensor], a: Tensor) -> Tensor:
    """What `layer` makes of `a` with these parameters, without its hooks."""
    other = copy.copy(layer)
    other.__dict__["_parameters"] = {**layer._parameters, **parameters}
    output: Tensor = type(layer).forward(other, a)
    return output


def _has_bias(layer: Any) -> bool:
    return isinstance(getattr(layer, "bias", None), Tensor)


def _belongs(layer: Any) -> bool:
    if type(layer) is nn.LayerNorm:
        return len(layer.normalized_shape) == 1 and {"weight"} <= owns(layer)
    name, own = type(layer).__name__, owns(layer)
    if name.endswith("LayerNorm1P"):  # Nemotron's
        return {"weight"} <= own <= {"weight", "bias"} and layer.weight.ndim == 1
    if isinstance(layer, nn.RMSNorm):
        return name.endswith("RMSNorm") and own == {"weight"} and layer.weight.ndim == 1
    return name.endswith(("RMSNorm", "LayerNorm")) and own == {"weight"} and layer.weight.ndim in (1, 2)


register_family(_belongs, Rule(norm, confirms=is_affine))
