"""The step, written once over the `Backend` protocol (method document, "The step")."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, Literal, cast, overload

from gapo._namespace import Array, ArrayT, at_least_float32, is_concrete, settled, stop_gradient
from gapo.anchor import LogProbsAtAnchor, measure_anchor
from gapo.backends import get_backend
from gapo.backends.base import AnchorForward, Backend, Forward, MarginFn, Update, gradients
from gapo.config import GAPOConfig, step_settings
from gapo.objectives import Loss, Objective, resolve
from gapo.pairs import ANCHOR, BatchConstants, LogProbs, require_reference
from gapo.result import Step, StepResult

logger = logging.getLogger(__name__)

Running = Mapping[str, Array]  # statistics of an objective that run from step to step, scalars by name


Margins = Callable[[Any, Any], ArrayT | tuple[ArrayT, ArrayT]]
ObjectiveLike = str | Objective | Callable[..., Any]


@overload
def value_and_grad(
    margin_fn: Margins[ArrayT],
    config: GAPOConfig | None = None,
    objective: ObjectiveLike = "gapo",
    *,
    backend: Literal["torch", "numpy"],
    objective_settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Step[ArrayT, dict[str, ArrayT]]: ...


@overload
def value_and_grad(
    margin_fn: Margins[ArrayT],
    config: GAPOConfig | None = None,
    objective: ObjectiveLike = "gapo",
    *,
    backend: str,
    objective_settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Step[ArrayT, Any]: ...


def value_and_grad(
    margin_fn: MarginFn,
    config: GAPOConfig | None = None,
    objective: ObjectiveLike = "gapo",
    *,
    backend: str,
    objective_settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Step[Any, Any]:
    """The training step as a function: `step(params, batch, *, gamma=None, rng=None, running=None)`.

    It returns (StepResult, grads), and leaves the parameters as they were, also when it raises. With an anchor, as GAPO
    has it, a step takes two forwards (clean, anchor) and two backwards (probe, update). Other objectives take one each.

    Args:
        margin_fn: `margin_fn(params, batch)` returns the margins M_i (N,), or (chosen_logps, rejected_logps), each
            (N,), length-normalised, nats per token, differentiable in `params`.
        config: the settings; None for the defaults. One of an adapter is taken by its `step_config()`.
        objective: a name of `gapo.objectives.OBJECTIVES`, such as "gapo" or "gapo+dpo"; a `gapo.objectives.Objective`;
            or any function of `LogProbs` that returns the loss of each pair, (N,). A function that sets the attribute
            `needs_anchor` gets the anchor.
        backend: "torch", "jax", "mlx" or "numpy".
        objective_settings: settings of the objective, such as {"beta": 0.1}; None for its defaults. "gapo" and "simpo"
            take theirs from `config`, as the weights of "gapo+NAME" do.
        options: passed to the backend.

    Returns:
        `step`. Its `params` are, for "torch" and "mlx", the `nn.Module`; for "jax" any pytree of arrays; for "numpy" a
        dict of float64 arrays. `gamma` overrides the config's by a float or (N,) array of per-pair targets. `rng` feeds
        direction="gaussian": a `torch.Generator`, a JAX or MLX key, a NumPy generator. `running` is the last step's
        `StepResult.running`, for an objective with running statistics; None at the first step. `grads`: "torch" and
        "numpy" a dict by parameter name; "jax" and "mlx" a tree like the trainable parameters. They are this rank's
        own, not averaged over ranks; under FSDP2 the ranks' average, as shards.

        For an objective of summed log-probabilities, `batch` is a mapping that holds "{chosen,rejected}_labels"
        (N, seq) or "{chosen,rejected}_lengths" (N,). For one with a reference, it holds "ref_chosen_logps" and
        "ref_rejected_logps" (N,) too. A batch with "anchor_chosen_logps" and "anchor_rejected_logps" (N,), nats per
        token, brings its own anchor, such as a moving average of the policy; the step then makes none.

    Raises:
        ModuleNotFoundError: the backend's framework is not installed.
        TypeError: the objective is none of these.
        ValueError: unknown backend or objective, or a setting that the objective does not have. From `step`: nothing is
            selected to perturb, a shape does not fit, the batch lacks what the objective needs, or rounding left no
            weight changed.
        FloatingPointError: from `step`: a margin, the loss, or the gradient of the probe is not finite.

    Warns:
        RuntimeWarning: once for each cause. The gaps do not fit the gradient (`first_order_ratio` outside [0.5, 2]), or
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
    starts = count(1)  # steps of an objective with running statistics that were handed none

    def step(
        params: Any, batch: Any, *, gamma: Any = None, rng: Any = None, running: Running | None = None
    ) -> tuple[StepResult, Any]:
        constants = BatchConstants.of(batch)
        anchor = makes_anchor(loss, settings, constants)
        forward = framework.forward(margin_fn, params, batch, settings, anchor=anchor, by_side=loss.by_side)
        result, update = run(
            forward, settings, framework, loss=loss, constants=constants, gamma=gamma, rng=rng, running=running
        )
        if result.running and running is None and next(starts) == 2:
            logger.warning(
                "objective %r keeps running statistics (%s), and a second step was called without them, so that they "
                "start anew: pass running=result.running of the step before",
                loss.name,
                ", ".join(result.running),
            )
        grads = framework.pack(forward, gradients(forward, update))
        _require_finite_losses(result.loss, f"the loss of objective {loss.name!r}", framework.xp)
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
    running: Running | None = None,
) -> tuple[StepResult[Any], Update]:
    """Steps 2 to 5 on a clean forward: the result, and what the gradient is.

    That is the loss's cotangents on `forward.outputs`, whose pullback is the gradient, as the backward of any scalar
    with these derivatives is. With `config.updates_at_anchor` it is the gradients themselves, by name.

    Args:
        forward: the clean forward, made for this loss.
        config: settings of the step.
        backend: the framework.
        loss: of `gapo.objectives.resolve`; None for GAPO's.
        constants: lengths and reference of the batch; None where the loss needs none.
        gamma: overrides the loss's, a float or (N,).
        rng: feeds direction="gaussian".
        running: the last step's `StepResult.running`.
    """
    xp = backend.xp
    loss = (resolve("gapo", config) if loss is None else loss).over(gamma)
    constants = BatchConstants() if constants is None else constants
    if loss.needs_reference and (constants.ref_chosen is None or constants.ref_rejected is None):
        require_reference(loss.name, ())
    outputs = tuple(stop_gradient(at_least_float32(output, xp)) for output in forward.outputs)
    records: set[str] = set()  # the running statistics of the loss
    pair_weights = None if constants.pair_weights is None else settled(stop_gradient(constants.pair_weights))

    def losses_of(logps: LogProbs) -> Array:
        losses = loss.losses(logps)
        records.update(logps.recorded)
        return losses if pair_weights is None else pair_weights * losses

    def differentiated(point: tuple[Array, ...], kind: type[LogProbs], *seen: Any) -> tuple[Array, tuple[Array, ...]]:
        """5. The losses and the derivative of their mean by each output: N numbers, by the framework's own autodiff."""

        def losses_at(outputs: tuple[Array, ...]) -> Array:
            return losses_of(kind.of_step(outputs, constants, *seen, reduce=backend.all_reduce, running=running))

        return backend.differentiate(losses_at, point)

    taken: list[tuple[Array, tuple[Array, ...]]] = []

    def slopes_at(moved: tuple[Array, ...], gaps: Array) -> tuple[Array, ...]:
        taken.append(differentiated(moved, LogProbsAtAnchor, None, settled(gaps)))
        return taken[0][1]

    anchor = None
    if makes_anchor(loss, config, constants):
        anchor = measure_anchor(cast(AnchorForward, forward), outputs, config, backend, gamma, rng, slopes_at)
    seen = anchor.seen if anchor else ()
    at_anchor = bool(taken)
    losses, slopes = taken[0] if at_anchor else differentiated(outputs, LogProbs, *seen)
    # At a fixed chosen log-probability, the derivative by M is minus that by the rejected one.
    weights = outputs[0].shape[0] * (slopes[1] if len(slopes) == 2 else -slopes[0])
    if at_anchor:
        _require_finite_losses(losses, f"the loss of objective {loss.name!r} at the anchor", xp)
    logps = LogProbs.of_step(outputs, constants, *seen, reduce=backend.all_reduce, running=running)
    # Statistics are seen within the differentiation, from where no value may leave: so they are taken again.
    if at_anchor or records:
        losses = losses_of(logps)
    own = {"anchor_margins": logps.anchor_margins, "anchor_gaps": logps.anchor_gaps} if constants.has_anchor else {}
    result = StepResult(
        loss=stop_gradient(xp.mean(losses)),
        margins=logps.margins,
        weights=weights,
        chosen_logps=outputs[0] if len(outputs) == 2 else None,
        rejected_logps=outputs[1] if len(outputs) == 2 else None,
        log_ratio_margins=logps.log_ratio_margins(),
        running=logps.recorded or None,
        **(anchor.figures if anchor else own),
    )
    if anchor is not None and anchor.grads is not None:
        return result, anchor.grads
    return result, tuple(xp.astype(c, y.dtype) for c, y in zip(slopes, forward.outputs, strict=True))


def makes_anchor(loss: Loss, config: GAPOConfig, constants: BatchConstants) -> bool:
    """Whether a step takes an anchor: for its gaps, or for its update.

    Raises:
        ValueError: the update is to be taken at the anchor, and the batch brings one of its own, without weights.
    """
    if constants.has_anchor and config.updates_at_anchor:
        raise ValueError(
            f"update='anchor' takes the gradient at theta + delta, and the batch brings its own anchor ({ANCHOR[0]}): "
            "leave those columns out, or set update='policy'"
        )
    return (loss.needs_anchor or config.updates_at_anchor) and not constants.has_anchor


def _require_finite_losses(losses: Array, what: str, xp: Any) -> None:
    mean = xp.mean(losses)
    if is_concrete(mean) and not bool(xp.isfinite(mean)):
        raise FloatingPointError(f"{what} is {float(mean)}: look at these pairs' tokens and labels")


__all__ = [
    "StepResult",
    "run",
    "value_and_grad",
]
