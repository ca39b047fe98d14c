"""The pairs of a run: read, held out, flipped, tokenised; and the line that every loop writes of a micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gapo.data import Pairs, flip_pairs
from gapo.data.flip import true_labels
from gapo.data.limits import Limits
from gapo.data.streams import stream
from gapo.data.token_table import tokenized_rows
from gapo.runs import ranks
from gapo.runs.errors import ConfigError
from gapo.runs.held_out import Row, Rows, hold_out_share, in_both, read_both, report_in_both
from gapo.runs.train.train_config import TrainConfig
from gapo.step import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The pairs of a run.

    Attributes:
        train: training pairs with "is_flipped", labels as trained on.
        held_out: held-out pairs, labels true.
        summary: the source of the pairs, and what was done to them.
        held_out_flipped: number of held-out pairs whose label was flipped in their file, and was turned back.
        in_both: number of held-out pairs that are training pairs too.
    """

    train: Rows
    held_out: Rows
    summary: str
    held_out_flipped: int = 0
    in_both: int = 0


def load_data(config: TrainConfig) -> RunData:
    """Read, hold out and flip. The training labels alone are flipped; held-out pairs get their true ones.

    Raises:
        ConfigError: no pair is left to train on or to evaluate on, or a data set lacks the split.
        gapo.data.PairError: the pairs cannot be read.
    """
    pairs, evaluated = read_both(config, generated=max(200, config.demo_size // 10), strict=config.strict)
    if evaluated is not None:
        trained, held_out, source = pairs.rows, evaluated.rows, evaluated.summary()
    else:
        trained, held_out = hold_out_share(pairs.rows, config.eval_fraction, stream(config.seed, "hold-out"))
        source = f"a random {config.eval_fraction:.0%} of the training file"
    if not held_out:
        raise ConfigError("no pair is held out to evaluate on: give eval_pairs, or a larger eval_fraction")
    if not trained:
        raise ConfigError(f"eval_fraction={config.eval_fraction} leaves no pair to train on: lower it")
    rows = flip_pairs(
        trained, mode=config.flip_mode, rate=config.flip_rate, seed=config.flip_seed, favour=config.flip_favour
    )
    came_flipped = sum(bool(row.get("is_flipped")) for row in held_out)
    shared = in_both(held_out, trained)
    if shared:
        logger.warning(report_in_both(shared, len(held_out)))
    lines = [
        f"train: {Pairs(trained, pairs.problems, pairs.source).summary()}",
        f"flipped: {_flips(trained, rows)} ({config.flip_mode}, rate {config.flip_rate})",
        f"held out: {len(held_out)} pairs, {source}",
    ]
    if came_flipped:
        lines.append(
            f"{came_flipped} of the {len(held_out)} held-out pairs are flipped (is_flipped); they are evaluated on "
            "their true labels"
        )
    if shared:
        lines.append(report_in_both(shared, len(held_out)))
    if config.batch_size > len(rows):
        lines.append(
            f"batch_size={config.batch_size} is more than there are training pairs: each step takes all of them"
        )
    return RunData(rows, true_labels(held_out), "\n".join(lines), came_flipped, shared)


def _flips(before: Rows, after: Rows) -> str:
    """The number of flipped labels now, and before."""
    text = f"{sum(row['is_flipped'] for row in after)} of {len(after)} training labels"
    came = [i for i, row in enumerate(before) if row.get("is_flipped")]
    if came:
        undone = sum(not after[i]["is_flipped"] for i in came)
        text += f"; {len(came)} came flipped, {undone} of which were flipped back"
    return text


def tokenize_rows(config: TrainConfig, data: RunData, tokenizer: Any) -> tuple[Rows, Rows]:
    """Training and held-out rows with their token ids and labels, from files in the cache.

    The first process makes the files, and the others read them.
    """
    limits, folder = Limits(config.max_length), Path(config.cache_dir, "tokens")
    with ranks.first_ahead():
        train, held_out = (
            tokenized_rows(rows, tokenizer, limits, name=name, folder=folder, processes=config.dataset_num_proc)
            for name, rows in (("training pairs", data.train), ("held-out pairs", data.held_out))
        )
    return train, held_out


def step_line(step: int, result: StepResult, is_flipped: Iterable[Any], pairs: Iterable[Any]) -> Row:
    """The line of steps.jsonl on one micro-batch, its columns (N,): margins, weights, training pairs, flips.

    An objective with an anchor has anchor gaps too.
    """
    columns = {name: getattr(result, name) for name in ("margins", "anchor_gaps", "weights")}
    rounded = {name: [round(float(v), 5) for v in np.asarray(x)] for name, x in columns.items() if x is not None}
    return {"step": step, **rounded, "is_flipped": [int(v) for v in is_flipped], "pair": [int(v) for v in pairs]}
