"""Matrix products: `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gapo.backends.torch.pairgrads.parts import Explicit, Outer, Parts, over_tokens
from gapo.backends.torch.pairgrads.rules.registry import owns, register_rule


def _affine(module: Any, a: Any, g: Tensor, transposed: bool) -> Parts:
    if module.weight.requires_grad:
        yield "weight", Outer(a.to(g.dtype), g, transposed)
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
