"""The tiny transformer of `models` under JAX: weights, a batch and a step."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import models

import gapo

CONFIG = gapo.GAPOConfig(rho=0.3)


def margin_fn(params: dict[str, Any], batch: dict[str, Any]) -> tuple[Any, Any]:
    """The tiny transformer on arrays that may be traced."""
    return tuple(
        gapo.sequence_logps(models.logits(params, batch[f"{side}_input_ids"], jnp), batch[f"{side}_labels"])
        for side in ("chosen", "rejected")
    )


def problem(dtype: str = "float32", **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and a batch as JAX arrays; 8 pairs, to be sharded."""
    sizes = {"layers": 1, "width": 16, "vocab": 32}
    params = {name: jnp.asarray(x, dtype) for name, x in models.make_params(**sizes, **options).items()}
    batch = {name: jnp.asarray(x) for name, x in models.make_batch(pairs=8, seq=12, vocab=32).items()}
    return params, batch


def step(config: gapo.GAPOConfig = CONFIG, fn: Any = margin_fn, **options: Any) -> Any:
    return gapo.value_and_grad(fn, config, backend="jax", **options)
