"""A model of mlx-lm from its folder, a batch for it, and its training by mlx-lm's own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import token_pairs
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

import gapo
from gapo.adapters import mlx_lm as adapter

CONFIG = gapo.GAPOConfig(rho=0.3)


def load(folder: Path, lora: bool = False) -> Any:
    model, _ = mlx_lm.load(str(folder))
    model.update(tree_map_float(model))
    if lora:
        model.freeze()
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    return model


def tree_map_float(model: nn.Module) -> Any:
    return tree_map(lambda x: x.astype(mx.float32), model.parameters())


def one_batch(pairs: int = 4, seed: int = 0) -> tuple[mx.array, mx.array, mx.array]:
    return next(adapter.iterate_batches(token_pairs.pairs(8), pairs, 64, seed=seed))


def run(
    model: nn.Module,
    tmp_path: Path,
    iters: int = 4,
    callback: Any = None,
    config: gapo.GAPOConfig = CONFIG,
    **options: Any,
) -> Any:
    optimizer = optim.SGD(options.pop("learning_rate", 0.1))
    args = TrainingArgs(
        batch_size=4,
        iters=iters,
        max_seq_length=64,
        steps_per_report=1,
        steps_per_eval=2,
        adapter_file=str(tmp_path / "adapters.safetensors"),
        **options,
    )
    callback = adapter.MetricsCallback(model) if callback is None else callback
    rows = token_pairs.pairs(8), token_pairs.pairs(8, seed=3)
    loss = adapter.make_loss(config)
    train(model, optimizer, *rows, args, loss=loss, iterate_batches=adapter.iterate_batches, training_callback=callback)
    return callback
