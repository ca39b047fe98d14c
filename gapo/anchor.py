"""The anchor of a step: the probe's gradient, the perturbation along it, and the margins there.

These are steps 2 to 4 of the method document, written once over the `Backend` protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from gapo import objective, rounding
from gapo._namespace import Array, Namespace, at_least_float32, is_concrete, settled, stop_gradient
from gapo.backends.base import AnchorForward, Backend, margins_of, on_outputs
from gapo.config import GAPOConfig
from gapo.mask import Mask
from gapo.pairs import LogProbs
from gapo.perturbation import Perturbation, numel, tree_norm
from gapo.radius import Spread
from gapo.selection import select


class Anchor(NamedTuple):
    """What steps 2 to 4 measured.

    Attributes:
        seen: what `LogProbs.of_step` takes of it, (outputs at the anchor or None, anchor gaps).
        figures: its fields of `StepResult`.
        grads: gradients of the update by name, where they were taken at the anchor; else None.
    """

    seen: tuple[tuple[Array, ...] | None, Array]
    figures: dict[str, Array | None]
    grads: dict[str, Array] | None = None


class LogProbsAtAnchor(LogProbs):
    """What a loss sees whose gradient is taken at the anchor: the log-probabilities there, and the gap from theta.

    A gap is M at theta minus M at the anchor, as ever; its derivative is that of M at the anchor.
    """

    @property
    def anchor_margins(self) -> Array:
        """M at the anchor (N,), nats per token, without gradient."""
        return stop_gradient(self.margins)


def measure_anchor(
    forward: AnchorForward,
    outputs: tuple[Array, ...],
    config: GAPOConfig,
    backend: Backend,
    gamma: Any,
    rng: Any,
    slopes_at: Callable[[tuple[Array, ...], Array], Sequence[Array]],
) -> Anchor:
    """Steps 2 to 4: the probe's gradient, the perturbation along it, and the margins there.

    With `config.updates_at_anchor` also step 5 there: `slopes_at(outputs at the anchor, gaps)` gives the cotangents.
    """
    xp = backend.xp
    gamma = config.gamma if gamma is None else gamma
    margins = margins_of(outputs)
    objective.check_objective(config.beta, gamma, "sigmoid", 0.0, margins.shape[0])

    # 2. The probe gradient, up to a positive factor: only its direction matters.
    pull, factor = probe_pull(margins, gamma, config, backend)
    names = select(forward.parameters, forward.head, config)
    choice = rounding.choose_anchor(forward, names, config, backend)
    g = forward.pullback(on_outputs(-pull, forward.outputs, xp), names)
    masked = _masking(config, forward.parameters)
    g = masked({name: backend.all_reduce(g[name], "mean") for name in names})
    grad_norm = factor * tree_norm([backend.norm(at_least_float32(x, xp)) for x in g.values() if numel(x)], xp)

    # 3. The perturbation, one parameter at a time.
    direction = g if config.direction == "pessimistic" else masked(backend.normal(names, forward.parameters, rng))
    perturbation = Perturbation(forward, direction, config, backend)
    target, unit_gaps = config.target_gap, None
    if target is not None:
        unit_gaps = -perturbation.of_radius(1.0).along(forward, names)
        perturbation = perturbation.of_radius(Spread(backend).first_order_rho(unit_gaps, target))

    # 4. The margins at the anchor.
    moved: tuple[Array, ...] | None = None
    grads = None
    if choice.anchor == "first_order":
        gaps = -perturbation.along(forward, names) if unit_gaps is None else perturbation.rho * unit_gaps
        anchor_margins = margins - gaps
        radius = perturbation.ideal_radius()
        changed = 0 * grad_norm + 1  # 1.0, but no constant: `mx.compile` loses one that ends up in its state
    elif config.anchor == "auto" and not config.moves:
        moved, anchor_margins, gaps = outputs, margins, 0 * margins  # theta is its own anchor: a forward shows no more
        radius, changed = perturbation.ideal_radius(), 0 * grad_norm
    else:
        if target is not None:
            gaps = margins - margins_of(perturbation.outputs(forward, names))
            perturbation = perturbation.of_radius(Spread(backend).corrected_rho(perturbation.rho, gaps, target))
        if config.updates_at_anchor:
            moved, grads = perturbation.pulled(forward, names, lambda y: slopes_at(y, margins - margins_of(y)))
        else:
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
    return Anchor((moved, gaps), figures, grads)


def _masking(config: GAPOConfig, trainable: Iterable[str]) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """What a mask of `config.perturb` does to arrays by name; without one, nothing."""
    mask = config.perturb
    return partial(mask.applied, trainable=list(trainable)) if isinstance(mask, Mask) else dict


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
