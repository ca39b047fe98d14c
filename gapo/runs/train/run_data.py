"""What every training loop of `gapo train` shares: its pairs as tokens, and the line it writes of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gapo.data import tokenize_pairs
from gapo.runs.train.train_config import TrainConfig
from gapo.step import StepResult


@dataclass(frozen=True)
class RunData:
    """The pairs of a run.

    Attributes:
        train: training pairs with "is_flipped", labels as trained on.
        held_out: held-out pairs, labels true.
        summary: where they came from, and what was done to them.
        held_out_flipped: how many held-out pairs came with a flipped label, which was turned back.
        in_both: how many held-out pairs are training pairs too.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    summary: str
    held_out_flipped: int = 0
    in_both: int = 0


def tokenize_rows(
    config: TrainConfig, data: RunData, tokenizer: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows with their token ids and labels."""
    train, held_out = (
        tokenize_pairs(rows, tokenizer, max_length=config.max_length, name=name)
        for name, rows in (("training pairs", data.train), ("held-out pairs", data.held_out))
    )
    return train, held_out


def extent(rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """(greatest token id, most tokens) of tokenised rows."""
    ids = [row[f"{side}_input_ids"] for row in rows for side in ("chosen", "rejected")]
    return max(map(max, ids)), max(map(len, ids))


def total_steps(config: TrainConfig, pairs: int, processes: int = 1) -> int:
    """Optimiser steps of a run on so many training pairs, as transformers counts them."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.epochs * steps_per_epoch(config, pairs, processes)))


def steps_per_epoch(config: TrainConfig, pairs: int, processes: int = 1) -> int:
    """Optimiser steps of one pass; the last one may be of fewer pairs."""
    return max(1, math.ceil(pairs / (config.batch_size * config.accumulation * processes)))


def step_row(step: int, result: StepResult, is_flipped: Iterable[Any], pairs: Iterable[Any]) -> dict[str, Any]:
    """The line of steps.jsonl on one micro-batch: margins, gaps and weights, and which training pairs they are of."""
    columns = {name: np.asarray(getattr(result, name)) for name in ("margins", "anchor_gaps", "weights")}
    rounded = {name: [round(float(v), 5) for v in column] for name, column in columns.items()}
    return {"step": step, **rounded, "is_flipped": [int(v) for v in is_flipped], "pair": [int(v) for v in pairs]}
