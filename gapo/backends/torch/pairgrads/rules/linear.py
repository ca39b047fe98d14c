"""Matrix products: `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gapo.backends.torch.pairgrads.parts import Explicit, Outer, Part, Parts, over_tokens
from gapo.backends.torch.pairgrads.rules.registry import owns, register_rule


def _matrix(a: Tensor, g: Tensor, transposed: bool) -> Part:
    """The gradient of a matrix product: N explicit ones, or A and G kept.

    R rows of A and G take `4 R in out` flops and twice the reading of `R (in + out)` numbers for probe and update; N
    gradients take `2 R in out + 4 N in out` flops, and are `N in out` numbers, written once and read twice. So where
    they are fewer numbers they cost less in flops, in bytes moved and in bytes kept; where they are more, the flops
    that they save are paid with memory, which is what runs out first.
    """
    a = a.to(g.dtype)
    groups, inputs, outputs = a.shape[1], a.shape[-1], g.shape[-1]
    if groups * inputs * outputs > a.numel() + g.numel():
        return Outer(a, g, transposed)
    left, right = (a, g) if transposed else (g, a)
    grads = torch.bmm(left[0].mT, right[0])
    for block in range(1, a.shape[0]):
        grads.baddbmm_(left[block].mT, right[block])
    return Explicit(grads)


def _affine(module: Any, a: Any, g: Tensor, transposed: bool) -> Parts:
    if module.weight.requires_grad:
        yield "weight", _matrix(a, g, transposed)
    if isinstance(module.bias, Tensor) and module.bias.requires_grad:
        yield "bias", Explicit(over_tokens(g))


def linear(module: nn.Module, a: Any, g: Tensor) -> Parts:
    """`y = W x + b`."""
    return _affine(module, a, g, transposed=False)


def conv1d(module: nn.Module, a: Any, g: Tensor) -> Parts:
    """`y = W^T x + b`."""
    return _affine(module, a, g, transposed=True)


def _plain(layer: nn.Module) -> bool:
    return {"weight"} <= owns(layer) <= {"weight", "bias"}  # old weight norms and pruning hold it under other names


register_rule(nn.Linear, linear, fits=_plain)
register_rule(NonDynamicallyQuantizableLinear, linear, fits=_plain)
register_rule("transformers.models.falcon.modeling_falcon.FalconLinear", linear, fits=_plain)
register_rule("transformers.pytorch_utils.Conv1D", conv1d, fits=lambda layer: owns(layer) == {"weight", "bias"})
