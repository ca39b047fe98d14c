"""Rounding and the anchor: which anchor "auto" takes, and the warning where gaps do not fit the probe's gradient.

An exact gap is the difference of two forwards, which 16 bits of weights or of compute lose or enlarge. A weight's
change below half a unit in its last place vanishes at every use, or becomes that unit. A first-order gap adds nothing
to the weights.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from gapo._namespace import Array, is_half, rounding_unit
from gapo.backends.base import AnchorForward, Backend
from gapo.config import GAPOConfig

logger = logging.getLogger(__name__)

# Measured drop over predicted drop: outside, the gaps of an exact anchor are not those of the perturbation.
LEAST, MOST = 0.5, 2.0
# The same of a first-order anchor is 1 but for rounding: found within 4e-7 in float32 and 4e-3 in bfloat16.
_FIRST_ORDER, _FIRST_ORDER_HALF = 0.01, 0.1
# ||T g|| below so many units of rounding is no gradient (both answers alike), and its ratio is noise.
_NOISE = 32

# The warnings that each backend's steps have given: once is enough.
_warned: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


class Choice(NamedTuple):
    """The anchor of one step, and what was seen of 16 bits.

    Attributes:
        anchor: "exact" or "first_order".
        weights: whether weights that are moved have 16 bits.
        compute: whether the forward computed in 16 bits; False also where nobody looked.
    """

    anchor: str
    weights: bool
    compute: bool


def choose_anchor(forward: AnchorForward, names: Iterable[str], config: GAPOConfig, backend: Backend) -> Choice:
    """The anchor that `config` names; for "auto" the one that is right on this forward, which is logged once.

    Raises:
        ValueError: "auto" sees 16 bits, and the update is to be taken at the anchor, which would be rounded.
    """
    weights = any(is_half(forward.parameters[name].dtype, backend.xp) for name in names)
    if config.anchor != "auto":
        # To warn of, one step of a backend is looked at, since the look costs a little.
        look = config.anchor == "exact" and not weights and config.moves and "looked" not in _warned.get(backend, ())
        return Choice(config.anchor, weights, look and forward.half_compute())
    compute = not weights and forward.half_compute()
    anchor = "first_order" if weights or compute else "exact"
    why = (
        "weights that move have 16 bits"
        if weights
        else "the forward computes with less than float32's precision"
        if compute
        else "no weights and no compute of 16 bits were seen"
    )
    if anchor == "first_order" and config.updates_at_anchor:
        raise ValueError(
            f"update='anchor' takes a gradient at theta + delta, which is rounded here: {why}. Keep weights and "
            "compute in float32, or set update='policy'; anchor='exact' goes on with what rounding leaves"
        )
    if _first_time(backend, anchor):
        logger.info('anchor="auto" takes anchor="%s": %s', anchor, why)
    return Choice(anchor, weights, compute)


def check_gaps(
    forward: AnchorForward,
    choice: Choice,
    config: GAPOConfig,
    backend: Backend,
    *,
    rho: Array,
    scaled_norm: Array,
    radius: Array,
    changed: Array,
    ratio: Array | None,
    concrete: bool,
) -> None:
    """Warn, once for each cause, where the gaps of this step do not fit its gradient.

    Under a compiler the backend's `call_back` warns when the step has run. Where it cannot, and for what is known
    before, the warning comes while the step is traced.

    Args:
        forward, config, backend: of the step.
        choice: what `choose_anchor` said.
        rho: scalar, the radius that was asked for, set or found.
        scaled_norm: scalar, ||T g||.
        radius, changed, ratio: as in `StepResult`.
        concrete: whether their values can be read now.
    """
    if not config.moves:
        return
    if config.target_gap is not None:
        _tell_of_no_spread(rho, config.target_gap, backend, concrete)
    measurable = (rho > 0) & (scaled_norm > _NOISE * rounding_unit(scaled_norm, backend.xp))
    if choice.anchor == "first_order":
        if ratio is not None and concrete and bool(measurable):
            _check_first_order(
                float(ratio), lambda: choice.weights or choice.compute or forward.half_compute(), backend
            )
        return
    ratio = scaled_norm * 0 + 1 if ratio is None else ratio  # direction="gaussian" predicts no drop

    def lost(rho: Any, radius: Any, ratio: Any) -> Any:
        far = (ratio < LEAST) | (ratio > MOST)
        return far | (abs(radius - rho) > 0.1 * rho) if choice.weights else far

    def tell(rho: Any, radius: Any, changed: Any, ratio: Any) -> None:
        # Asked again: under jax.vmap a branch runs either way.
        if (choice.compute or lost(float(rho), float(radius), float(ratio))) and _first_time(backend, "lost"):
            text = _text(config, choice, float(rho), float(radius), float(changed), float(ratio))
            warnings.warn(text, RuntimeWarning, stacklevel=6)

    if concrete:
        if bool(measurable):  # a fresh LoRA's first step has no gradient, and shows nothing
            _first_time(backend, "looked")
            if choice.compute or bool(lost(rho, radius, ratio)):
                tell(rho, radius, changed, ratio)
        return
    can = backend.call_back(measurable & lost(rho, radius, ratio), tell, rho, radius, changed, ratio)
    if (choice.compute or (choice.weights and not can)) and _first_time(backend, "lost"):
        what = "a forward in 16 bits rounds" if choice.compute else "16-bit weights round"
        warnings.warn(
            f"{what} the perturbation of an exact anchor, and this compiled step cannot measure how much. Look at "
            f"first_order_ratio, which is far from 1 where the perturbation is lost; {way_out(config)}",
            RuntimeWarning,
            stacklevel=5,
        )


def _text(config: GAPOConfig, choice: Choice, rho: float, radius: float, changed: float, ratio: float) -> str:
    """The warning of an exact anchor whose gaps are not to be trusted, by cause."""
    if choice.weights:
        return (
            f"16-bit weights round the perturbation away: its applied radius is {radius:.3g} for {asked(config, rho)}, "
            f"{changed:.2%} of the weights changed, and first_order_ratio is {ratio:.3g}; {way_out(config)}"
        )
    if choice.compute:
        return (
            "the forward computes in 16 bits (autocast, a cast, TF32), which round theta + delta at each use. So each "
            f"gap of an exact anchor is off in its own way (first_order_ratio is {ratio:.3g}); {way_out(config)}"
        )
    return far_from_linear(ratio, config, rho)


def way_out(config: GAPOConfig) -> str:
    """What to do where 16 bits round the perturbation."""
    if config.updates_at_anchor:
        return "keep weights and compute in float32, since update='anchor' needs theta + delta as it is"
    return 'use anchor="first_order", which rounds nothing, or "auto"; or keep weights and compute in float32'


def asked(config: GAPOConfig, rho: Any) -> str:
    """What set the radius, for a message: "rho=0.05", or "target_gap=0.3 (rho 0.12)"."""
    return (
        f"rho={config.rho}" if config.target_gap is None else f"target_gap={config.target_gap} (rho {float(rho):.3g})"
    )


def far_from_linear(ratio: float, config: GAPOConfig | None = None, rho: float = 0.0) -> str:
    """The warning where a measured drop is far from the predicted one, with config and radius where they are known."""
    radius = "" if config is None else f" for {asked(config, rho)}"
    seen = f"first_order_ratio is {ratio:.3g}: so many times the drop that the gradient predicts{radius}. "
    if config is not None and config.updates_at_anchor:
        return (
            f"{seen}Where 16-bit compute (weights, autocast, TF32) rounds theta + delta, {way_out(config)}. Or rho is "
            "too large for the drop to be linear: lower it where that is not meant"
        )
    if config is not None and config.anchor == "auto":
        return (
            f"{seen}No 16-bit compute was seen. So rho may be too large for the drop to be linear: lower it where that "
            "is not meant. Or something rounds unseen, such as a cast within margin_fn: then "
            'anchor="first_order" is right'
        )
    return (
        f"{seen}16-bit compute (weights, autocast, TF32) may round theta + delta: then "
        'anchor="auto" or "first_order" is right, which rounds nothing. Or rho is too large for the drop to be linear: '
        "lower it where that is not meant"
    )


def _tell_of_no_spread(rho: Array, target: float, backend: Backend, concrete: bool) -> None:
    """Log once that the gaps of a batch do not spread, so that no radius makes them."""

    def tell(rho: Any) -> None:
        if float(rho) == 0 and _first_time(backend, "no spread"):
            logger.warning(
                "target_gap=%g cannot be reached: the gaps of this batch do not differ at any radius, so rho is 0 and "
                "all its weights are equal. That is so with one pair, with answers that are alike, and at the first "
                "step of a fresh LoRA (B is 0; with adaptive=False it does not happen)",
                target,
            )

    if concrete:
        tell(rho)
    else:
        backend.call_back(rho == 0, tell, rho)


def _check_first_order(ratio: float, half: Callable[[], bool], backend: Backend) -> None:
    # `sum |c_i| gap_i = rho ||T g||` holds by linearity: the gaps come pair by pair, g from all pairs at once. It is a
    # warning and no error, since rounding alone breaks it where the pairs' gradients cancel.
    if abs(ratio - 1) <= _FIRST_ORDER or (half() and abs(ratio - 1) <= _FIRST_ORDER_HALF):
        return
    if _first_time(backend, "first order"):
        warnings.warn(
            f'first_order_ratio is {ratio:.5g} with anchor="first_order", where it is 1 but for rounding: the pairs\' '
            "gaps do not add up to the batch's gradient. The pairs' gradients cancel almost entirely, or they overflow "
            "or underflow in 16 bits. Or a gradient is wrong: a layer mixes the pairs, or has a custom backward. "
            'Compare with anchor="exact" in float32',
            RuntimeWarning,
            stacklevel=6,
        )


def _first_time(backend: Backend, what: str) -> bool:
    warned = _warned.setdefault(backend, set())
    if what in warned:
        return False
    warned.add(what)
    return True
