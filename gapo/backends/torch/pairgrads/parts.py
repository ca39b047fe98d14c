"""The gradients of every group by one parameter, as one layer contributes them: what a rule makes.

Each part is a way to hold N gradients without writing more numbers than needed. Both questions that are asked of it
are linear in the gradients: a weighted sum over groups, and an inner product with a direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Part(Protocol):
    """The gradient of every group's output by one parameter theta, explicit or implied."""

    def weighted(self, weights: Tensor) -> Tensor:
        """`sum_i weights[i] * grad_i`, shape of theta; `weights` (N,)."""

    def along(self, delta: Tensor) -> Tensor:
        """`<grad_i, delta>`, (N,); `delta` has the shape of theta."""


@dataclass
class Explicit:
    """(N, *theta.shape) numbers: cheapest where a group has more tokens than theta has rows and columns."""

    grads: Tensor

    def weighted(self, weights: Tensor) -> Tensor:
        return torch.tensordot(weights.to(self.grads.dtype), self.grads, dims=1)

    def along(self, delta: Tensor) -> Tensor:
        return self.grads.flatten(1).to(delta.dtype) @ delta.flatten()


@dataclass
class Outer:
    """A (blocks, N, tokens, in) and G (blocks, N, tokens, out) of theta (out, in), or (in, out) if transposed.

    `grad_i = sum_t G[i, t] A[i, t]^T` is not formed: its product with delta is that of `A delta^T` with G.
    """

    a: Tensor
    g: Tensor
    transposed: bool

    def smaller(self) -> Part:
        """The form of fewer numbers: this one, or N explicit gradients.

        R rows of A and G take `4 R in out` flops and twice the reading of `R (in + out)` numbers for probe and update;
        N gradients take `2 R in out + 4 N in out` flops, and are `N in out` numbers, written once and read twice. So
        where they are fewer numbers they cost less in flops, in bytes moved and in bytes kept; where they are more, the
        flops that they save are paid with memory, which is what runs out first.
        """
        groups, inputs, outputs = self.a.shape[1], self.a.shape[-1], self.g.shape[-1]
        if groups * inputs * outputs > self.a.numel() + self.g.numel():
            return self
        left, right = (self.a, self.g) if self.transposed else (self.g, self.a)
        grads = torch.bmm(left[0].mT, right[0])
        for block in range(1, self.a.shape[0]):
            grads.baddbmm_(left[block].mT, right[block])
        return Explicit(grads)

    def weighted(self, weights: Tensor) -> Tensor:
        a, g, scale = self.a, self.g, weights.to(self.g.dtype)[None, :, None, None]
        a, g = (a * scale, g) if a.shape[-1] < g.shape[-1] else (a, g * scale)
        left, right = (a, g) if self.transposed else (g, a)
        return left.flatten(0, 2).T @ right.flatten(0, 2)

    def along(self, delta: Tensor) -> Tensor:
        moved = self.a @ (delta if self.transposed else delta.T).to(self.a.dtype)
        return (moved.to(delta.dtype) * self.g.to(delta.dtype)).sum((2, 3)).sum(0)


@dataclass
class Lookup:
    """Ids (blocks, N, tokens) and G (blocks, N, tokens, width) of a table (entries, width)."""

    ids: Tensor
    g: Tensor
    shape: torch.Size

    def weighted(self, weights: Tensor) -> Tensor:
        g = self.g * weights.to(self.g.dtype)[None, :, None, None]
        return g.new_zeros(self.shape).index_add_(0, self.ids.flatten(), g.flatten(0, 2))

    def along(self, delta: Tensor) -> Tensor:
        return (delta[self.ids] * self.g.to(delta.dtype)).sum((2, 3)).sum(0)


Parts = Iterator[tuple[str, Part]]


def over_tokens(x: Tensor) -> Tensor:
    """(blocks, N, tokens, ...) summed over blocks and tokens: (N, ...)."""
    return x.sum(2).sum(0)  # on a CPU, PyTorch takes ten times as long for both at once
