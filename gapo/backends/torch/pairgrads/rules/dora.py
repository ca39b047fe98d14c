"""DoRA's magnitudes, of peft: `y = (m / |W + B A|) * (W x + B A x) - W x`, added to the `W x` that the layer had.

The norm is detached, so y is linear in m, channel by channel. Its derivative needs `W x`, which the call hands over,
and `B A x`, of which `A x` is kept: few numbers for each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gapo.backends.torch.pairgrads.parts import Explicit, Parts, over_tokens
from gapo.backends.torch.pairgrads.rules.library import agrees
from gapo.backends.torch.pairgrads.rules.registry import owns, register_rule


def magnitude(layer: Any, read: tuple[Tensor, ...], g: Tensor) -> Parts:
    """`read`: see `_reads`."""
    yield "weight", Explicit(over_tokens(g * _unit(*read).reshape(g.shape)))


def _unit(base: Tensor, low: Tensor, up: Tensor, shift: Tensor, norm: Tensor) -> Tensor:
    """What a magnitude of 1 would give, beside W x."""
    return (base + (low @ up.T + shift)) / norm


@torch.no_grad()
def _reads(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    return _factors(layer, *args, **kwargs)


def _factors(
    layer: Any,
    x: Tensor,
    *,
    lora_A: Any,
    lora_B: Any,
    scaling: float,
    base_layer: Any,
    base_result: Tensor | None = None,
    adapter_name: str = "default",
) -> tuple[Tensor, ...]:
    """W x; A x; B and its bias, times the scaling; and the norms of W + B A."""
    from peft.utils.integrations import dequantize_module_weight
    from peft.utils.other import transpose

    weight = dequantize_module_weight(base_layer).to(x.dtype)
    if base_result is None:  # behind dropout
        base = torch.nn.functional.linear(x, transpose(weight, layer.fan_in_fan_out))
    else:
        base = base_result if base_layer.bias is None else base_result - base_layer.bias
    both = layer.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name).to(x.dtype)
    norm = layer.get_weight_norm(weight=weight, lora_weight=both, scaling=scaling, adapter_name=adapter_name)
    shift = torch.zeros_like(norm) if lora_B.bias is None else lora_B.bias * scaling
    return base, lora_A(x), lora_B.weight * scaling, shift, norm


@torch.no_grad()
def _is_linear(layer: Any, read: tuple[Tensor, ...], output: Tensor) -> bool:
    expected = layer.weight * _unit(*read) - read[0]
    return agrees(expected, output, output.norm() + read[0].norm())


register_rule(
    "peft.tuners.lora.dora.DoraLinearLayer",
    magnitude,
    fits=lambda layer: owns(layer) == {"weight"} and hasattr(layer, "get_lora_weight"),  # not before PEFT 0.19
    reads=_reads,
    confirms=_is_linear,
)
