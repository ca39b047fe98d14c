"""The anchor of a step: the probe's gradient, the perturbation along it, and the margins there.

These are steps 2 to 4 of the method document, written once over the `Backend` protocol.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from gapo import geometry, objective, rounding
from gapo._namespace import Array, Namespace, at_least_float32, is_concrete, settled, stop_gradient
from gapo.backends.base import AnchorForward, Backend, margins_of, on_outputs
from gapo.config import GAPOConfig
from gapo.radius import Spread
from gapo.selection import select


class Anchor(NamedTuple):
    """What steps 2 to 4 measured.

    Attributes:
        seen: what `LogProbs.of_step` takes of it, (outputs at the anchor or None, anchor gaps).
        figures: its fields of `StepResult`.
    """

    seen: tuple[tuple[Array, ...] | None, Array]
    figures: dict[str, Array | None]


def measure_anchor(
    forward: AnchorForward,
    outputs: tuple[Array, ...],
    config: GAPOConfig,
    backend: Backend,
    gamma: Any,
    rng: Any,
) -> Anchor:
    """Steps 2 to 4: the probe's gradient, the perturbation along it, and the margins there."""
    xp = backend.xp
    gamma = config.gamma if gamma is None else gamma
    margins = margins_of(outputs)
    objective.check_objective(config.beta, gamma, "sigmoid", 0.0, margins.shape[0])

    # 2. The probe gradient, up to a positive factor: only its direction matters.
    pull, factor = probe_pull(margins, gamma, config, backend)
    names = select(forward.parameters, forward.head, config)
    choice = rounding.choose_anchor(forward, names, config, backend)
    g = forward.pullback(on_outputs(-pull, forward.outputs, xp), names)
    g = {name: backend.all_reduce(g[name], "mean") for name in names}
    grad_norm = factor * _tree_norm([backend.norm(at_least_float32(x, xp)) for x in g.values() if _numel(x)], xp)

    # 3. The perturbation, one parameter at a time.
    direction = g if config.direction == "pessimistic" else backend.normal(names, forward.parameters, rng)
    perturbation = _Perturbation(forward, direction, config, backend)
    target, unit_gaps = config.target_gap, None
    if target is not None:
        unit_gaps = -perturbation.of_radius(1.0).along(forward, names)
        perturbation = perturbation.of_radius(Spread(backend).first_order_rho(unit_gaps, target))

    # 4. The margins at the anchor.
    moved: tuple[Array, ...] | None = None
    if choice.anchor == "first_order":
        gaps = -perturbation.along(forward, names) if unit_gaps is None else perturbation.rho * unit_gaps
        anchor_margins = margins - gaps
        radius = perturbation.ideal_radius()
        changed = 0 * grad_norm + 1  # 1.0, but no constant: `mx.compile` loses one that ends up in its state
    else:
        moved = perturbation.outputs(forward, names)
        if target is not None:
            gaps = margins - margins_of(moved)
            perturbation = perturbation.of_radius(Spread(backend).corrected_rho(perturbation.rho, gaps, target))
            moved = perturbation.outputs(forward, names)
        anchor_margins = margins_of(moved)
        radius, changed = perturbation.applied()
        gaps = margins - anchor_margins

    drop = backend.all_reduce(xp.sum(pull * gaps), "mean")  # not finite on all ranks if a margin is not on one
    concrete = is_concrete(drop)
    if concrete:  # the first look at a value: a lazy framework has been lazy so far
        _require_finite(margins, grad_norm, g, forward.parameters, xp)
        hint = f"{rounding.asked(config, perturbation.rho)} moves the weights too far"
        _require_finite_margins(anchor_margins, "the anchor forward", hint, forward.parameters, xp, over_ranks=drop)
        if choice.anchor == "exact":
            perturbation.require_moved(changed, names)
    rho = 0 * perturbation.scaled_norm + perturbation.rho
    ratio = perturbation.first_order_ratio(drop)
    rounding.check_gaps(
        forward,
        choice,
        config,
        backend,
        rho=rho,
        scaled_norm=perturbation.scaled_norm,
        radius=radius,
        changed=changed,
        ratio=ratio,
        concrete=concrete,
    )
    gaps = settled(gaps)  # step 5 differentiates a function that closes over these
    moved = None if moved is None else tuple(map(settled, moved))
    figures = {
        "anchor_margins": anchor_margins,
        "anchor_gaps": gaps,
        "grad_norm": grad_norm,
        "rho": rho,
        "radius": radius,
        "changed_fraction": changed,
        "first_order_ratio": ratio,
    }
    return Anchor((moved, gaps), figures)


def probe_pull(margins: Array, gamma: Any, config: GAPOConfig, backend: Backend) -> tuple[Array, Array]:
    """Minus the derivative of the mean probe loss by the margins, as `factor * pull`.

    `pull` (N,) is 1 for the pair that is pulled most over all ranks. The scaling happens in the logarithm: at large
    margins the plain derivative underflows, and only its direction matters.
    """
    xp = backend.xp
    n = margins.shape[0]
    if config.probe == "margin":
        ones = xp.ones_like(margins)
        return ones, ones[0] / n
    log_pull = objective.log_sigmoid(gamma - config.beta * margins, xp)
    peak = backend.all_reduce(xp.max(log_pull), "max")
    return xp.exp(log_pull - peak), config.beta * xp.exp(peak) / n


class _Perturbation:
    """delta of one step, parameter by parameter, with what was really applied."""

    def __init__(self, forward: AnchorForward, g: dict[str, Array], config: GAPOConfig, backend: Backend) -> None:
        self._g, self._config, self._backend, self._xp = g, config, backend, backend.xp
        self.scaled_norm = _tree_norm(list(self._scaled_norms(forward.parameters)), self._xp)
        self._set_radius(config.rho)

    def _set_radius(self, rho: float | Array) -> None:
        self.rho = rho
        self._step_size = geometry.step_size(rho, self.scaled_norm, self._xp)
        self._applied: list[tuple[int, Array, Array]] = []  # entries, norm of delta / T, share of changed entries

    def of_radius(self, rho: float | Array) -> _Perturbation:
        """The perturbation along the same direction, of another radius."""
        other = copy.copy(self)
        other._set_radius(rho)
        return other

    def _scaled_norms(self, parameters: dict[str, Array]) -> Iterator[Array]:
        """Norms of T g, block by block."""
        for name, whole in self._g.items():
            if _numel(whole):
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
        if _numel(theta):
            applied = at_least_float32(moved, self._xp) - theta
            unscaled = geometry.unscaled_delta(theta, applied, self._config.adaptive, self._xp)
            changed = self._backend.share_nonzero(applied)
            self._applied.append((_numel(theta), self._backend.norm(unscaled), changed))
        return moved

    def outputs(self, forward: AnchorForward, names: list[str]) -> tuple[Array, ...]:
        """The forward's outputs at theta + delta, float32 or wider, without gradient."""
        return tuple(stop_gradient(at_least_float32(y, self._xp)) for y in forward.at(self.move, names))

    def applied(self) -> tuple[Array, Array]:
        """Radius of what `move` applied, and the share of weights that it changed."""
        sizes, norms, shares = zip(*self._applied, strict=True)
        changed = sum(size * share for size, share in zip(sizes, shares, strict=True))
        every = sum(size * self._xp.ones_like(share) for size, share in zip(sizes, shares, strict=True))
        return _tree_norm(list(norms), self._xp), changed / every  # rounded alike: 1 where all moved, never above it

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
        entries = sum(_numel(forward.parameters[name]) for name in names)
        lift = 2.0 ** min(100, round(math.log2(max(entries, 1) ** 0.25 / self.rho))) if self.rho else 1.0
        along = forward.directional(lambda name, theta: self.delta(name, theta, lift), names)
        return at_least_float32(along, self._xp) / lift

    def require_moved(self, changed: Array, names: list[str]) -> None:
        """Raise when the perturbation was lost to rounding altogether."""
        if float(self.rho) == 0 or float(changed) != 0 or float(self.scaled_norm) == 0:
            return
        raise ValueError(
            f"{rounding.asked(self._config, self.rho)} changed none of the {len(names)} selected parameters: theta + "
            'delta rounds to theta. Use anchor="first_order", which rounds nothing, or keep the weights in float32'
        )


def _tree_norm(norms: list[Array], xp: Namespace) -> Array:
    return geometry.norm(xp.stack(norms), xp)


def _numel(x: Array) -> int:
    size = 1
    for length in x.shape:
        size *= int(length)
    return size


def _require_finite(
    margins: Array, grad_norm: Array, g: dict[str, Array], parameters: dict[str, Array], xp: Namespace
) -> None:
    """Raise FloatingPointError naming the pairs or the first parameter that is not finite.

    Asked after the ranks were reduced, so that all ranks raise together.
    """
    if bool(xp.isfinite(grad_norm)):
        return
    hint = "look at these pairs' tokens and labels"
    _require_finite_margins(margins, "the clean forward", hint, parameters, xp)
    name = _first_not_finite(g, xp) or "a parameter"
    raise FloatingPointError(
        f"the probe gradient of {name!r} is not finite; no weight was changed. Look for overflow in the backward, "
        "or use a wider dtype"
    )


def _require_finite_margins(
    margins: Array,
    where: str,
    hint: str,
    parameters: dict[str, Array],
    xp: Namespace,
    over_ranks: Array | None = None,
) -> None:
    """Raise where a margin is not finite; with `over_ranks`, a scalar made of all ranks' margins, on every rank."""
    if not bool(xp.all(xp.isfinite(margins))):
        bad = [i for i in range(margins.shape[0]) if not bool(xp.isfinite(margins[i]))]
        name = _first_not_finite(parameters, xp)
        if name is not None:
            hint = f"weights of {name!r} were not before this step: go back to a checkpoint"
        raise FloatingPointError(f"the margins of pairs {bad} are not finite in {where}; {hint}")
    if over_ranks is not None and not bool(xp.isfinite(over_ranks)):
        raise FloatingPointError(f"the margins of another rank's pairs are not finite in {where}; {hint}")


def _first_not_finite(arrays: dict[str, Array], xp: Namespace) -> str | None:
    """Name of the first array with an entry that is not finite.

    Of a shard this looks at the rank's own entries, since other ranks may not have come here.
    """
    for name, x in arrays.items():
        own = x.to_local() if hasattr(x, "to_local") else x
        if not bool(xp.all(xp.isfinite(own))):
            return name
    return None
