"""What one call of a layer adds to the gradients of a parameter by group: sums weighted by group, products by group.

Arrays have the batch's rows first: A is what the layer received, G the derivative of the outputs by what it returned.
Row r belongs to group r mod `groups`.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, Protocol

import mlx.core as mx


class Contribution(Protocol):
    def weighted(self, w: mx.array) -> mx.array:
        """`sum_i w[i] grad_i`, of the parameter's shape."""

    def along(self, delta: mx.array) -> mx.array:
        """`<grad_i, delta>` for each group i, (groups,), in float32 or wider."""

    def arrays(self) -> list[mx.array]:
        """What it consists of."""


class Explicit(NamedTuple):
    """The gradient of each group, (groups, *shape)."""

    grads: mx.array

    def weighted(self, w: mx.array) -> mx.array:
        return (w @ self.grads.reshape(self.grads.shape[0], -1)).reshape(self.grads.shape[1:])

    def along(self, delta: mx.array) -> mx.array:
        flat = self.grads.reshape(self.grads.shape[0], -1).astype(delta.dtype)
        return flat @ delta.reshape(-1)

    def arrays(self) -> list[mx.array]:
        return [self.grads]


class Owners(NamedTuple):
    """Which group owns each entry of an array's first axis.

    Attributes:
        groups: how many groups there are.
        rows: the row of each entry; None where the first axis is the rows.
    """

    groups: int
    rows: mx.array | None = None

    def scaled(self, g: mx.array, w: mx.array) -> mx.array:
        """`g` with each entry times the weight of its group; rounded once where `g` has 16 bits and `w` more."""
        owners = mx.arange(g.shape[0]) if self.rows is None else self.rows
        factors = w[owners % self.groups]
        return (g * factors.reshape(-1, *(1 for _ in g.shape[1:]))).astype(g.dtype)

    def summed(self, x: mx.array) -> mx.array:
        """The sum of each group's entries, (groups,)."""
        by_entry = mx.sum(x.reshape(x.shape[0], -1), axis=1)
        if self.rows is None:
            return mx.sum(by_entry.reshape(-1, self.groups), axis=0)
        return mx.zeros((self.groups,), x.dtype).at[self.rows % self.groups].add(by_entry)


class Outer(NamedTuple):
    """A matrix whose gradient is `left^T right`, summed over the tokens of a group: (rows, tokens, width) each."""

    left: mx.array
    right: mx.array
    owners: Owners

    def weighted(self, w: mx.array) -> mx.array:
        return _flat(self.owners.scaled(self.left, w)).T @ _flat(self.right)

    def along(self, delta: mx.array) -> mx.array:
        if self.left.shape[-1] > self.right.shape[-1]:  # the product of the smaller width
            return self.owners.summed((self.left @ delta) * self.right)
        return self.owners.summed((self.right @ delta.T) * self.left)

    def arrays(self) -> list[mx.array]:
        return [self.left, self.right]


class Lookup(NamedTuple):
    """A table whose rows `ids` were looked up: ids (rows, ...), g (rows, ..., width)."""

    ids: mx.array
    g: mx.array
    owners: Owners
    shape: tuple[int, ...]

    def weighted(self, w: mx.array) -> mx.array:
        return mx.zeros(self.shape, self.g.dtype).at[self.ids].add(self.owners.scaled(self.g, w))

    def along(self, delta: mx.array) -> mx.array:
        return self.owners.summed(delta[self.ids] * self.g)

    def arrays(self) -> list[mx.array]:
        return [self.g]


class Experts(NamedTuple):
    """Matrices (experts, out, in), of which `indices` choose one for each entry: y = a W[indices]^T."""

    a: mx.array
    g: mx.array
    indices: mx.array
    is_sorted: bool
    owners: Owners
    shape: tuple[int, ...]

    def _product(self, matrices: mx.array) -> mx.array:
        transposed = matrices.swapaxes(-1, -2)
        return mx.gather_mm(self.a, transposed, rhs_indices=self.indices, sorted_indices=self.is_sorted)

    def weighted(self, w: mx.array) -> mx.array:
        at_zero = mx.zeros(self.shape, self.a.dtype)  # the product is linear in the matrices
        _, (grads,) = mx.vjp(self._product, [at_zero], [self.owners.scaled(self.g, w)])
        return grads

    def along(self, delta: mx.array) -> mx.array:
        a, dtype = self.a, delta.dtype
        return self.owners.summed(self._replace(a=a.astype(dtype))._product(delta) * self.g)

    def arrays(self) -> list[mx.array]:
        return [self.a, self.g]


def matrix(left: mx.array, right: mx.array, groups: int) -> Contribution:
    """The contribution `left^T right`, in whichever form has fewer numbers."""
    left, right = _rows(left), _rows(right)
    if groups * left.shape[-1] * right.shape[-1] > left.size + right.size:
        return Outer(left, right, Owners(groups))
    grads: Any = None  # a group's rows stand `groups` apart: a block of rows is one product for each group
    for start in range(0, left.shape[0], groups):
        block = slice(start, start + groups)
        product = left[block].swapaxes(1, 2) @ right[block]
        grads = product if grads is None else grads + product
    return Explicit(grads)


def vector(g: mx.array, groups: int) -> Explicit:
    """The contribution of what was added to, or multiplied into, every token: g (rows, ..., width), summed."""
    by_row = mx.sum(_rows(g), axis=1)
    return Explicit(mx.sum(by_row.reshape(-1, groups, by_row.shape[-1]), axis=0))


def _rows(x: mx.array) -> mx.array:
    """(rows, ..., width) as (rows, tokens, width)."""
    return x.reshape(x.shape[0], prod(x.shape[1:-1]), x.shape[-1])


def _flat(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])
