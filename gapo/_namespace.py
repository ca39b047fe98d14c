"""Operations that the Array API lacks: the library of an array, stop-gradient, and whether values can be read now.

This module imports no framework. If an array of a framework exists, the framework is already in `sys.modules`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeVar

import array_api_compat

Array = Any
Namespace = Any


class AnyArray(Protocol):
    """What type checkers ask of an array, of whichever library."""

    @property
    def shape(self) -> Any:
        """The lengths of its axes."""

    @property
    def dtype(self) -> Any:
        """The type of its elements."""

    def __getitem__(self, key: Any, /) -> Any:
        """A part of it."""


# For the public functions: what comes out is an array of the library of what went in.
ArrayT = TypeVar("ArrayT", bound=AnyArray)
Library = Literal["numpy", "torch", "jax", "mlx"]

# The function that `stop_gradient` applies to a NumPy array within `holding`; None outside.
_held: ContextVar[Callable[[Array], Array] | None] = ContextVar("gapo_constants", default=None)

# The module of each library, and its array types.
_ARRAYS = {
    "numpy": ("numpy", ("ndarray", "generic")),
    "torch": ("torch", ("Tensor",)),
    "jax": ("jax", ("Array",)),
    "mlx": ("mlx.core", ("array",)),
}


def library(x: Array) -> str | None:
    """Name of the library `x` is an array of: "numpy", "torch", "jax", "mlx", "other", or None if it is no array."""
    for name, (module, kinds) in _ARRAYS.items():
        loaded = sys.modules.get(module)
        if loaded is not None and isinstance(x, tuple(getattr(loaded, kind) for kind in kinds)):
            return name
    return "other" if hasattr(x, "__array_namespace__") else None


def namespace(backend: str | None = None, **arrays: Array) -> Namespace:
    """The Array-API namespace shared by the named arrays.

    Args:
        backend: "numpy", "torch", "jax" or "mlx", to require that library; None for any.
        arrays: by the name that an error message uses.

    Raises:
        TypeError: an argument is not an array, the arrays are of several libraries, or of one other than `backend`.
        ValueError: `backend` is not one of the names.
    """
    if backend is not None and not (isinstance(backend, str) and backend in _ARRAYS):
        raise ValueError(f"backend must be one of {', '.join(map(repr, _ARRAYS))} or None, got {backend!r}")
    libraries = {name: library(x) for name, x in arrays.items()}
    for name, kind in libraries.items():
        if kind is None:
            raise TypeError(
                f"{name} must be an array of NumPy, PyTorch, JAX, MLX or another Array-API library, "
                f"got {type(arrays[name]).__name__}"
            )
        if backend is not None and kind != backend:
            raise TypeError(f"backend={backend!r} was stated, but {name} is an array of {kind} ({type(arrays[name])})")
    if len(set(libraries.values())) > 1:
        raise TypeError(f"all arrays must be of one library; got {libraries}")
    if next(iter(libraries.values())) == "torch":
        import array_api_compat.torch as xp  # torch.compile breaks its graph at a look-up, not at an import

        return xp
    return array_api_compat.array_namespace(*arrays.values())


def like(x: Array, of: Array) -> Array:
    """`x` in the library and on the device of `of`, if `x` is a NumPy array or a tensor of another device."""
    kind = library(of)
    if kind == "torch" and library(x) in ("numpy", "torch"):
        return sys.modules["torch"].as_tensor(x, device=of.device)
    if library(x) == "numpy" and kind in ("jax", "mlx"):
        return sys.modules["jax"].numpy.asarray(x) if kind == "jax" else sys.modules["mlx.core"].array(x)
    return x


def stop_gradient(x: Array) -> Array:
    """`x` as a constant, without a copy: no gradient flows through it."""
    kind = library(x)
    if kind == "torch":
        return x.detach()
    if kind == "jax":
        return sys.modules["jax"].lax.stop_gradient(x)
    if kind == "mlx":
        return sys.modules["mlx.core"].stop_gradient(x)
    constants = _held.get()
    return x if constants is None else constants(x)


@contextmanager
def holding(constants: list[Array], again: bool) -> Iterator[None]:
    """Keep constants constant while a function is differentiated by finite differences, as the NumPy backend does.

    NumPy has no stop-gradient. A constant that is computed from the parameters would change with them, and its change
    would count as gradient. The first run therefore records each array that passes `stop_gradient`; runs at other
    points get the recorded arrays, in the same order.

    Args:
        constants: the record; the first run fills it.
        again: False for the first run, True for the others.
    """
    values = iter(constants)

    def write(x: Array) -> Array:
        constants.append(x)
        return x

    token = _held.set((lambda x: next(values)) if again else write)
    try:
        yield
    finally:
        _held.reset(token)


def is_concrete(x: Array) -> bool:
    """Whether the values of `x` can be read now; False under a tracer (jax.jit, torch.compile, mx.compile)."""
    kind = library(x)
    if kind == "torch":
        return not sys.modules["torch"].compiler.is_compiling()
    if kind == "jax":
        return not isinstance(x, sys.modules["jax"].core.Tracer)
    if kind == "mlx":
        try:
            sys.modules["mlx.core"].eval(x)
        except (RuntimeError, ValueError):  # mx.compile and mx.vmap refuse to evaluate their placeholders
            return False
    return True


def settled(x: Array) -> Array:
    """`x` without the graph behind it, which only MLX arrays keep. Where its values cannot be read, `x` itself.

    MLX's `vjp` un-marks the tracers behind all that its function closes over. The next evaluation cuts the graph there,
    and a gradient that surrounds it is 0 without an error. So what such a function closes over is settled before.
    """
    if library(x) == "mlx" and is_concrete(x):
        return sys.modules["mlx.core"].array(x.tolist(), x.dtype)
    return x


def is_half(dtype: Any, xp: Namespace) -> bool:
    """Whether `dtype` is a floating type of fewer than 32 bits (float16, bfloat16)."""
    return any(dtype == getattr(xp, name) for name in ("float16", "bfloat16") if hasattr(xp, name))


def at_least_float32(x: Array, xp: Namespace) -> Array:
    """`x`, with float16 and bfloat16 widened to float32; float32 and float64 unchanged."""
    return xp.astype(x, xp.float32) if is_half(x.dtype, xp) else x


def require_floating(x: Array, name: str, xp: Namespace) -> None:
    """Raise TypeError, naming the array, unless its dtype is a real floating one."""
    if not xp.isdtype(x.dtype, "real floating") and not is_half(x.dtype, xp):
        raise TypeError(f"{name} must be floating point, got dtype {x.dtype}")


def rounding_unit(x: Array, xp: Namespace) -> float:
    """The spacing of floating-point numbers above 1 in the precision of `x`, float32 or float64."""
    return 2.0**-52 if x.dtype == xp.float64 else 2.0**-23
