"""The slow reference: float64, with gradients by central differences, which share no mistake with other backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from gapo import geometry
from gapo._namespace import holding
from gapo.backends.base import LeafRule, MarginFn, margins_of, outputs_of
from gapo.config import GAPOConfig
from gapo.selection import HEAD_NAME

# A difference's spacing h, relative to the parameter. It balances truncation (h^4) against rounding (eps / h), which
# alone gives eps^0.2; a smaller h suits functions with sharp bends.
_SPACING = np.finfo(np.float64).eps ** 0.3
_STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}  # central difference of fourth order: offset, coefficient


class NumpyForward:
    """A clean forward over a dict of float64 arrays, with a central difference for each of their entries."""

    def __init__(self, margin_fn: MarginFn, params: Mapping[str, np.ndarray], batch: Any) -> None:
        for name, value in params.items():
            if not isinstance(value, np.ndarray) or value.dtype != np.float64:
                raise TypeError(
                    f"params[{name!r}] must be a float64 array, got {getattr(value, 'dtype', type(value).__name__)}"
                )
        self._margin_fn, self._batch = margin_fn, batch
        self.parameters: dict[str, Any] = dict(params)
        self.head = [name for name in params if HEAD_NAME.search(name)]
        self.outputs = self._run(self.parameters)

    def _run(self, params: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return outputs_of(self._margin_fn(params, self._batch))

    @cached_property
    def _jacobian(self) -> dict[str, list[np.ndarray]]:
        """The derivatives of each output by each parameter, (N, *shape)."""
        jacobian = {}
        for name, theta in self.parameters.items():

            def outputs(moved: np.ndarray, name: str = name) -> np.ndarray:
                return np.stack(self._run({**self.parameters, name: moved}))

            columns = [_derivative(outputs, theta, index) for index in np.ndindex(theta.shape)]
            jacobian[name] = [np.stack(c, axis=-1).reshape(-1, *theta.shape) for c in zip(*columns, strict=True)]
        return jacobian

    def pullback(self, cotangents: Sequence[np.ndarray], names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        return {
            name: np.sum(
                [np.tensordot(c, j, axes=1) for c, j in zip(cotangents, self._jacobian[name], strict=True)], axis=0
            )
            for name in (self.parameters if names is None else names)
        }

    def half_compute(self) -> bool:
        return False  # float64 only

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[np.ndarray, ...]:
        return self._run({**self.parameters, **{name: move(name, self.parameters[name]) for name in names}})

    def pulled_at(
        self,
        move: LeafRule,
        names: Iterable[str],
        cotangents: Callable[[tuple[np.ndarray, ...]], Sequence[np.ndarray]],
    ) -> dict[str, np.ndarray]:
        moved = {name: move(name, self.parameters[name]) for name in names}
        there = NumpyForward(self._margin_fn, {**self.parameters, **moved}, self._batch)
        return there.pullback(cotangents(there.outputs))

    def directional(self, delta: LeafRule, names: Iterable[str]) -> np.ndarray:
        along = np.zeros(self.outputs[0].shape)
        for name in names:
            by_margin = margins_of(self._jacobian[name])
            along += np.sum((by_margin * delta(name, self.parameters[name])).reshape(len(along), -1), axis=1)
        return along


class NumpyBackend:
    """The `Backend` verbs on NumPy; one rank."""

    xp = xp

    def forward(
        self,
        margin_fn: MarginFn,
        params: Any,
        batch: Any,
        config: GAPOConfig,
        *,
        anchor: bool = True,
        by_side: bool = False,
    ) -> NumpyForward:
        return NumpyForward(margin_fn, params, batch)

    def differentiate(
        self, losses: Callable[[tuple[np.ndarray, ...]], np.ndarray], values: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        constants: list[np.ndarray] = []
        with holding(constants, again=False):
            by_pair = losses(tuple(values))

        def mean_at(k: int, moved: np.ndarray) -> np.ndarray:
            with holding(constants, again=True):
                return np.mean(losses(tuple(moved if j == k else x for j, x in enumerate(values))))

        slopes = [[_derivative(partial(mean_at, k), x, (i,)) for i in range(len(x))] for k, x in enumerate(values)]
        return by_pair, tuple(map(np.array, slopes))

    def norm(self, x: np.ndarray, size: np.ndarray | None = None) -> np.ndarray:
        return geometry.norm(x, xp, size)

    def share_nonzero(self, x: np.ndarray) -> np.ndarray:
        return xp.mean(xp.astype(x != 0, x.dtype))

    def blocks(self, *arrays: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        return [arrays]

    def all_reduce(self, x: np.ndarray, op: str) -> np.ndarray:
        return x

    def normal(self, names: Iterable[str], parameters: dict[str, np.ndarray], rng: Any) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(rng)
        return {name: generator.standard_normal(parameters[name].shape) for name in names}

    def call_back(self, condition: np.ndarray, tell: Callable[..., None], *values: np.ndarray) -> bool:
        return False

    def pack(self, forward: Any, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return grads


def _derivative(fn: Callable[[np.ndarray], np.ndarray], x: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """The derivative of the array `fn(x)` by the entry `x[index]`."""
    h = _SPACING * max(1.0, abs(x[index]))
    terms = []
    for offset, coefficient in _STENCIL.items():
        moved = x.copy()
        moved[index] += offset * h
        terms.append(coefficient / h * fn(moved))
    return np.sum(terms, axis=0)


def make_backend() -> NumpyBackend:
    """The NumPy backend."""
    return NumpyBackend()
