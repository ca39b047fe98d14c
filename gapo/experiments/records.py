"""What every training loop of `gapo train` shares: its pairs as tokens, and the line it writes of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gapo.data import tokenize_pairs
from gapo.experiments.config import TrainConfig
from gapo.step import StepResult


@dataclass(frozen=True)
class RunData:
    """The pairs of a run: training pairs with "is_flipped", and held-out ones as they came."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    summary: str


def tokenize_rows(
    config: TrainConfig, data: RunData, tokenizer: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows with their token ids and labels."""
    train, held_out = (
        tokenize_pairs(rows, tokenizer, max_length=config.max_length, name=name)
        for name, rows in (("training pairs", data.train), ("held-out pairs", data.held_out))
    )
    return train, held_out


def step_row(step: int, result: StepResult, is_flipped: Iterable[Any]) -> dict[str, Any]:
    """The line of steps.jsonl on one micro-batch: margins, gaps and weights in the order of its pairs."""
    columns = {name: np.asarray(getattr(result, name)) for name in ("margins", "anchor_gaps", "weights")}
    rounded = {name: [round(float(v), 5) for v in column] for name, column in columns.items()}
    return {"step": step, **rounded, "is_flipped": [int(v) for v in is_flipped]}
