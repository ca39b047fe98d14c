"""The frameworks `gapo.value_and_grad` runs on, each imported when it is first asked for."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from gapo.backends.base import Backend

BACKENDS = ("numpy", "torch", "jax", "mlx")

_FRAMEWORK = {"numpy": "numpy", "torch": "torch", "jax": "jax", "mlx": "mlx.core"}

__all__ = ["BACKENDS", "get_backend"]


def get_backend(name: str, **options: Any) -> Backend:
    """The backend called `name`; `options` go to it as they are.

    Raises:
        ValueError: `name` is none of `BACKENDS`.
        ModuleNotFoundError: its framework is not installed; the message names the extra to install.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    try:
        importlib.import_module(_FRAMEWORK[name])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'backend={name!r} needs {_FRAMEWORK[name]}, which is not installed: pip install "gapo[{name}]"',
            name=error.name,
        ) from error
    backend: Backend = importlib.import_module(f"gapo.backends.{name}").make_backend(**options)
    return backend
