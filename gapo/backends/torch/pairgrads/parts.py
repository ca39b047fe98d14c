"""The gradients of every pair by one parameter, explicit or implied: what a rule makes of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
