"""The versions that a run records."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import gapo

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "jax", "flax", "mlx", "mlx-lm", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python, of gapo and of the libraries that it can run on, as far as they are installed."""
    numbers = {"python": platform.python_version(), "gapo": gapo.__version__}
    for name in _LIBRARIES:
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            continue
    return numbers
