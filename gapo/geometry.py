"""The perturbation: delta from (theta, g, rho), its norm, leaf by leaf (method document, step 3).

`delta = rho * T^2 * g / ||T * g||_2`, where the norm runs over all selected parameters together. T is |theta| in the
adaptive geometry (ASAM, arXiv 2102.11600), and 1 in the L2 ball (SAM, arXiv 2010.01412). The radius of a delta is
`||delta / T||_2`. Signs do not matter to a norm, so theta stands for |theta| below.
"""

from __future__ import annotations

from gapo._namespace import Array, Namespace

_LEAST = 2.0**-126  # float32's least normal number: T^2 times anything finite vanishes beside a T below it


def norm(x: Array, xp: Namespace, size: Array | None = None) -> Array:
    """Euclidean norm of `x`, a scalar; entries are squared in units of `size`, so that small ones do not vanish.

    `size` is about that of the largest entry or above, a scalar >= 0; None to look for that entry, in one more pass.
    """
    size = xp.max(xp.abs(x)) if size is None else size
    unit = x / xp.where(size > 0, size, xp.ones_like(size))
    return size * xp.sqrt(xp.sum(unit * unit))


def scaled_gradient(theta: Array, g: Array, adaptive: bool) -> Array:
    """T * g up to signs: what the global norm is taken of. Shape of `theta`."""
    return theta * g if adaptive else g


def delta(theta: Array, g: Array, step_size: Array, adaptive: bool) -> Array:
    """The perturbation of one parameter, `step_size * T^2 * g`, with `step_size` from `step_size`. Shape of `theta`."""
    scaled = step_size * scaled_gradient(theta, g, adaptive)
    return theta * scaled if adaptive else scaled


def step_size(rho: float, scaled_norm: Array, xp: Namespace) -> Array:
    """rho / ||T * g||, a scalar; 0 where the norm is 0 (a fresh LoRA), so that delta is 0 there, never NaN."""
    zero = scaled_norm == 0
    return xp.where(zero, xp.zeros_like(scaled_norm), rho / xp.where(zero, xp.ones_like(scaled_norm), scaled_norm))


def unscaled_delta(theta: Array, applied: Array, adaptive: bool, xp: Namespace) -> Array:
    """delta / T of one parameter, which the radius is the norm of; 0 where T is 0, since delta is 0 there."""
    return applied / xp.clip(xp.abs(theta), _LEAST, None) if adaptive else applied
