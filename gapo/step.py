"""The step, written once over the `Backend` protocol (method document, "The step")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from gapo import geometry, objective, rounding
from gapo._namespace import Array, Namespace, at_least_float32, is_concrete, stop_gradient
from gapo.backends import get_backend
from gapo.backends.base import AnchorForward, Backend, Forward, MarginFn, margins_of, on_outputs
from gapo.config import GAPOConfig, step_settings
from gapo.objectives import Loss, Objective, resolve
from gapo.pairs import BatchConstants, LogProbs, require_reference
from gapo.result import StepResult
from gapo.selection import select


def value_and_grad(
    margin_fn: MarginFn,
    config: GAPOConfig | None = None,
    objective: str | Objective | Callable[..., Array] = "gapo",
    *,
    backend: str,
    objective_settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Callable[..., tuple[StepResult, Any]]:
    """The training step as a function: `step(params, batch, *, gamma=None, rng=None) -> (StepResult, grads)`.

    For an objective with an anchor, such as GAPO's, a step takes two forwards (clean, anchor) and two backwards (probe,
    update); for the others one of each. The parameters are as before when it returns or raises.

    Args:
        margin_fn: `margin_fn(params, batch)` returns the margins M_i (N,), or (chosen_logps, rejected_logps), each
            (N,), length-normalised, nats per token, differentiable in `params`.
        config: the settings; None for the defaults. One of an adapter is taken by its `step_config()`.
        objective: a name of `gapo.objectives.OBJECTIVES`, a `gapo.objectives.Objective`, or any function of `LogProbs`
            that returns the loss of each pair, (N,). A function that sets the attribute `needs_anchor` gets the anchor.
        backend: "torch", "jax", "mlx" or "numpy".
        objective_settings: settings of the objective, such as {"beta": 0.1}; None for its defaults. "gapo" and "simpo"
            take theirs from `config`.
        options: passed to the backend.

    Returns:
        `step`. Its `params` are, for "torch" and "mlx", the `nn.Module`; for "jax" any pytree of arrays; for "numpy" a
        dict of float64 arrays. `gamma` overrides the config's by a float or (N,) array of per-pair targets; `rng` feeds
        direction="gaussian" (a `torch.Generator`, a JAX or MLX key, a NumPy generator). `grads`: "torch" and "numpy" a
        dict by parameter name; "jax" and "mlx" a tree like the trainable parameters. They are this rank's own, not
        averaged over ranks; under FSDP2 the ranks' average, as shards.

        An objective of summed log-probabilities needs lengths, and one with a reference needs its log-probabilities:
        `batch` is then a mapping with "{chosen,rejected}_labels" (N, seq) or "{chosen,rejected}_lengths" (N,), and with
        "ref_chosen_logps" and "ref_rejected_logps" (N,).

    Raises:
        ModuleNotFoundError: the backend's framework is not installed.
        TypeError: the objective is none of these.
        ValueError: unknown backend or objective, or a setting that the objective does not have. From `step`: nothing is
            selected to perturb, a shape does not fit, the batch lacks what the objective needs, or rounding left no
            weight changed.
        FloatingPointError: from `step`: a margin, the loss, or the gradient of the probe is not finite.

    Warns:
        RuntimeWarning: once for each cause: the gaps do not fit the gradient (`first_order_ratio` outside [0.5, 2]), or
            16-bit weights lost a tenth of the perturbation's radius.

    Source: method document, "The step"; arXiv 2602.04909.

    >>> import numpy as np
    >>> step = value_and_grad(lambda p, batch: batch @ p["w"], GAPOConfig(adaptive=False, rho=0.5), backend="numpy")
    >>> result, grads = step({"w": np.array([1.0, 1.0])}, np.array([[1.0, 0.0]]))
    >>> round(float(result.anchor_gaps[0]), 6)
    0.5
    """
    name = objective.name if isinstance(objective, Objective) else objective
    settings = step_settings(config, name, objective_settings)
    loss = resolve(objective, settings, objective_settings)
    framework = get_backend(backend, **options)

    def step(params: Any, batch: Any, *, gamma: Any = None, rng: Any = None) -> tuple[StepResult, Any]:
        constants = BatchConstants.of(batch)
        forward = framework.forward(margin_fn, params, batch, settings, anchor=loss.needs_anchor, by_side=loss.by_side)
        result, cotangents = run(forward, settings, framework, loss=loss, constants=constants, gamma=gamma, rng=rng)
        grads = framework.pack(forward, forward.pullback(cotangents))
        if is_concrete(result.loss) and not bool(framework.xp.isfinite(result.loss)):
            raise FloatingPointError(
                f"the loss of objective {loss.name!r} is {float(result.loss)}: look at these pairs' tokens and labels"
            )
        return result, grads

    return step


def run(
    forward: Forward,
    config: GAPOConfig,
    backend: Backend,
    *,
    loss: Loss | None = None,
    constants: BatchConstants | None = None,
    gamma: Any = None,
    rng: Any = None,
) -> tuple[StepResult, tuple[Array, ...]]:
    """Steps 2 to 5 on a clean forward: the result, and the loss's cotangents on `forward.outputs`.

    The gradient is `forward.pullback(cotangents)`, or the backward of any scalar with these derivatives.

    Args:
        forward: the clean forward, made for this loss.
        config: settings of the step.
        backend: the framework.
        loss: of `gapo.objectives.resolve`; None for GAPO's.
        constants: lengths and reference of the batch; None where the loss needs none.
        gamma: overrides the loss's, a float or (N,).
        rng: feeds direction="gaussian".
    """
    xp = backend.xp
    loss = (resolve("gapo", config) if loss is None else loss).over(gamma)
    constants = BatchConstants() if constants is None else constants
    if loss.needs_reference and (constants.ref_chosen is None or constants.ref_rejected is None):
        require_reference(loss.name, ())
    outputs = tuple(stop_gradient(at_least_float32(output, xp)) for output in forward.outputs)
    anchor = None
    if loss.needs_anchor:
        anchor = _anchor(cast(AnchorForward, forward), outputs, config, backend, gamma, rng)

    # 5. The losses, and the derivative of their mean by each output: N numbers, by the framework's own autodiff.
    def losses_at(outputs: tuple[Array, ...]) -> Array:
        return loss.losses(LogProbs.of_step(outputs, constants, *(anchor.seen if anchor else ())))

    losses, slopes = backend.differentiate(losses_at, outputs)
    # At a fixed chosen log-probability, the derivative by M is minus that by the rejected one.
    weights = outputs[0].shape[0] * (slopes[1] if len(slopes) == 2 else -slopes[0])
    logps = LogProbs.of_step(outputs, constants)
    result = StepResult(
        loss=stop_gradient(xp.mean(losses)),
        margins=logps.margins,
        weights=weights,
        chosen_logps=outputs[0] if len(outputs) == 2 else None,
        rejected_logps=outputs[1] if len(outputs) == 2 else None,
        log_ratio_margins=logps.log_ratio_margins() if len(outputs) == 2 and constants.complete else None,
        **(anchor.figures if anchor else {}),
    )
    return result, tuple(xp.astype(c, y.dtype) for c, y in zip(slopes, forward.outputs, strict=True))


class _Anchor(NamedTuple):
    """What steps 2 to 4 found out.

    Attributes:
        seen: what `LogProbs.of_step` takes of it, (outputs at the anchor or None, anchor gaps).
        figures: its fields of `StepResult`.
    """

    seen: tuple[tuple[Array, ...] | None, Array]
    figures: dict[str, Array | None]


def _anchor(
    forward: AnchorForward,
    outputs: tuple[Array, ...],
    config: GAPOConfig,
    backend: Backend,
    gamma: Any,
    rng: Any,
) -> _Anchor:
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

    # 4. The margins at the anchor.
    moved: tuple[Array, ...] | None = None
    if choice.anchor == "first_order":
        gaps = -perturbation.along(forward, names)
        anchor_margins = margins - gaps
        radius = perturbation.ideal_radius()
        changed = 0 * grad_norm + 1  # 1.0, but no constant: `mx.compile` loses one that ends up in its state
    else:
        moved = tuple(stop_gradient(at_least_float32(y, xp)) for y in forward.at(perturbation.move, names))
        anchor_margins = margins_of(moved)
        radius, changed = perturbation.applied()
        gaps = margins - anchor_margins

    drop = backend.all_reduce(xp.sum(pull * gaps), "mean")  # not finite on all ranks if a margin is not on one
    concrete = is_concrete(drop)
    if concrete:  # the first look at a value: a lazy framework has been lazy so far
        _require_finite(margins, grad_norm, g, forward.parameters, xp)
        hint = f"rho={config.rho} moves the weights too far"
        _require_finite_margins(anchor_margins, "the anchor forward", hint, forward.parameters, xp, over_ranks=drop)
        if choice.anchor == "exact":
            perturbation.require_moved(changed, names)
    ratio = perturbation.first_order_ratio(drop)
    rounding.check_gaps(
        forward,
        choice,
        config,
        backend,
        scaled_norm=perturbation.scaled_norm,
        radius=radius,
        changed=changed,
        ratio=ratio,
        concrete=concrete,
    )
    figures = {
        "anchor_margins": anchor_margins,
        "anchor_gaps": gaps,
        "grad_norm": grad_norm,
        "radius": radius,
        "changed_fraction": changed,
        "first_order_ratio": ratio,
    }
    return _Anchor((moved, gaps), figures)


def probe_pull(margins: Array, gamma: Any, config: GAPOConfig, backend: Backend) -> tuple[Array, Array]:
    """-dl/dM of each pair up to a factor: `pull` (N,), the largest over all ranks 1, and the scalar `factor` such that
    `factor * pull` is minus the derivative of the mean probe loss.

    Scaled in the logarithm, since only the direction matters: at large margins the plain derivative underflows.
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
        norms = [backend.norm(self._scaled(forward.parameters[name], x)) for name, x in g.items() if _numel(x)]
        self.scaled_norm = _tree_norm(norms, self._xp)
        self._step_size = geometry.step_size(config.rho, self.scaled_norm, self._xp)
        self._applied: list[tuple[int, Array, Array]] = []  # entries, norm of delta / T, share of changed entries

    def _scaled(self, theta: Array, g: Array) -> Array:
        theta = at_least_float32(stop_gradient(theta), self._xp)
        return geometry.scaled_gradient(theta, at_least_float32(g, self._xp), self._config.adaptive)

    def delta(self, name: str, theta: Array) -> Array:
        """delta of one parameter, float32 or wider whatever the dtype of theta."""
        theta, g = at_least_float32(theta, self._xp), at_least_float32(self._g[name], self._xp)
        return geometry.delta(theta, g, self._step_size, self._config.adaptive)

    def move(self, name: str, theta: Array) -> Array:
        """theta + delta, rounded to the dtype of theta."""
        xp = self._xp
        wide = at_least_float32(theta, xp)
        moved = xp.astype(wide + self.delta(name, theta), theta.dtype)
        if _numel(theta):
            applied = at_least_float32(moved, xp) - wide
            unscaled = geometry.unscaled_delta(wide, applied, self._config.adaptive, xp)
            changed = self._backend.mean(xp.astype(applied != 0, wide.dtype))
            self._applied.append((_numel(theta), self._backend.norm(unscaled), changed))
        return moved

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
        predicted = self._config.rho * self.scaled_norm
        none = predicted == 0
        return xp.where(none, xp.ones_like(drop), drop / xp.where(none, xp.ones_like(drop), predicted))

    def along(self, forward: AnchorForward, names: list[str]) -> Array:
        """Derivative of each pair's margin along delta, (N,), float32 or wider.

        It is linear in delta, so that a power of 2 can lift delta's tiny entries into float16's range and leave again.
        """
        entries = sum(_numel(forward.parameters[name]) for name in names)
        lift = (
            2.0 ** min(100, round(math.log2(max(entries, 1) ** 0.25 / self._config.rho))) if self._config.rho else 1.0
        )
        along = forward.directional(lambda name, theta: lift * self.delta(name, theta), names)
        return at_least_float32(along, self._xp) / lift

    def require_moved(self, changed: Array, names: list[str]) -> None:
        """Raise when the perturbation was lost to rounding altogether."""
        if self._config.rho == 0 or float(changed) != 0 or float(self.scaled_norm) == 0:
            return
        raise ValueError(
            f"rho={self._config.rho} changed none of the {len(names)} selected parameters: theta + delta rounds to "
            'theta. Use anchor="first_order", which rounds nothing, or keep the weights in float32'
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
    """Name of the first array with an entry that is not finite; of a shard this rank's own entries are looked at,
    since the other ranks may not be here.
    """
    for name, x in arrays.items():
        own = x.to_local() if hasattr(x, "to_local") else x
        if not bool(xp.all(xp.isfinite(own))):
            return name
    return None


__all__ = [
    "StepResult",
    "run",
    "value_and_grad",
]
