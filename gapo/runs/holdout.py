"""The pairs of a run: read, held out, flipped, and what is to be said of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from gapo.data import Pairs, flip_pairs, generate_pairs, read_pairs
from gapo.data.flip import true_labels
from gapo.data.streams import stream
from gapo.runs.errors import ConfigError
from gapo.runs.splits import evaluation_split, require_split
from gapo.runs.train.run_data import RunData
from gapo.runs.train.train_config import TrainConfig

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def load_data(run: TrainConfig) -> RunData:
    """Read, hold out and flip. The training labels alone are flipped; held-out pairs get their true ones.

    Raises:
        ConfigError: no pair is left to train on or to evaluate on, or a data set lacks the split.
        gapo.data.PairError: the pairs cannot be read.
    """
    pairs, held_out, source = _read(run)
    if not held_out:
        raise ConfigError("no pair is held out to evaluate on: give eval_pairs, or a larger eval_fraction")
    if not pairs.rows:
        raise ConfigError(f"eval_fraction={run.eval_fraction} leaves no pair to train on: lower it")
    rows = flip_pairs(pairs.rows, mode=run.flip_mode, rate=run.flip_rate, seed=run.flip_seed, favour=run.flip_favour)
    came_flipped = sum(bool(row.get("is_flipped")) for row in held_out)
    shared = in_both(held_out, pairs.rows)
    if shared:
        logger.warning(told_in_both(shared, len(held_out)))
    lines = [
        f"train: {pairs.summary()}",
        f"flipped: {_flips(pairs.rows, rows)} ({run.flip_mode}, rate {run.flip_rate})",
        f"held out: {len(held_out)} pairs, {source}",
    ]
    if came_flipped:
        lines.append(told_true_labels(came_flipped, len(held_out), "held-out"))
    if shared:
        lines.append(told_in_both(shared, len(held_out)))
    if run.batch_size > len(rows):
        lines.append(f"batch_size={run.batch_size} is more than there are training pairs: each step takes all of them")
    return RunData(rows, true_labels(held_out), "\n".join(lines), came_flipped, shared)


def _read(run: TrainConfig) -> tuple[Pairs, Rows, str]:
    """Training pairs, held-out ones as they came, and where these came from. What is evaluated on is read first."""
    clean = _evaluation(run)
    if run.pairs == "demo":
        rows = generate_pairs(run.demo_size, seed=run.seed)[: run.limit]
        if clean is None:
            held_out = generate_pairs(max(200, run.demo_size // 10), seed=run.seed, split="test")
            clean = Pairs(held_out), "generated, from other fillings"
        return Pairs(rows, source="generated demonstration pairs"), clean[0].rows, clean[1]
    require_split(run.pairs, run.split)
    pairs = read_pairs(run.pairs, split=run.split, strict=run.strict, limit=run.limit)
    if clean is not None:
        return pairs, clean[0].rows, clean[1]
    return *_hold_out(pairs, run), f"a random {run.eval_fraction:.0%} of the training file"


def _evaluation(run: TrainConfig) -> tuple[Pairs, str] | None:
    if run.eval_pairs is None:
        return None
    split = evaluation_split(run.eval_pairs, run.eval_split)
    pairs = read_pairs(run.eval_pairs, split=split, strict=run.strict)
    return pairs, pairs.summary()


def _hold_out(pairs: Pairs, run: TrainConfig) -> tuple[Pairs, Rows]:
    order = stream(run.seed, "hold-out").permutation(len(pairs.rows))
    count = round(run.eval_fraction * len(order))
    held_out = [pairs.rows[i] for i in sorted(order[:count])]
    rest = [pairs.rows[i] for i in sorted(order[count:])]
    return Pairs(rest, pairs.problems, pairs.source), held_out


def _flips(before: Rows, after: Rows) -> str:
    """How many labels are flipped now, and how many were before."""
    text = f"{sum(row['is_flipped'] for row in after)} of {len(after)} training labels"
    came = [i for i, row in enumerate(before) if row.get("is_flipped")]
    if came:
        undone = sum(not after[i]["is_flipped"] for i in came)
        text += f"; {len(came)} came flipped, {undone} of which were flipped back"
    return text


def told_true_labels(flipped: int, of: int, what: str) -> str:
    """What is said of pairs to evaluate on that came with flipped labels."""
    return f"{flipped} of the {of} {what} pairs are flipped (is_flipped); they are evaluated on their true labels"


def told_in_both(shared: int, of: int, what: str = "held-out") -> str:
    """What is said of pairs that are both trained and evaluated on."""
    return (
        f"{shared} of the {of} {what} pairs are training pairs too (same prompt, same two answers): what is measured "
        "on these is how well they were learned, not how well the policy generalises"
    )


def in_both(rows: Sequence[dict[str, Any]], others: Iterable[dict[str, Any]]) -> int:
    """How many of `rows` are in `others` too: the same prompt and the same two answers, whichever is the chosen one."""
    known = {_content(row) for row in others}
    return sum(_content(row) in known for row in rows)


def _content(row: dict[str, Any]) -> str:
    answers = sorted(json.dumps(row[side]) for side in ("chosen", "rejected"))
    return json.dumps([row["prompt"], *answers])


def fingerprint(rows: Iterable[dict[str, Any]]) -> str:
    """What identifies rows, their labels and their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]
