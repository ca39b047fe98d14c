"""Gradients of every group from one evaluation of a pullback: weighted sums of them, and products along a direction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

from gapo.backends.jaxrows.cost import peak, products_after
from gapo.backends.jaxrows.evaluation import cuts_of, run_after, run_before
from gapo.backends.jaxrows.labels import Labels, Mixes
from gapo.backends.jaxrows.program import program_of
from gapo.backends.jaxrows.split import Cut, Split, split

# What is behind sums over groups is computed for each weighting: at most this share of what is computed once.
BEHIND = 0.1
# Memory that is held, against that of the pullback as it stands.
MEMORY = 1.2
# Terms of a sum over groups that are written out; the others are added in a loop.
UNROLLED = 8


class GroupGradients:
    """The gradients of G outputs, one for each group of a batch, by any number of arrays.

    The pullback is evaluated once, with cotangents `seeds`. Whatever else is asked only sums over groups.

    Args:
        pullback: from cotangents to gradients, linear, as traced from what `jax.vjp` returns. Within a trace its
            constants may be tracers.
        seeds: cotangents. Their entries with the same label belong to one group.
        labels: of each seed's entries, 0 to G - 1.

    Raises:
        Mixes: the groups are not independent, or it cannot be seen that they are, so that much would be computed
            again for each weighting. The message says why.
    """

    def __init__(self, pullback: ClosedJaxpr, seeds: Sequence[Array], labels: Sequence[Labels]) -> None:
        groups = 1 + max(int(x.max()) for x in labels)
        try:
            self._split = split(program_of(pullback), list(labels), groups)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # of another version of JAX
            raise Mixes(f"its jaxpr cannot be read: {error!r}") from error
        _require_worth(self._split)
        self._values, self._saved = run_before(self._split, dict(zip(self._split.program.inputs, seeds, strict=True)))
        self._cuts = list(cuts_of(self._split))

    def weighted(self, weights: Array) -> list[Array]:
        """`sum_g weights[g] * grad_g`, for weights (G,), like the gradients."""
        return self._after([_scaled(cut, x, weights) for cut, x in zip(self._cuts, self._saved, strict=True)])

    def along(self, direction: Sequence[Array]) -> Array:
        """`<grad_g, direction>` for every group, (G,), float32 or wider; `direction` is like the gradients."""
        sums = [_scaled(cut, x, None) for cut, x in zip(self._cuts, self._saved, strict=True)]
        _, transpose = jax.vjp(self._after, sums)
        (along,) = transpose(list(direction))
        groups = self._split.groups
        return sum(
            (_products(cut, x, y, groups) for cut, x, y in zip(self._cuts, self._saved, along, strict=True)),
            start=jnp.zeros(groups, jnp.float32),
        )

    def _after(self, sums: Sequence[Array]) -> list[Array]:
        read = run_after(self._split, self._values, sums, {})
        return [read(cell) for cell in self._split.program.results]


def _require_worth(reading: Split) -> None:
    once, behind = products_after(reading)
    if sum(behind.values()) > BEHIND * once:
        raise Mixes(max(behind, key=lambda cause: behind[cause]))
    plain, held = peak(reading.program), peak(reading.program, reading)
    if held > MEMORY * plain:
        raise Mixes(
            f"it would hold about {held / plain:.1f} times the memory, as where layers are rematerialised and all of "
            "their weights train"
        )


def _scaled(cut: Cut, x: Array, weights: Array | None) -> Array:
    """The cut's array for cotangents `weights`; in a scan it has axes of steps in front. None stands for ones."""
    if cut.operation is None:
        return x if weights is None else x * weights[np.maximum(cut.labels, 0)].astype(x.dtype)
    axis = _group_axis(cut, x)
    weights = jnp.ones(x.shape[axis]) if weights is None else weights[cut.first : cut.first + x.shape[axis]]
    return _weighted_sum(x, weights, axis)


@partial(jax.jit, static_argnums=2)  # traced once for each shape
def _weighted_sum(x: Array, weights: Array, axis: int) -> Array:
    """`sum_i weights[i] x[i]` over an axis of `x`, in float32 or wider, in the dtype of `x`.

    The terms of a few groups are written out, of which the compiler makes one loop. A product of the vector and a
    matrix would copy or widen the matrix, rounds the weights on some accelerators, and takes longer to compile.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    weights = weights.astype(wide)

    def term(i: Any) -> Array:
        take = jax.lax.index_in_dim if isinstance(i, int) else jax.lax.dynamic_index_in_dim
        return take(weights, i, keepdims=False) * take(x, i, axis, keepdims=False).astype(wide)

    n = x.shape[axis]
    total = reduce(jax.lax.add, map(term, range(min(n, UNROLLED))))
    if n > UNROLLED:
        total = jax.lax.fori_loop(UNROLLED, n, lambda i, total: total + term(i), total)
    return total.astype(x.dtype)


def _group_axis(cut: Cut, x: Array) -> int:
    return x.ndim - len(cut.cell.shape) - 1


def _products(cut: Cut, x: Array, y: Array, groups: int) -> Array:
    """`<x, y>` by group, (groups,)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, y = x.astype(wide), y.astype(wide)
    if cut.operation is not None:
        axis = _group_axis(cut, x)
        products = (x * jnp.expand_dims(y, axis)).sum([i for i in range(x.ndim) if i != axis])
        return jnp.pad(products, (cut.first, groups - cut.first - len(products)))
    labels = cut.labels.reshape((1,) * (x.ndim - cut.labels.ndim) + cut.labels.shape)
    products = (x * y).sum([axis for axis, n in enumerate(labels.shape) if n == 1])
    by_label = labels.reshape(-1, 1) == np.arange(groups)
    return products.reshape(-1) @ jnp.asarray(by_label, wide)
