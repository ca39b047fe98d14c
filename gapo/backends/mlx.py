"""MLX: any `mlx.nn.Module`, lazily, with and without `mx.compile`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from gapo import geometry
from gapo.backends.base import LeafRule, MarginFn, margins_of, on_outputs, outputs_of, require_real
from gapo.backends.mlx_head import head_names, watched
from gapo.backends.mlx_state import ModuleState
from gapo.config import GAPOConfig

logger = logging.getLogger(__name__)


class MlxForward:
    """The clean forward of a module.

    MLX has no pullback that can be called twice, so each one runs the forward again; `mx.compile` sees that it is the
    same and does it once. Each run starts from the random state and the module's own state (running statistics,
    counters) of the clean forward, whose outcome is the one that stays.
    """

    def __init__(self, margin_fn: MarginFn, module: nn.Module, batch: Any) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f'params must be an mlx.nn.Module for backend="mlx", got {type(module).__name__}')
        self._margin_fn, self._module, self._batch = margin_fn, module, batch
        flat = tree_flatten(module.trainable_parameters())
        require_real({name: mx.issubdtype(x.dtype, mx.complexfloating) for name, x in flat})
        self.parameters: dict[str, Any] = {name: x for name, x in flat if mx.issubdtype(x.dtype, mx.floating)}
        self._random_state = mx.array(_random_state())
        self._before = ModuleState(module)
        self._again: list[mx.array] | None = None
        self._pulled: tuple[Sequence[mx.array], dict[str, mx.array]] | None = None
        try:
            with watched(module) as calls:
                self.outputs = outputs_of(margin_fn(module, batch))
        except BaseException:
            self._before.put_back()
            raise
        module.update(tree_unflatten(flat))  # mlx-lm's grad_checkpoint leaves arrays of its own in the module
        self._after = ModuleState(module)
        self._calls = calls

    @property
    def head(self) -> Iterator[str]:
        """Found when it is asked for: what cannot be told apart matters to perturb="backbone" alone."""
        yield from self.parameters.keys() & head_names(self._module, self._calls)

    def _run(self, names: list[str], values: Sequence[mx.array]) -> list[mx.array]:
        """The outputs with `values` in place of the named parameters, and the random numbers of the clean forward."""
        with self._replayed():
            try:
                try:
                    self._before.put_back()
                    self._module.update(tree_unflatten(list(zip(names, values, strict=True))))
                    return list(outputs_of(self._margin_fn(self._module, self._batch)))
                finally:
                    self._after.put_back()
            finally:  # a Ctrl-C may fall into the line above
                self._after.put_back()

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
        self._again, grads = mx.vjp(lambda *values: self._run(wanted, values), leaves, list(cotangents))
        pulled = dict(zip(wanted, grads, strict=True))
        self._pulled = cotangents, pulled
        return pulled

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[mx.array, ...]:
        names = list(names)
        return tuple(self._run(names, [move(name, self.parameters[name]) for name in names]))

    def directional(self, delta: LeafRule, names: Iterable[str]) -> mx.array:
        names = list(names)
        leaves = [self.parameters[name] for name in names]
        tangents = [delta(name, theta).astype(theta.dtype) for name, theta in zip(names, leaves, strict=True)]
        by_name = dict(zip(names, tangents, strict=True))
        try:
            _, along = mx.jvp(lambda *values: self._run(names, values), leaves, tangents)
        except ValueError as error:
            if "jvp" not in str(error):
                raise
            _say_pair_by_pair(str(error))
            return self._pair_by_pair(by_name)
        if not self._is_transpose(along, by_name):  # mx.custom_function with a vjp alone: jvp knows nothing of it
            _say_pair_by_pair("its forward derivative is not the transpose of its backward")
            return self._pair_by_pair(by_name)
        return margins_of(along)

    def _is_transpose(self, along: Sequence[mx.array], tangents: dict[str, mx.array]) -> bool:
        """Whether <cotangents, J delta> is <J^T cotangents, delta>; True where values cannot be read."""
        if self._pulled is None or not tangents.keys() <= self._pulled[1].keys():
            return True
        cotangents, grads = self._pulled
        forward = mx.stack([mx.sum(c.astype(mx.float32) * y) for c, y in zip(cotangents, along, strict=True)])
        size = mx.sum(mx.stack([mx.sum(mx.abs(c * y)) for c, y in zip(cotangents, along, strict=True)]))
        tolerance = 0.1 if self._is_half() else 0.01
        try:
            return bool(mx.abs(mx.sum(forward) - _inner(grads, tangents)) <= tolerance * size + 1e-12)
        except (RuntimeError, ValueError):
            return True

    def _is_half(self) -> bool:
        return any(x.dtype in (mx.float16, mx.bfloat16) for x in self.parameters.values())

    def _pair_by_pair(self, tangents: dict[str, mx.array]) -> mx.array:
        """The same from the transpose: <grad M_i, delta> of one pair after another."""
        found = []
        for i in range(self.outputs[0].shape[0]):
            one = mx.arange(self.outputs[0].shape[0]) == i
            grads = self.pullback(on_outputs(one.astype(mx.float32), self.outputs, mx), tangents)
            found.append(_inner(grads, tangents))
        return mx.stack(found)

    def require_repeatable(self) -> None:
        """Raise where a run of the same weights and batch gave other margins than the clean forward.

        Not where values cannot be read (under `mx.compile`).
        """
        if self._again is None:
            return
        tolerance = 0.05 if self._is_half() else 1e-3  # in a gradient MLX takes other kernels, which round otherwise
        again, clean = margins_of(self._again), margins_of(self.outputs)
        apart = mx.abs(again - clean) > tolerance * (1 + mx.abs(clean))
        try:  # not by NumPy, whose buffers MLX 0.32.0 fails to hand out in a way that ends the trace too
            flags: Any = apart.tolist()
        except (RuntimeError, ValueError):
            return
        if pairs := [i for i, is_apart in enumerate(flags) if is_apart]:
            raise ValueError(
                f"the margins of pairs {pairs} are others when the same weights and batch are run again, so that gaps "
                "would be wrong: the forward draws random numbers that are not mlx.core.random's, or keeps a state "
                "outside the module (a cache, a counter). Make margin_fn(model, batch) depend on its arguments alone"
            )


class MlxBackend:
    """The `Backend` verbs on MLX. Ranks are those of `group`."""

    xp = mx

    def __init__(self, group: Any = None) -> None:
        self._group = mx.distributed.init() if group is None else group

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
        return MlxForward(margin_fn, params, batch)

    def differentiate(
        self, losses: Callable[[tuple[mx.array, ...]], mx.array], values: Sequence[mx.array]
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        share = mx.full(values[0].shape, 1 / values[0].shape[0])
        (by_pair,), slopes = mx.vjp(lambda *outputs: losses(outputs), list(values), [share])
        return by_pair, tuple(slopes)

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
        forward.require_repeatable()
        return tree_unflatten(list(grads.items()))


@cache
def _say_pair_by_pair(error: str) -> None:
    """Once for each operation that has no forward derivative."""
    logger.warning(
        'MLX cannot differentiate this model forward (%s): anchor="first_order" takes one backward for each pair '
        'instead, with the same result. anchor="exact" takes one forward',
        error,
    )


def _inner(a: dict[str, mx.array], b: dict[str, mx.array]) -> mx.array:
    """Sum of the products over the names of `b`, float32."""
    return mx.sum(mx.stack([mx.sum(a[name].astype(mx.float32) * x.astype(mx.float32)) for name, x in b.items()]))


def _random_state() -> mx.array:
    """The array that the global random numbers come from."""
    states: Any = mx.random.state
    return states[0]


def make_backend(group: Any = None) -> MlxBackend:
    """The MLX backend; `group` is an `mx.distributed` group, by default all ranks of the launch."""
    return MlxBackend(group)
