"""The registry of array libraries that the tests run over, and how each makes, reads and differentiates arrays."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Library:
    """One array library: its name, its modules, the accuracy of its arithmetic on float64 input."""

    name: str
    module: str
    double_rtol: float = 1e-12
    differentiable: bool = True

    def asarray(self, x: Any, dtype: str | None = None) -> Any:
        """`x` as an array of this library, in the dtype called `dtype` or NumPy's own for `x`."""
        module = importlib.import_module(self.module)
        x = np.asarray(x)
        dtype = dtype or x.dtype.name
        if self.name == "torch":
            return module.tensor(x.tolist(), dtype=getattr(module, dtype)).reshape(x.shape)
        if self.name == "mlx":
            with module.stream(module.cpu):
                return module.array(x.tolist(), dtype=getattr(module, dtype)).reshape(x.shape)
        if self.name in ("strict", "numpy"):
            return module.asarray(x.astype(dtype))
        return module.asarray(x.astype(dtype) if dtype != "bfloat16" else x, dtype=getattr(module, dtype))

    def numpy(self, x: Any) -> np.ndarray:
        """`x` as a NumPy array, 16-bit floats widened."""
        if self.name == "torch":
            return x.detach().to("cpu").double().numpy() if x.is_floating_point() else x.numpy()
        if self.name == "mlx":
            mx = importlib.import_module("mlx.core")
            return np.array(x.astype(mx.float64, stream=mx.cpu)) if mx.issubdtype(x.dtype, mx.floating) else np.array(x)
        return np.asarray(x, dtype=np.float64) if "float" in str(x.dtype) else np.asarray(x)

    def grad(self, fn: Callable[..., Any], *args: Any) -> list[np.ndarray]:
        """Gradients of the scalar `fn(*args)` by each argument, by the library's own differentiation."""
        numbers = tuple(range(len(args)))
        if self.name == "torch":
            leaves = [x.detach().clone().requires_grad_() for x in args]
            fn(*leaves).backward()
            return [np.zeros(x.shape) if x.grad is None else self.numpy(x.grad) for x in leaves]
        module = importlib.import_module("jax" if self.name == "jax" else self.module)
        grads = module.grad(fn, argnums=numbers)(*args)
        return [self.numpy(g) for g in (grads if isinstance(grads, tuple) else (grads,))]


LIBRARIES = {
    library.name: library
    for library in (
        Library("numpy", "numpy", differentiable=False),
        Library("strict", "array_api_strict", differentiable=False),
        Library("torch", "torch"),
        Library("jax", "jax.numpy"),
        Library("mlx", "mlx.core", double_rtol=1e-6),  # its float64 exp and log have float32 accuracy
    )
}


def require(module: str) -> Any:
    """The module, or a skip if it is not installed; in CI that is a failure."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        if os.environ.get("CI"):
            pytest.fail(f"{module} is not installed, and CI must test every framework")
        pytest.skip(f"{module} is not installed", allow_module_level=True)


def require_trls_trainers() -> Any:
    """TRL, or a skip as in `require`, also where it cannot import them: 0.24 on transformers 5 wants mergekit."""
    trl = require("trl")
    try:
        trl.DPOTrainer  # noqa: B018
    except RuntimeError as error:
        pytest.skip(f"TRL {trl.__version__} cannot import its trainers: {error}", allow_module_level=True)
    return trl
