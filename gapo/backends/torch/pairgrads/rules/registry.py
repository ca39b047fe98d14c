"""Gradients pair by pair, from what a layer received (A) and the gradient of what it gave (G).

Pairs do not interact in the forward pass, so a layer's gradient is a sum over pairs of parts that only A and G of that
pair's rows enter. A rule says, for one type of layer, what those parts are.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# What was asked of a norm, once, since on a GPU each look waits for the work before it: whether it gives something for
# a weight of 0; whether it is affine in its weight, and of which code that was found.
_offsets: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_affine_norms: weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]] = weakref.WeakKeyDictionary()


class PairGrads(Protocol):
    """The gradient of every pair's margin by one parameter, theta, explicit or implied."""

    def weighted(self, weights: Tensor) -> Tensor:
        """`sum_i weights[i] * grad M_i`, shape of theta; `weights` (N,)."""

    def along(self, delta: Tensor) -> Tensor:
        """`<grad M_i, delta>`, (N,)."""


@dataclass
class Explicit:
    """(N, *theta.shape) numbers: cheapest where a pair has more tokens than theta has rows and columns."""

    grads: Tensor

    def weighted(self, weights: Tensor) -> Tensor:
        return torch.tensordot(weights.to(self.grads.dtype), self.grads, dims=1)

    def along(self, delta: Tensor) -> Tensor:
        return self.grads.flatten(1).to(delta.dtype) @ delta.flatten()


@dataclass
class Outer:
    """A (blocks, N, tokens, in) and G (blocks, N, tokens, out) of theta (out, in), or (in, out) if transposed."""

    a: Tensor
    g: Tensor
    transposed: bool

    def weighted(self, weights: Tensor) -> Tensor:
        g = self.g * weights.to(self.g.dtype)[None, :, None, None]
        left, right = (self.a, g) if self.transposed else (g, self.a)
        return left.flatten(0, 2).T @ right.flatten(0, 2)

    def along(self, delta: Tensor) -> Tensor:
        moved = self.a @ (delta if self.transposed else delta.T).to(self.a.dtype)
        return (moved.to(delta.dtype) * self.g.to(delta.dtype)).sum((0, 2, 3))


@dataclass
class Looked:
    """Token ids (blocks, N, tokens) and G (blocks, N, tokens, width) of an embedding (vocab, width)."""

    ids: Tensor
    g: Tensor
    shape: torch.Size

    def weighted(self, weights: Tensor) -> Tensor:
        g = self.g * weights.to(self.g.dtype)[None, :, None, None]
        return g.new_zeros(self.shape).index_add_(0, self.ids.flatten(), g.flatten(0, 2))

    def along(self, delta: Tensor) -> Tensor:
        return (delta[self.ids] * self.g.to(delta.dtype)).sum((0, 2, 3))


Parts = Iterator[tuple[str, PairGrads]]
# A rule: (module, A (blocks, N, tokens, in), G (blocks, N, tokens, out)) -> the parts of each of its own parameters.
# A is None where only a bias is trained.
Rule = Callable[[nn.Module, Any, Tensor], Parts]


def _matrix(a: Tensor, g: Tensor, transposed: bool) -> PairGrads:
    """The gradient of a matrix product: per pair, or A and G kept.

    R rows of A and G take `4 R in out` flops and twice the reading of `R (in + out)` numbers for probe and update; N
    gradients take `2 R in out + 4 N in out` flops, and are `N in out` numbers, written once and read twice. So where
    they are fewer numbers they cost less in flops, in bytes moved and in bytes kept; where they are more, the flops
    that they save are paid with memory, which is what runs out first.
    """
    a = a.to(g.dtype)
    pairs, (inputs, outputs) = a.shape[1], (a.shape[-1], g.shape[-1])
    if pairs * inputs * outputs > a.numel() + g.numel():
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
        yield "bias", Explicit(g.sum((0, 2)))


def _linear(module: nn.Module, a: Any, g: Tensor) -> Parts:
    return _affine(module, a, g, transposed=False)


def _conv1d(module: nn.Module, a: Any, g: Tensor) -> Parts:
    return _affine(module, a, g, transposed=True)


def _embedding(module: Any, a: Tensor, g: Tensor) -> Parts:
    if module.padding_idx is not None:
        g = g * (a != module.padding_idx)
    yield "weight", Looked(a[..., 0], g, module.weight.shape)


def _norm(module: Any, a: Any, g: Tensor) -> Parts:
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
    if rule_for(module) is not _norm or not module.weight.requires_grad:
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


def unfit(module: nn.Module) -> str | None:
    """What in `module` no rule can stand for, or changes gradients and rows unseen by rules; None without."""
    without = {type(m).__name__ for m in module.modules() if trained(m) and rule_for(m) is None}
    if without:
        return f"no rule for layers of type {', '.join(sorted(without))}"
    hooks = torch_module._global_forward_hooks.values()  # PyTorch's own, its counters of flops, change nothing
    if any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks):
        return "a forward hook of all modules may change what layers give"
    for m in module.modules():
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
            return f"{type(m).__name__} mixes the rows of a batch"
        for part, p in trained(m).items():
            if p._backward_hooks:
                return f"the {part} of a {type(m).__name__} has a gradient hook"
            if hasattr(p, "full_tensor"):
                return f"the {part} of a {type(m).__name__} is a shard"
    return None


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of `module` itself that are trained."""
    return {part: p for part, p in module._parameters.items() if p is not None and p.requires_grad}


def rule_for(module: Any) -> Rule | None:
    """The rule for `module`'s own parameters, or None. What computes something else than its class is known for, such
    as a subclass or an instance with a `forward` of its own, has none.
    """
    kind, name = type(module), type(module).__name__
    own = {part for part, p in module._parameters.items() if p is not None}
    if "forward" in vars(module) or not {"weight"} <= own <= {"weight", "bias"}:
        return None  # old weight norms and pruning hold the weight under other names
    known = kind.forward.__module__ == kind.__module__
    if known and kind in (nn.Linear, NonDynamicallyQuantizableLinear):
        return _linear
    if known and kind is nn.Embedding and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return _embedding
    if known and own == {"weight", "bias"} and kind is getattr(_transformers(), "Conv1D", None):
        return _conv1d
    if kind is nn.LayerNorm and len(module.normalized_shape) == 1:
        return _norm
    if name.endswith("RMSNorm") and own == {"weight"} and module.weight.ndim == 1:
        return _norm
    return None


def _transformers() -> Any:
    """The module of GPT-2's `Conv1D`; not loaded: no model has one."""
    return sys.modules.get("transformers.pytorch_utils")
