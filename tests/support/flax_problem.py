"""A small causal model of Flax NNX, its optimizer and a batch of pairs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import token_pairs
from flax import nnx

WIDTH, VOCAB = 16, token_pairs.VOCAB


class Mixer(nnx.Module):
    """A causal model in a few lines: a running mean of what came before, and an MLP."""

    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.0, lora: int = 0) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        make = (lambda i, o: nnx.LoRALinear(i, o, lora_rank=lora, rngs=rngs)) if lora else None
        self.up = make(WIDTH, 32) if make else nnx.Linear(WIDTH, 32, rngs=rngs)
        self.down = nnx.Linear(32, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        x = self.embed(ids)
        x = x + jnp.cumsum(x, 1) / jnp.arange(1, ids.shape[1] + 1)[None, :, None]
        return self.lm_head(x + self.down(self.dropout(jax.nn.tanh(self.up(x)))))


def batch(seed: int = 0, pairs: int = 4) -> dict[str, np.ndarray]:
    return token_pairs.arrays(pairs, seed)


def nnx_problem(tx: Any = None, **options: Any) -> tuple[Any, Any]:
    model = Mixer(nnx.Rngs(0), **options)
    return model, nnx.Optimizer(model, tx or optax.sgd(0.1), wrt=nnx.Param)
