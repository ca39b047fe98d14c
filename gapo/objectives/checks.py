"""What every objective asks of its arrays and settings, and the log-ratio margin that most of them start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gapo._namespace import Array, Namespace, at_least_float32, namespace, stop_gradient
from gapo.objective import LOSS_TYPES, REDUCTIONS, check_batches, require_choice, require_number

# What a setting accepts, as the message says it and as the check asks it: one meaning for one name, everywhere.
_ACCEPTED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("> 0", lambda v: v > 0),
    "beta_prime": ("> 0", lambda v: v > 0),
    "gamma": ("", lambda v: True),
    "tau": ("> 0", lambda v: v > 0),
    "alpha": ("> 0", lambda v: v > 0),
    "eta": (">= 0", lambda v: v >= 0),
    "clip": ("> 0", lambda v: v > 0),
    "label_smoothing": ("in [0, 0.5)", lambda v: 0 <= v < 0.5),
}


def check_settings(**settings: Any) -> None:
    """Raise ValueError, naming the setting, for one that is out of its range. `gamma` may also be an array (N,)."""
    for name, value in settings.items():
        if name == "loss_type":
            require_choice("loss_type", value, LOSS_TYPES)
        elif name == "reduction":
            require_choice("reduction", value, REDUCTIONS)
        elif not (name == "gamma" and getattr(value, "shape", ()) != ()):
            require_number(name, value, *_ACCEPTED[name])


def prepare(backend: str | None, **arrays: Array) -> tuple[Namespace, list[Array]]:
    """The namespace of the named arrays, and the arrays in float32 or wider; those named "ref_..." as constants.

    Raises:
        TypeError, ValueError: as `gapo.loss` for arrays that do not fit.
    """
    xp = namespace(backend, **arrays)
    check_batches(arrays, xp)
    wide = {name: at_least_float32(x, xp) for name, x in arrays.items()}
    return xp, [stop_gradient(x) if name.startswith("ref_") else x for name, x in wide.items()]


def policy_and_reference(
    chosen_logps: Array, rejected_logps: Array, ref_chosen_logps: Array, ref_rejected_logps: Array, backend: str | None
) -> tuple[Namespace, list[Array]]:
    """`prepare` for the four arrays of an objective with a reference, in DPO's order."""
    return prepare(
        backend,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )


def log_ratio_margins(
    chosen_logps: Array, rejected_logps: Array, ref_chosen_logps: Array, ref_rejected_logps: Array, backend: str | None
) -> tuple[Namespace, Array]:
    """The arrays' namespace, and z (N,): the policy's margin minus the reference's, which is a constant."""
    xp, (chosen, rejected, ref_chosen, ref_rejected) = policy_and_reference(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, backend
    )
    return xp, (chosen - rejected) - (ref_chosen - ref_rejected)
