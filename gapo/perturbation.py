"""delta of one step, parameter by parameter: formed, applied, and measured as it was really applied."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gapo import geometry, rounding
from gapo._namespace import Array, Namespace, at_least_float32, settled, stop_gradient
from gapo.backends.base import AnchorForward, Backend
from gapo.config import GAPOConfig
from gapo.mask import Mask


class Perturbation:
    """delta of one step, parameter by parameter, with what was really applied."""

    def __init__(self, forward: AnchorForward, g: dict[str, Array], config: GAPOConfig, backend: Backend) -> None:
        self._g, self._config, self._backend, self._xp = g, config, backend, backend.xp
        self.scaled_norm = tree_norm(list(self._scaled_norms(forward.parameters)), self._xp)
        self._share = 1.0  # of the entries of the parameters in g, those that move
        if isinstance(config.perturb, Mask):
            self._share = config.perturb.share({name: numel(x) for name, x in g.items()}, forward.parameters)
        self._set_radius(config.rho)

    def _set_radius(self, rho: float | Array) -> None:
        self.rho = rho
        self._step_size = geometry.step_size(rho, self.scaled_norm, self._xp)
        self._applied: list[tuple[int, Array, Array]] = []  # entries, norm of delta / T, share of changed entries

    def of_radius(self, rho: float | Array) -> Perturbation:
        """The perturbation along the same direction, of another radius."""
        other = copy.copy(self)
        other._set_radius(rho)
        return other

    def _scaled_norms(self, parameters: dict[str, Array]) -> Iterator[Array]:
        """Norms of T g, block by block."""
        for name, whole in self._g.items():
            if numel(whole):
                for theta, g in self._blocks(stop_gradient(parameters[name]), whole):
                    yield self._backend.norm(geometry.scaled_gradient(theta, g, self._config.adaptive))

    def _blocks(self, theta: Array, g: Array) -> Iterator[tuple[Array, Array]]:
        """Blocks of theta and g, float32 or wider."""
        for theta_block, g_block in self._backend.blocks(theta, g):
            yield at_least_float32(theta_block, self._xp), at_least_float32(g_block, self._xp)

    def delta(self, name: str, theta: Array, lift: float = 1.0) -> Array:
        """`lift` times delta of one parameter, float32 or wider whatever the dtype of theta."""
        theta, g = at_least_float32(theta, self._xp), at_least_float32(self._g[name], self._xp)
        return geometry.delta(theta, g, lift * self._step_size, self._config.adaptive)

    def move(self, name: str, theta: Array) -> Array:
        """theta + delta, rounded to the dtype of theta."""
        moved = [self._moved(wide, g, theta.dtype) for wide, g in self._blocks(theta, self._g[name])]
        return moved[0] if len(moved) == 1 else self._xp.reshape(self._xp.concat(moved), theta.shape)

    def _moved(self, theta: Array, g: Array, dtype: Any) -> Array:
        moved = theta + geometry.delta(theta, g, self._step_size, self._config.adaptive)
        moved = moved if moved.dtype == dtype else self._xp.astype(moved, dtype)
        if numel(theta):
            applied = at_least_float32(moved, self._xp) - theta
            unscaled = geometry.unscaled_delta(theta, applied, self._config.adaptive, self._xp)
            changed = self._backend.share_nonzero(applied)
            # No entry of delta / T is above the radius, and rounding at most doubles one.
            self._applied.append((numel(theta), self._backend.norm(unscaled, self.ideal_radius()), changed))
        return moved

    def outputs(self, forward: AnchorForward, names: list[str]) -> tuple[Array, ...]:
        """The forward's outputs at theta + delta, float32 or wider, without gradient."""
        return self._wide(forward.at(self.move, names))

    def pulled(
        self,
        forward: AnchorForward,
        names: list[str],
        slopes_at: Callable[[tuple[Array, ...]], Sequence[Array]],
    ) -> tuple[tuple[Array, ...], dict[str, Array]]:
        """The same, and the gradients there of `sum_j <slopes[j], outputs[j]>` by all parameters."""
        seen: list[tuple[Array, ...]] = []

        def cotangents(outputs: tuple[Array, ...]) -> Sequence[Array]:
            seen.append(tuple(map(settled, self._wide(outputs))))
            return [self._xp.astype(c, y.dtype) for c, y in zip(slopes_at(seen[0]), outputs, strict=True)]

        grads = forward.pulled_at(self.move, names, cotangents)
        return seen[0], grads

    def _wide(self, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(stop_gradient(at_least_float32(y, self._xp)) for y in outputs)

    def applied(self) -> tuple[Array, Array]:
        """Radius of what `move` applied, and the share of weights that it changed."""
        sizes, norms, shares = zip(*self._applied, strict=True)
        changed = sum(size * share for size, share in zip(sizes, shares, strict=True))
        every = sum(size * self._xp.ones_like(share) for size, share in zip(sizes, shares, strict=True))
        share = changed / every  # rounded alike: 1 where all moved, never above it
        if self._share < 1:
            share = self._xp.clip(share / self._share, None, 1.0)
        return tree_norm(list(norms), self._xp), share

    def ideal_radius(self) -> Array:
        """Radius of the delta that was never rounded: rho, or 0 for a gradient of 0."""
        return self._step_size * self.scaled_norm

    def first_order_ratio(self, drop: Array) -> Array | None:
        """`drop` over its first-order prediction `rho * ||T g||`; 1 where both are 0."""
        if self._config.direction == "gaussian":
            return None
        xp = self._xp
        predicted = self.rho * self.scaled_norm
        none = predicted == 0
        return xp.where(none, xp.ones_like(drop), drop / xp.where(none, xp.ones_like(drop), predicted))

    def along(self, forward: AnchorForward, names: list[str]) -> Array:
        """Derivative of each pair's margin along delta, (N,), float32 or wider, at a radius that is a plain number.

        It is linear in delta, so that a power of 2 can lift delta's tiny entries into float16's range and leave again.
        """
        entries = sum(numel(forward.parameters[name]) for name in names)
        lift = 2.0 ** min(100, round(math.log2(max(entries, 1) ** 0.25 / self.rho))) if self.rho else 1.0
        along = forward.directional(lambda name, theta: self.delta(name, theta, lift), names)
        return at_least_float32(along, self._xp) / lift

    def require_moved(self, changed: Array, names: list[str]) -> None:
        """Raise when the perturbation was lost to rounding altogether."""
        if float(self.rho) == 0 or float(changed) != 0 or float(self.scaled_norm) == 0:
            return
        raise ValueError(
            f"{rounding.asked(self._config, self.rho)} changed none of the {len(names)} selected parameters: theta + "
            f"delta rounds to theta; {rounding.way_out(self._config)}"
        )


def tree_norm(norms: list[Array], xp: Namespace) -> Array:
    return geometry.norm(xp.stack(norms), xp)


def numel(x: Array) -> int:
    size = 1
    for length in x.shape:
        size *= int(length)
    return size
