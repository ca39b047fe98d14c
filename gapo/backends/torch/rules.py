"""Gradients pair by pair, from what a layer received (A) and the gradient of what it gave (G).

Pairs do not interact in the forward pass, so a layer's gradient is a sum over pairs of parts that only A and G of that
pair's rows enter. A rule says, for one type of layer, what those parts are.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Whether a norm gives something for a weight of 0, asked once: on a GPU each look waits for the work before it.
_offsets: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


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
Rule = Callable[[nn.Module, Tensor, Tensor], Parts]


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


def _affine(module: Any, a: Tensor, g: Tensor, transposed: bool) -> Parts:
    if module.weight.requires_grad:
        yield "weight", _matrix(a, g, transposed)
    if isinstance(module.bias, Tensor) and module.bias.requires_grad:
        yield "bias", Explicit(g.sum((0, 2)))


def _linear(module: nn.Module, a: Tensor, g: Tensor) -> Parts:
    return _affine(module, a, g, transposed=False)


def _conv1d(module: nn.Module, a: Tensor, g: Tensor) -> Parts:
    return _affine(module, a, g, transposed=True)


def _embedding(module: Any, a: Tensor, g: Tensor) -> Parts:
    if module.padding_idx is not None:
        g = g * (a != module.padding_idx)
    yield "weight", Looked(a[..., 0], g, module.weight.shape)


def _norm(module: Any, a: Tensor, g: Tensor) -> Parts:
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


def rule_for(module: Any) -> Rule | None:
    """The rule for `module`'s own parameters, or None. Subclasses that compute something else have none."""
    kind, name = type(module), type(module).__name__
    if kind is nn.Linear or name == "NonDynamicallyQuantizableLinear":
        return _linear
    if kind is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq and not module.sparse:
        return _embedding
    if name == "Conv1D" and set(dict(module.named_parameters(recurse=False))) == {"weight", "bias"}:
        return _conv1d
    own = set(dict(module.named_parameters(recurse=False)))
    if kind is nn.LayerNorm and len(module.normalized_shape) == 1 and own <= {"weight", "bias"}:
        return _norm
    if name.endswith("RMSNorm") and own == {"weight"} and module.weight.ndim == 1:
        return _norm
    return None
