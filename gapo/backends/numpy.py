"""The slow reference: float64, gradients by central differences, which share no mistake with the other backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from gapo import geometry
from gapo._namespace import holding
from gapo.backends.base import LeafRule, MarginFn, margins_of, outputs_of
from gapo.config import GAPOConfig
from gapo.selection import HEAD_NAME

_STEP = np.finfo(np.float64).eps ** 0.3  # truncation (h^4) against rounding (eps / h), for functions with sharp bends
_STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}  # the central difference of fourth order


class NumpyForward:
    """A clean forward over a dict of float64 arrays; every entry is differentiated by a central difference."""

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
        """For each parameter, the derivative of each output: (N, *shape)."""
        jacobian = {}
        for name, theta in self.parameters.items():
            columns: list[list[np.ndarray]] = [[] for _ in self.outputs]
            for index in np.ndindex(theta.shape):
                h = _STEP * max(1.0, abs(theta[index]))
                terms = []
                for steps, coefficient in _STENCIL.items():
                    moved = theta.copy()
                    moved[index] += steps * h
                    terms.append([coefficient / h * y for y in self._run({**self.parameters, name: moved})])
                for column, parts in zip(columns, zip(*terms, strict=True), strict=True):
                    column.append(sum(parts))
            n = self.outputs[0].shape[0]
            jacobian[name] = [np.stack(c, axis=-1).reshape(n, *theta.shape) for c in columns]
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
        slopes = tuple(np.zeros_like(x) for x in values)
        for output, slope in zip(values, slopes, strict=True):
            for i in range(len(output)):
                h = _STEP * max(1.0, abs(output[i]))
                for steps, coefficient in _STENCIL.items():
                    moved = output.copy()
                    moved[i] += steps * h
                    with holding(constants, again=True):
                        by_moved = losses(tuple(moved if x is output else x for x in values))
                    slope[i] += coefficient / h * np.mean(by_moved)
        return by_pair, slopes

    def norm(self, x: np.ndarray) -> np.ndarray:
        return geometry.norm(x, xp)

    def mean(self, x: np.ndarray) -> np.ndarray:
        return xp.mean(x)

    def all_reduce(self, x: np.ndarray, op: str) -> np.ndarray:
        return x

    def normal(self, names: Iterable[str], parameters: dict[str, np.ndarray], rng: Any) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(rng)
        return {name: generator.standard_normal(parameters[name].shape) for name in names}

    def call_back(self, condition: np.ndarray, tell: Callable[..., None], *values: np.ndarray) -> bool:
        return False

    def pack(self, forward: Any, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return grads


def make_backend() -> NumpyBackend:
    """The NumPy backend."""
    return NumpyBackend()
