"""Rounding and the anchor: which anchor "auto" takes, and what is said where gaps do not fit the probe's gradient.

An exact anchor is the difference of two forwards, which 16-bit weights or a 16-bit forward round away or enlarge: a
weight's change below half a unit in its last place is lost or becomes that unit, at every use. The first-order gap adds
nothing to the weights.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from gapo._namespace import Array, is_half
from gapo.backends.base import Backend, Forward
from gapo.config import GAPOConfig

logger = logging.getLogger(__name__)

# Measured drop over predicted drop: outside, the gaps of an exact anchor are not those of the perturbation.
LEAST, MOST = 0.5, 2.0
# The same of a first-order anchor is 1 but for rounding; found at most 3e-5 in float32 and 0.02 in 16 bits.
_FIRST_ORDER, _FIRST_ORDER_HALF = 0.01, 0.1
# ||T g|| below so many units of rounding is no gradient (both answers alike), and its ratio is noise.
_NOISE = 32

# What each backend's steps have said: once is enough.
_said: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def choose_anchor(forward: Forward, names: Iterable[str], config: GAPOConfig, backend: Backend) -> str:
    """The anchor that `config` names, "exact" or "first_order"; for "auto" the one that is right on this forward."""
    if config.anchor != "auto":
        return config.anchor
    if any(is_half(forward.parameters[name].dtype, backend.xp) for name in names):
        anchor, why = "first_order", "weights that are moved have 16 bits"
    elif forward.half_compute():
        anchor, why = "first_order", "the forward computes with less than float32's precision"
    else:
        anchor, why = "exact", "no 16-bit weights and no 16-bit compute were seen"
    if _first_time(backend, anchor):
        logger.info('anchor="auto" takes anchor="%s": %s', anchor, why)
    return anchor


def check_gaps(
    forward: Forward,
    names: Iterable[str],
    config: GAPOConfig,
    backend: Backend,
    *,
    anchor: str,
    scaled_norm: Array,
    radius: Array,
    changed: Array,
    ratio: Array | None,
    concrete: bool,
) -> None:
    """Warn, once for each cause, where the gaps of this step do not fit its gradient.

    Under a compiler the backend's `call_back` warns when the step has run. Where it cannot, 16-bit weights are warned
    of while the step is traced.

    Args:
        forward, names, config, backend: of the step; `names` are the parameters that were moved.
        anchor: what `choose_anchor` said.
        scaled_norm: scalar, ||T g||.
        radius, changed, ratio: as in `StepResult`.
        concrete: whether their values can be read now.
    """
    if config.rho == 0:
        return
    half = any(is_half(forward.parameters[name].dtype, backend.xp) for name in names)
    told = scaled_norm > _NOISE * (2.0**-52 if scaled_norm.dtype == backend.xp.float64 else 2.0**-23)
    if anchor == "first_order":
        if ratio is not None and concrete and bool(told):
            _check_first_order(float(ratio), lambda: half or forward.half_compute(), backend)
        return
    ratio = scaled_norm * 0 + 1 if ratio is None else ratio  # direction="gaussian" predicts no drop

    def lost(radius: Any, ratio: Any) -> Any:
        far = (ratio < LEAST) | (ratio > MOST)
        return far | (abs(radius / config.rho - 1) > 0.1) if half else far

    def tell(radius: Any, changed: Any, ratio: Any) -> None:
        # Asked again: under jax.vmap a branch runs either way.
        if lost(float(radius), float(ratio)) and _first_time(backend, "lost"):
            text = rounded_away(config.rho, radius, changed, ratio) if half else far_from_linear(config, float(ratio))
            warnings.warn(text, RuntimeWarning, stacklevel=5)

    if concrete:
        if bool(told & lost(radius, ratio)):
            tell(radius, changed, ratio)
        return
    can = backend.call_back(told & lost(radius, ratio), tell, radius, changed, ratio)
    if half and not can and _first_time(backend, "lost"):
        warnings.warn(
            "16-bit weights round the perturbation of an exact anchor away, and this compiled step cannot measure how "
            f"much: look at first_order_ratio, far from 1 where it is lost; {_WAY_OUT}",
            RuntimeWarning,
            stacklevel=4,
        )


def rounded_away(rho: float, radius: Any, changed: Any, ratio: Any) -> str:
    """What is said where 16-bit weights lost a good part of the perturbation."""
    return (
        f"16-bit weights round the perturbation away: its applied radius is {float(radius):.3g} for rho={rho}, "
        f"{float(changed):.2%} of the weights changed, and first_order_ratio is {float(ratio):.3g}; {_WAY_OUT}"
    )


def far_from_linear(config: GAPOConfig, ratio: float) -> str:
    """What is said where the measured drop of an exact anchor is far from the predicted one."""
    seen = f"first_order_ratio is {ratio:.3g}: so many times the drop that the gradient predicts for rho={config.rho}. "
    if config.anchor == "auto":
        return (
            f"{seen}No 16-bit compute was seen, so rho may be too large for the drop to be linear (lower it where that "
            "is not meant); or something rounds unseen, such as a cast within margin_fn, and then "
            'anchor="first_order" is right'
        )
    return (
        f"{seen}Either 16-bit compute (weights, autocast, TF32) rounds theta + delta, and then "
        'anchor="auto" or "first_order" is right, which rounds nothing; or rho is too large for the drop to be linear: '
        "lower it where that is not meant"
    )


def _check_first_order(ratio: float, half: Callable[[], bool], backend: Backend) -> None:
    # `sum |c_i| gap_i = rho ||T g||`: the gaps come pair by pair, g from all pairs at once. A warning, no error: in a
    # batch whose gradients cancel each other, rounding alone can break it.
    if abs(ratio - 1) <= _FIRST_ORDER or (half() and abs(ratio - 1) <= _FIRST_ORDER_HALF):
        return
    if _first_time(backend, "first order"):
        warnings.warn(
            f'first_order_ratio is {ratio:.5g} with anchor="first_order", where it is 1 but for rounding: the gaps of '
            "the pairs do not add up to the gradient of the batch. Either the pairs' gradients cancel almost entirely, "
            "or they overflow or underflow in 16 bits, or a gradient is wrong (a layer that mixes the pairs, a custom "
            'backward): compare with anchor="exact" in float32',
            RuntimeWarning,
            stacklevel=5,
        )


def _first_time(backend: Backend, what: str) -> bool:
    said = _said.setdefault(backend, set())
    if what in said:
        return False
    said.add(what)
    return True


_WAY_OUT = 'use anchor="first_order", which rounds nothing, or "auto"; or keep the weights in float32'
