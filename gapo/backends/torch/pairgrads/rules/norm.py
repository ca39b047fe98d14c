"""Norms over the last axis: `y = offset + weight * unit(x) (+ bias)`, channel by channel and token by token.

The name of a class does not say how its weight enters. Llama multiplies by it and Gemma by 1 + weight; others may take
its exponential, where no factor is the derivative. So each norm is asked on numbers of its own, once for its code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.torch.pairgrads.parts import Explicit, Parts, over_tokens
from gapo.backends.torch.pairgrads.rules.registry import Grads, Rule, owns, register_family


def norm(layer: Any, a: Any, g: Tensor) -> Parts:
    """Of a norm that gives its bias alone for a weight of 0: the derivative is what a weight of 1 gives."""
    return _by_channel(layer, a, g, lambda x: _weighing(layer, 1, x))


def norm_of_one_more(layer: Any, a: Any, g: Tensor) -> Parts:
    """Of a norm by 1 + weight, such as Gemma's: the derivative is what a weight of 0 gives."""
    return _by_channel(layer, a, g, lambda x: _weighing(layer, 0, x))


def norm_with_offset(layer: Any, a: Any, g: Tensor) -> Parts:
    """Of any other affine norm: the derivative is what a weight of 1 gives beyond one of 0."""
    return _by_channel(layer, a, g, lambda x: _weighing(layer, 1, x) - _weighing(layer, 0, x))


def _by_channel(layer: Any, a: Any, g: Tensor, unit: Callable[[Tensor], Tensor]) -> Parts:
    if heads := layer.weight.shape[:-1]:  # Cohere's norm of queries has weights for each head
        g = g.unflatten(2, (-1, *heads))
        a = None if a is None else a.unflatten(2, (-1, *heads))
    if layer.weight.requires_grad:
        yield "weight", Explicit(over_tokens(g * unit(a)))
    if _has_bias(layer) and layer.bias.requires_grad:
        yield "bias", Explicit(over_tokens(g))


@torch.no_grad()
def is_affine(layer: Any, a: Tensor, output: Tensor) -> bool | Grads:
    """The one of this file's rules that `layer` follows; False where it follows none.

    It follows one if its output is affine in its weight: what a drawn weight gives lies on the line through what
    weights of 0 and 1 give. A drawn bias must be added as it is.
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
    bias = {"bias": drawn.flip(-1)} if _has_bias(layer) else {}
    zero, unit = (_weighing(layer, value, wide, wide.dtype) for value in (0, 1))
    other = _computed(layer, {"weight": drawn, **bias}, wide)
    expected = zero + drawn * (unit - zero) + bias.get("bias", 0)
    if not bool(((other - expected).norm() <= 1e-4 * expected.norm()).logical_and(expected.isfinite().all())):
        return False
    ramp = torch.linspace(1, 2, a.shape[-1], dtype=wide.dtype, device=a.device)  # a row of `a` may be all zeros
    first, second = (_weighing(layer, value, ramp.expand(1, 1, *weight.shape), wide.dtype) for value in (0, 1))
    if not bool(first.any()):
        return norm
    # Both on the ramp, where nothing is 0, and on what the layer received.
    twice = torch.allclose(second, 2 * first) and torch.allclose(unit, 2 * zero, atol=1e-5)
    return norm_of_one_more if twice else norm_with_offset


def _weighing(layer: Any, value: float, a: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What `layer` makes of `a` with weights of this value and biases of 0."""
    weight = torch.full_like(layer.weight.detach(), value, dtype=dtype)
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
