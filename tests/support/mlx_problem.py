"""A small model of MLX without mlx-lm, a batch of pairs and its margins."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import models
import numpy as np
from mlx import nn

import gapo


class Mixer(nn.Module):
    """A running mean of what came before, and an MLP."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(64, 32)

    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed(ids)
        x = x + mx.cumsum(x, 1) / mx.arange(1, ids.shape[1] + 1)[None, :, None].astype(x.dtype)
        return self.lm_head(x + self.down(self.dropout(mx.tanh(self.up(x)))))


def margin_fn(model: nn.Module, batch: dict[str, np.ndarray]) -> tuple[mx.array, mx.array]:
    chosen, rejected = (
        gapo.sequence_logps(model(mx.array(batch[f"{side}_input_ids"])), mx.array(batch[f"{side}_labels"]))
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def mixer(**options: Any) -> Mixer:
    mx.random.seed(0)
    model = Mixer(**options)
    mx.eval(model.parameters())
    return model


BATCH = models.make_batch(pairs=4, seq=9, vocab=32)
