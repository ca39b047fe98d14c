"""Steps and learning rates of `gapo train`, on every backend as transformers counts and shapes them."""

from __future__ import annotations

import math

from gapo.runs.train.train_config import TrainConfig

SHAPES = ("cosine", "linear", "constant")


def total_steps(config: TrainConfig, pairs: int, processes: int = 1) -> int:
    """Optimiser steps of a run on so many training pairs."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.epochs * steps_per_epoch(config, pairs, processes)))


def steps_per_epoch(config: TrainConfig, pairs: int, processes: int = 1) -> int:
    """Optimiser steps of one pass; the last one may be of fewer pairs."""
    batches = pairs / (config.batch_size * processes)
    whole = math.floor(batches) if config.training_arguments.get("dataloader_drop_last") else math.ceil(batches)
    return max(1, math.ceil(whole / config.accumulation))


def steps_between_evaluations(config: TrainConfig, total: int) -> int:
    """`eval_steps`, or a tenth of the run."""
    return config.eval_steps or max(1, total // 10)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of the step numbered from 0: a linear warm-up, then one of `SHAPES`."""
    warmup = round(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * shape[config.scheduler]
