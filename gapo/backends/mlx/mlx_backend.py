"""The `Backend` verbs on MLX, evaluated lazily, with and without `mx.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from gapo import geometry
from gapo.backends.base import MarginFn
from gapo.backends.mlx.mlx_forward import MlxForward, random_state
from gapo.backends.mlx.mlx_onepass import OnePassMlxForward
from gapo.backends.mlx.mlx_verdicts import MlxVerdicts
from gapo.config import GAPOConfig


class MlxBackend:
    """The `Backend` verbs on MLX; the ranks are those of `group`.

    With `one_pass` the backward runs once, where a model's layers allow it (`mlx_onepass`), and else once for each
    question. What is proved about a model at its first step is proved for this object.
    """

    xp = mx

    def __init__(self, group: Any = None, one_pass: bool = True) -> None:
        self._group = mx.distributed.init() if group is None else group
        self._one_pass = one_pass
        self._verdicts = MlxVerdicts()

    def forward(
        self,
        margin_fn: MarginFn,
        params: Any,
        batch: Any,
        config: GAPOConfig,
        *,
        anchor: bool = True,
        by_side: bool = False,
    ) -> MlxForward:
        # An update at the anchor is another backward, of other weights: one pass would save nothing.
        if anchor and self._one_pass and not config.updates_at_anchor:
            return OnePassMlxForward(margin_fn, params, batch, self._verdicts, by_side=by_side)
        return MlxForward(margin_fn, params, batch, anchor)

    def differentiate(
        self, losses: Callable[[tuple[mx.array, ...]], mx.array], values: Sequence[mx.array]
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        share = mx.full(values[0].shape, 1 / values[0].shape[0], values[0].dtype)  # of each loss in their mean
        (by_pair,), slopes = mx.vjp(lambda *outputs: losses(outputs), list(values), [share])
        return by_pair, tuple(slopes)

    def norm(self, x: mx.array, size: mx.array | None = None) -> mx.array:
        return geometry.norm(x, mx, size)

    def share_nonzero(self, x: mx.array) -> mx.array:
        return mx.mean((x != 0).astype(x.dtype))

    def blocks(self, *arrays: mx.array) -> list[tuple[mx.array, ...]]:
        return [arrays]

    def all_reduce(self, x: mx.array, op: str) -> mx.array:
        if self._group.size() == 1:
            return x
        if op == "max":
            return mx.distributed.all_max(x, group=self._group)
        total = mx.distributed.all_sum(x, group=self._group)
        return total / self._group.size() if op == "mean" else total

    def normal(self, names: Iterable[str], parameters: dict[str, mx.array], rng: Any) -> dict[str, mx.array]:
        names = list(names)
        key = self._shared_key() if rng is None else rng
        draws = {}
        for name, own_key in zip(names, mx.random.split(key, len(names)), strict=True):
            draws[name] = mx.random.normal(parameters[name].shape, mx.float32, key=own_key)
        return draws

    def _shared_key(self) -> mx.array:
        """A key from the global stream: the first rank's, on every rank."""
        after, key = mx.random.split(random_state())
        random_state()[:] = after
        if self._group.size() == 1:
            return key
        summand = key if self._group.rank() == 0 else mx.zeros_like(key)  # a broadcast, spelled as a sum
        return mx.distributed.all_sum(summand, group=self._group)

    def call_back(self, condition: mx.array, tell: Callable[..., None], *values: mx.array) -> bool:
        return False

    def pack(self, forward: MlxForward, grads: dict[str, mx.array]) -> Any:
        forward.require_repeatable()
        return tree_unflatten(list(grads.items()))


def make_backend(group: Any = None, one_pass: bool = True) -> MlxBackend:
    """The MLX backend.

    Args:
        group: an `mx.distributed` group; by default all ranks of the launch.
        one_pass: False propagates anew for each question, which is slower and asks nothing of the layers.
    """
    return MlxBackend(group, one_pass)
