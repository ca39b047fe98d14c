"""The objective: anchor gap, weights, and the loss on the gap (method document, steps 4 and 5; arXiv 2602.04909).

A loss is a function of the logit `x = beta * gap - gamma`. It stands below as its value and its slope (minus its
derivative), unreduced; the public functions check, find the namespace and reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

from gapo._namespace import (
    Array,
    ArrayT,
    Library,
    Namespace,
    at_least_float32,
    namespace,
    require_floating,
    stop_gradient,
)

LossName = Literal["sigmoid", "hinge"]
Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = get_args(Reduction)


def log_sigmoid(x: Array, xp: Namespace) -> Array:
    """log(1 / (1 + exp(-x))), finite for every finite x. Shape of `x`."""
    return -xp.logaddexp(xp.zeros_like(x), -x)


def sigmoid(x: Array, xp: Namespace) -> Array:
    """1 / (1 + exp(-x)). Shape of `x`."""
    return xp.exp(log_sigmoid(x, xp))


def logistic(x: Array, xp: Namespace) -> Array:
    """The logistic loss, -log sigmoid(x). Shape of `x`."""
    return -log_sigmoid(x, xp)


class LossType(NamedTuple):
    """A loss on the logit x: `value(x, xp)` and `slope(x, xp)`, which is -d value / dx."""

    value: Callable[[Array, Namespace], Array]
    slope: Callable[[Array, Namespace], Array]


LOSS_TYPES = {
    "sigmoid": LossType(
        value=logistic,
        slope=lambda x, xp: sigmoid(-x, xp),
    ),
    "hinge": LossType(
        value=lambda x, xp: xp.where(x < 1, 1 - x, xp.zeros_like(x)),
        slope=lambda x, xp: xp.where(x < 1, xp.ones_like(x), xp.zeros_like(x)),
    ),
}


def pair_losses(
    gap: Array, beta: float, gamma: float | Array, loss_type: str, label_smoothing: float, xp: Namespace
) -> Array:
    """Loss of each pair, (N,): (1 - e) l(x) + e l(-x) at x = beta * gap - gamma, with e the label smoothing."""
    x = beta * gap - gamma
    value = LOSS_TYPES[loss_type].value
    if label_smoothing == 0:
        return value(x, xp)
    return (1 - label_smoothing) * value(x, xp) + label_smoothing * value(-x, xp)


def pair_weights(
    gap: Array, beta: float, gamma: float | Array, loss_type: str, label_smoothing: float, xp: Namespace
) -> Array:
    """Minus the derivative of `pair_losses` by the gap, (N,); logistic: beta * sigmoid(gamma - beta * gap)."""
    x = beta * gap - gamma
    slope = LOSS_TYPES[loss_type].slope
    if label_smoothing == 0:
        return beta * slope(x, xp)
    return beta * ((1 - label_smoothing) * slope(x, xp) - label_smoothing * slope(-x, xp))


def reduce(losses: Array, reduction: str, xp: Namespace) -> Array:
    """`losses` (N,) by "mean" or "sum" to a scalar; "none" returns them as they are."""
    if reduction == "mean":
        return xp.mean(losses)
    return xp.sum(losses) if reduction == "sum" else losses


def anchor_gap(
    chosen_logps: ArrayT,
    rejected_logps: ArrayT,
    anchor_chosen_logps: ArrayT,
    anchor_rejected_logps: ArrayT,
    *,
    backend: Library | None = None,
) -> ArrayT:
    """Anchor Gap of each pair: how much its margin drops from the policy to the anchor.

    `Gamma_i = M_i(theta) - sg(M_i(theta~))`, with `M_i = logp(y+_i) - logp(y-_i)` and sg the stop-gradient.

    Args:
        chosen_logps: (N,) length-normalised log-probability of each chosen response under the policy, nats per token.
        rejected_logps: (N,) the same of each rejected response.
        anchor_chosen_logps: (N,) the same of each chosen response under the anchor. Carries no gradient, ever.
        anchor_rejected_logps: (N,) the same of each rejected response under the anchor. Carries no gradient, ever.
        backend: "numpy", "torch", "jax" or "mlx" to state the library; None finds it from the arrays.

    Returns:
        (N,) gaps in nats per token, float32 or wider; differentiable in the first two arguments.

    Raises:
        TypeError: an argument is not an array, not floating point, or not of the library stated or of the others.
        ValueError: the shapes differ or are not (N,) with N >= 1, or `backend` is unknown.

    Source: method document, symbols; arXiv 2602.04909.

    >>> import numpy as np
    >>> float(anchor_gap(np.array([-1.0]), np.array([-2.0]), np.array([-1.5]), np.array([-2.25]))[0])
    0.25
    """
    arrays = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "anchor_chosen_logps": anchor_chosen_logps,
        "anchor_rejected_logps": anchor_rejected_logps,
    }
    xp = namespace(backend, **arrays)
    check_batches(arrays, xp)
    chosen, rejected, anchor_chosen, anchor_rejected = (at_least_float32(x, xp) for x in arrays.values())
    return (chosen - rejected) - stop_gradient(anchor_chosen - anchor_rejected)


def weights(
    anchor_gap: ArrayT,
    *,
    beta: float = 2.5,
    gamma: float | ArrayT = 0.25,
    loss_type: LossName = "sigmoid",
    label_smoothing: float = 0.0,
    backend: Library | None = None,
) -> ArrayT:
    """Weight of each pair in the update: a large gap, a small weight.

    `w_i = beta * sigmoid(gamma - beta * Gamma_i)`

    The gradient of the mean loss is `-(1/N) sum_i w_i grad M_i`. The weights are not normalised.

    Args:
        anchor_gap: (N,) gaps, nats per token.
        beta: logistic temperature, > 0.
        gamma: target gap times beta: a float, or (N,) one for each pair.
        loss_type: "sigmoid" or "hinge", as in `loss`.
        label_smoothing: in [0, 0.5), as in `loss`.
        backend: "numpy", "torch", "jax" or "mlx" to state the library; None finds it from the array.

    Returns:
        (N,) weights in (0, beta) for the default loss, float32 or wider, without gradient.

    Raises:
        TypeError, ValueError: as `loss`.

    Source: method document, step 5.

    >>> import numpy as np
    >>> float(weights(np.array([0.1]), beta=2.5, gamma=0.25)[0])
    1.25
    """
    xp = namespace(backend, anchor_gap=anchor_gap)
    check_batches({"anchor_gap": anchor_gap}, xp)
    check_objective(beta, gamma, loss_type, label_smoothing, n=anchor_gap.shape[0])
    gap = stop_gradient(at_least_float32(anchor_gap, xp))
    return pair_weights(gap, beta, gamma, loss_type, label_smoothing, xp)


def loss(
    chosen_logps: ArrayT,
    rejected_logps: ArrayT,
    anchor_chosen_logps: ArrayT,
    anchor_rejected_logps: ArrayT,
    *,
    beta: float = 2.5,
    gamma: float | ArrayT = 0.25,
    loss_type: LossName = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    backend: Library | None = None,
) -> ArrayT:
    """The GAPO objective on log-probabilities under the policy and under the anchor.

    `L = -(1/N) sum_i log sigmoid(beta * Gamma_i - gamma)`

    Args:
        chosen_logps: (N,) length-normalised log-probability of each chosen response under the policy, nats per token.
        rejected_logps: (N,) the same of each rejected response.
        anchor_chosen_logps: (N,) the same of each chosen response under the anchor. Carries no gradient, ever.
        anchor_rejected_logps: (N,) the same of each rejected response under the anchor. Carries no gradient, ever.
        beta: logistic temperature, > 0.
        gamma: target gap times beta: a float, or (N,) one for each pair.
        loss_type: "sigmoid" (the paper's), or "hinge": `relu(1 - (beta * gap - gamma))`.
        label_smoothing: e in [0, 0.5); the loss becomes `(1 - e) l(x) + e l(-x)` with `x = beta * gap - gamma`.
        reduction: "mean", "sum" or "none".
        backend: "numpy", "torch", "jax" or "mlx" to state the library; None finds it from the arrays.

    Returns:
        Scalar, or (N,) for reduction="none"; float32 or wider, differentiable in the first two arguments.

    Raises:
        TypeError: an argument is not an array, not floating point, or not of the library stated or of the others.
        ValueError: shapes differ or are not (N,) with N >= 1, or an option is out of its range.

    Source: method document, step 5; arXiv 2602.04909. The argument order is DPO's, with the anchor for the reference.

    >>> import numpy as np
    >>> logps = np.array([-1.0, -1.2]), np.array([-2.0, -1.1])
    >>> anchor = np.array([-1.5, -1.2]), np.array([-2.25, -1.1])
    >>> round(float(loss(*logps, *anchor)), 4)
    0.6745
    """
    gap = anchor_gap(chosen_logps, rejected_logps, anchor_chosen_logps, anchor_rejected_logps, backend=backend)
    check_objective(beta, gamma, loss_type, label_smoothing, n=gap.shape[0])
    require_choice("reduction", reduction, REDUCTIONS)
    xp = namespace(gap=gap)
    return reduce(pair_losses(gap, beta, gamma, loss_type, label_smoothing, xp), reduction, xp)


def check_objective(
    beta: float, gamma: float | Array, loss_type: str, label_smoothing: float, n: int | None = None
) -> None:
    """Raise ValueError, naming the argument, for options of the objective that are out of range."""
    require_number("beta", beta, "> 0", lambda v: v > 0)
    if getattr(gamma, "shape", ()) == ():
        require_number("gamma", gamma, "", lambda v: True)
    elif n is None or tuple(gamma.shape) != (n,):  # type: ignore[union-attr]
        raise ValueError(f"gamma must be a number or one for each of the {n} pairs, got shape {tuple(gamma.shape)}")  # type: ignore[union-attr]
    require_choice("loss_type", loss_type, LOSS_TYPES)
    require_number("label_smoothing", label_smoothing, "in [0, 0.5)", lambda v: 0 <= v < 0.5)


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the strings `choices`, whatever it is."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def require_number(name: str, value: object, accepted: str, ok: Callable[[float], bool]) -> None:
    """Raise ValueError unless `value` is a finite number for which `ok` holds; `accepted` says which in the message."""
    try:
        number = float("nan") if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not (abs(number) < float("inf") and ok(number)):  # NaN fails the comparison
        raise ValueError(f"{name} must be a finite number {accepted}".rstrip() + f", got {value!r}")


def check_batches(arrays: dict[str, Array], xp: Namespace) -> None:
    """Raise unless all are floating, of one shape (N,), N >= 1."""
    first = next(iter(arrays))
    shape = tuple(arrays[first].shape)
    for name, x in arrays.items():
        require_floating(x, name, xp)
        if tuple(x.shape) != shape:
            raise ValueError(f"{first} and {name} must have the same shape; got {shape} and {tuple(x.shape)}")
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"{first} must have shape (N,) with N >= 1, one entry for each pair; got {shape}")
