"""MLX: any `mlx.nn.Module`, lazily, with and without `mx.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from gapo import geometry
from gapo.backends.base import LeafRule, MarginFn, margins_of, outputs_of, require_real
from gapo.config import GAPOConfig
from gapo.selection import HEAD_NAME


class MlxForward:
    """The clean forward of a module.

    MLX has no pullback that can be called twice, so each one runs the forward again; `mx.compile` sees that it is the
    same and does it once.
    """

    def __init__(self, margin_fn: MarginFn, module: nn.Module, batch: Any) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f'params must be an mlx.nn.Module for backend="mlx", got {type(module).__name__}')
        self._margin_fn, self._module, self._batch = margin_fn, module, batch
        flat = tree_flatten(module.trainable_parameters())
        require_real({name: mx.issubdtype(x.dtype, mx.complexfloating) for name, x in flat})
        self.parameters: dict[str, Any] = {name: x for name, x in flat if mx.issubdtype(x.dtype, mx.floating)}
        self.head = [name for name in self.parameters if HEAD_NAME.search(name)]
        self._random_state = mx.array(_random_state())
        try:
            self.outputs = outputs_of(margin_fn(module, batch))
        finally:  # mlx-lm's grad_checkpoint leaves arrays of its own in the module
            module.update(tree_unflatten(list(self.parameters.items())))

    def _run(self, names: list[str], values: Sequence[mx.array]) -> list[mx.array]:
        """The outputs with `values` in place of the named parameters, and the random numbers of the clean forward."""
        original = [(name, self.parameters[name]) for name in names]
        with self._replayed():
            try:
                try:
                    self._module.update(tree_unflatten(list(zip(names, values, strict=True))))
                    return list(outputs_of(self._margin_fn(self._module, self._batch)))
                finally:
                    self._module.update(tree_unflatten(original))
            finally:  # a Ctrl-C may fall into the line above
                self._module.update(tree_unflatten(original))

    def half_compute(self) -> bool:
        # MLX's lazy graph does not tell dtypes. 16-bit arrays come from the module's own: its weights, frozen or not,
        # and the scales of quantised layers. A cast within `margin_fn` stays unseen.
        arrays = [x for _, x in tree_flatten(self._module.parameters())]
        return any(x.dtype in (mx.bfloat16, mx.float16) for x in (*arrays, *self.outputs))

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        """Draw from the state before the clean forward; afterwards the stream goes on from where it was."""
        after = mx.array(_random_state())
        _random_state()[:] = self._random_state
        try:
            yield
        finally:
            _random_state()[:] = after

    def pullback(self, cotangents: Sequence[mx.array], names: Iterable[str] | None = None) -> dict[str, mx.array]:
        wanted = list(self.parameters if names is None else names)
        leaves = [self.parameters[name] for name in wanted]
        _, grads = mx.vjp(lambda *values: self._run(wanted, values), leaves, list(cotangents))
        return dict(zip(wanted, grads, strict=True))

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[mx.array, ...]:
        names = list(names)
        return tuple(self._run(names, [move(name, self.parameters[name]) for name in names]))

    def directional(self, delta: LeafRule, names: Iterable[str]) -> mx.array:
        names = list(names)
        leaves = [self.parameters[name] for name in names]
        tangents = [delta(name, theta).astype(theta.dtype) for name, theta in zip(names, leaves, strict=True)]
        _, along = mx.jvp(lambda *values: self._run(names, values), leaves, tangents)
        return margins_of(along)


class MlxBackend:
    """The `Backend` verbs on MLX. Ranks are those of `group`."""

    xp = mx

    def __init__(self, group: Any = None) -> None:
        self._group = mx.distributed.init() if group is None else group

    def forward(self, margin_fn: MarginFn, params: Any, batch: Any, config: GAPOConfig) -> MlxForward:
        return MlxForward(margin_fn, params, batch)

    def norm(self, x: mx.array) -> mx.array:
        return geometry.norm(x, mx)

    def mean(self, x: mx.array) -> mx.array:
        return mx.mean(x)

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
        for name, one in zip(names, mx.random.split(key, len(names)), strict=True):
            draws[name] = mx.random.normal(parameters[name].shape, mx.float32, key=one)
        return draws

    def _shared_key(self) -> mx.array:
        """A key from the global stream, the first rank's on all of them."""
        after, key = mx.random.split(_random_state())
        _random_state()[:] = after
        if self._group.size() == 1:
            return key
        mine = key if self._group.rank() == 0 else mx.zeros_like(key)
        return mx.distributed.all_sum(mine, group=self._group)

    def call_back(self, condition: mx.array, tell: Callable[..., None], *values: mx.array) -> bool:
        return False

    def pack(self, forward: MlxForward, grads: dict[str, mx.array]) -> Any:
        return tree_unflatten(list(grads.items()))


def _random_state() -> mx.array:
    """The array that the global random numbers come from."""
    states: Any = mx.random.state
    return states[0]


def make_backend(group: Any = None) -> MlxBackend:
    """The MLX backend; `group` is an `mx.distributed` group, by default all ranks of the launch."""
    return MlxBackend(group)
