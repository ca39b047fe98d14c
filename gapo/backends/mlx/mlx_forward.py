"""The forward that runs again for every question, on any `mlx.nn.Module`, with and without `mx.compile`.

MLX has no pullback that can be called twice, and a module is not a pure function. So every question to a forward
(pullback, anchor, derivative along delta) runs it again, through `MlxForward._run`, which makes it repeatable: the same
random numbers, the same module state. `mx.compile` sees that those forwards are one and runs it once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from gapo.backends.base import LeafRule, MarginFn, Update, margins_of, on_outputs, outputs_of, require_real
from gapo.backends.mlx.mlx_head import Calls, head_names, watched
from gapo.backends.mlx.pairgrads.mlx_state import ModuleState

logger = logging.getLogger(__name__)


class MlxForward:
    """The clean forward of a module, and the runs that repeat it.

    Each run starts from the random state and the module state (running statistics, counters) that the clean forward
    started from. The states that the clean forward left are the ones that remain.

    Args:
        margin_fn: as in `gapo.value_and_grad`.
        module: the module, whose trainable floating-point parameters are differentiated.
        batch: passed to `margin_fn`.
        anchor: whether an anchor will be taken that leaves the output head out.

    Raises:
        TypeError: `module` is no `mlx.nn.Module`.
        ValueError: a trainable parameter is complex.
    """

    def __init__(self, margin_fn: MarginFn, module: nn.Module, batch: Any, anchor: bool = True) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f'params must be an mlx.nn.Module for backend="mlx", got {type(module).__name__}')
        self._margin_fn, self._module, self._batch = margin_fn, module, batch
        flat = tree_flatten(module.trainable_parameters())
        require_real({name: mx.issubdtype(x.dtype, mx.complexfloating) for name, x in flat})
        self.parameters: dict[str, Any] = {name: x for name, x in flat if mx.issubdtype(x.dtype, mx.floating)}
        self._random_state = mx.array(random_state())
        self._before = ModuleState(module)
        self._rerun: list[mx.array] | None = None  # the outputs of the last pullback's forward
        self._pulled: tuple[Sequence[mx.array], dict[str, mx.array]] | None = None  # its cotangents and gradients
        self._watched = watched if anchor else lambda module: nullcontext(Calls())
        try:
            self.outputs = self._run_clean()
        except BaseException:
            self._before.put_back()
            raise
        module.update(tree_unflatten(flat))  # mlx-lm's grad_checkpoint leaves copies of its own in the module
        self._after = ModuleState(module)

    def _run_clean(self) -> tuple[mx.array, ...]:
        with self._watched(self._module) as self._calls:
            return outputs_of(self._margin_fn(self._module, self._batch))

    @property
    def head(self) -> Iterator[str]:
        """Names of the head's parameters. Evaluated late: an ambiguous head is an error for perturb="backbone" only."""
        yield from self.parameters.keys() & head_names(self._module, self._calls)

    def _run(self, names: list[str], values: Sequence[mx.array]) -> list[mx.array]:
        """The clean forward's outputs with `values` in place of the named parameters; all else is as it was."""
        with self._replayed():
            try:
                try:
                    self._before.put_back()
                    self._module.update(tree_unflatten(list(zip(names, values, strict=True))))
                    return list(outputs_of(self._margin_fn(self._module, self._batch)))
                finally:
                    self._after.put_back()
            finally:  # repeated, since a Ctrl-C may interrupt the line above
                self._after.put_back()

    def half_compute(self) -> bool:
        # MLX's lazy graph shows no dtypes. 16-bit compute starts from 16-bit arrays of the module: weights, frozen or
        # not, and the scales of quantised layers. A cast within `margin_fn` stays unseen.
        arrays = [x for _, x in tree_flatten(self._module.parameters())]
        return any(x.dtype in (mx.bfloat16, mx.float16) for x in (*arrays, *self.outputs))

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        """Draw the clean forward's random numbers again. Afterwards the stream continues from where it was."""
        after = mx.array(random_state())
        random_state()[:] = self._random_state
        try:
            yield
        finally:
            random_state()[:] = after

    def pullback(self, cotangents: Sequence[mx.array], names: Iterable[str] | None = None) -> dict[str, mx.array]:
        names = list(self.parameters if names is None else names)
        leaves = [self.parameters[name] for name in names]
        self._rerun, grads = mx.vjp(lambda *values: self._run(names, values), leaves, list(cotangents))
        by_name = dict(zip(names, grads, strict=True))
        self._pulled = cotangents, by_name
        return by_name

    def as_loss(self, value: mx.array, update: Update) -> mx.array:
        """`value`, as a scalar with the gradients of `update`: given by name, or by cotangents on the outputs."""
        if isinstance(update, Mapping):
            return _deposited(value, list(update.values()), list(self.parameters.values()))
        pull = mx.sum(mx.stack([mx.sum(c * y) for c, y in zip(update, self.outputs, strict=True)]))
        return mx.stop_gradient(value) + (pull - mx.stop_gradient(pull))

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[mx.array, ...]:
        names = list(names)
        return tuple(self._run(names, [move(name, self.parameters[name]) for name in names]))

    def pulled_at(
        self, move: LeafRule, names: Iterable[str], cotangents: Callable[[tuple[mx.array, ...]], Sequence[mx.array]]
    ) -> dict[str, mx.array]:
        moved = {name: move(name, self.parameters[name]) for name in names}
        every = list(self.parameters)
        leaves = [moved.get(name, self.parameters[name]) for name in every]
        slopes = cotangents(tuple(self._run(every, leaves)))
        _, grads = mx.vjp(lambda *values: self._run(every, values), leaves, list(slopes))
        return dict(zip(every, grads, strict=True))

    def directional(self, delta: LeafRule, names: Iterable[str]) -> mx.array:
        names = list(names)
        leaves = [self.parameters[name] for name in names]
        tangents = [delta(name, theta).astype(theta.dtype) for name, theta in zip(names, leaves, strict=True)]
        by_name = dict(zip(names, tangents, strict=True))
        try:
            _, along = mx.jvp(lambda *values: self._run(names, values), leaves, tangents)
        except (ValueError, RuntimeError) as error:  # "not implemented", of quantised experts as a RuntimeError
            if "jvp" not in str(error):
                raise
            _log_pair_by_pair(str(error))
            return self._pair_by_pair(by_name)
        if not self._is_transpose(along, by_name):  # `mx.jvp` ignores a `mx.custom_function`'s vjp, without an error
            _log_pair_by_pair("its forward derivative is not the transpose of its backward")
            return self._pair_by_pair(by_name)
        return margins_of(along)

    def _is_transpose(self, along: Sequence[mx.array], tangents: dict[str, mx.array]) -> bool:
        """Whether <cotangents, J delta> equals <J^T cotangents, delta>, by the last pullback.

        True where values cannot be read.
        """
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
        """`directional` by the transpose, <grad M_i, delta>: one pullback for each pair."""
        along = []
        for row in mx.eye(self.outputs[0].shape[0]):
            grads = self.pullback(on_outputs(row, self.outputs, mx), tangents)
            along.append(_inner(grads, tangents))
        return mx.stack(along)

    def require_repeatable(self) -> None:
        """Raise ValueError if the last pullback's forward gave other margins than the clean one.

        Skipped where values cannot be read, as under `mx.compile`.
        """
        if self._rerun is None:
            return
        tolerance = 0.05 if self._is_half() else 1e-3  # MLX differentiates by other kernels, which round differently
        rerun, clean = margins_of(self._rerun), margins_of(self.outputs)
        differs = mx.abs(rerun - clean) > tolerance * (1 + mx.abs(clean))
        try:  # by `tolist`: under a trace, NumPy's conversion in MLX 0.32.0 fails in a way that ends the trace too
            flags: Any = differs.tolist()
        except (RuntimeError, ValueError):
            return
        if pairs := [i for i, flag in enumerate(flags) if flag]:
            raise ValueError(
                f"the margins of pairs {pairs} are others when the same weights and batch are run again, so that gaps "
                "would be wrong: the forward draws random numbers that are not mlx.core.random's, or keeps a state "
                "outside the module (a cache, a counter). Make margin_fn(model, batch) depend on its arguments alone"
            )


@cache
def _log_pair_by_pair(error: str) -> None:
    """Warn once for each operation that has no forward derivative."""
    logger.warning(
        'MLX cannot differentiate this model forward (%s): anchor="first_order" takes one backward for each pair '
        'instead, with the same result. anchor="exact" takes one forward',
        error,
    )


def _inner(a: dict[str, mx.array], b: dict[str, mx.array]) -> mx.array:
    """<a, b> over the names of `b`, in float32."""
    return mx.sum(mx.stack([mx.sum(a[name].astype(mx.float32) * x.astype(mx.float32)) for name, x in b.items()]))


def random_state() -> mx.array:
    """The array that the global random numbers come from."""
    states: Any = mx.random.state
    return states[0]


def _deposited(value: mx.array, grads: list[mx.array], parameters: list[mx.array]) -> mx.array:
    """`value`, whose gradient by each of `parameters` is the one that was computed for it already."""
    deposit: Any = mx.custom_function(lambda value, *parameters: value)

    @deposit.vjp
    def hand_out(primals: Any, scale: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        return mx.zeros_like(value), *(g * scale.astype(g.dtype) for g in grads)

    scalar: mx.array = deposit(mx.stop_gradient(value), *parameters)
    return scalar
