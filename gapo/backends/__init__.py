"""The frameworks `gapo.value_and_grad` runs on, each imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Any

from gapo._extras import named_extra
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
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    with named_extra(f"backend={name!r}", name):
        importlib.import_module(_FRAMEWORK[name])
    backend: Backend = importlib.import_module(f"gapo.backends.{name}").make_backend(**options)
    return backend
