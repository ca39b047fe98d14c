"""Tokenised pairs to padded arrays, and seeded batches of them, the same on every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np

from gapo.data.tokenize import IGNORE_INDEX

PARTS = ("input_ids", "attention_mask", "labels")
# TRL's names for reference log-probabilities: sums over the response's tokens, nats.
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_PAD_TO = 32
TOKENIZED = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def collate_pairs(
    tokenized: Sequence[dict[str, Any]],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, np.ndarray]:
    """Pad N tokenised pairs to one length: {chosen,rejected}_{input_ids,attention_mask,labels}, each (N, seq) int64.

    Both answers get the same seq, so that they can be stacked. Labels are -100 on padding. Where all rows have the
    columns `REFERENCE`, so has the batch: each (N,) float32.

    Raises:
        ValueError: no pair, a column is missing, or an unknown side.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    if not tokenized:
        raise ValueError("a batch needs at least one pair, got none")
    for name in TOKENIZED:
        if any(name not in row for row in tokenized):
            raise ValueError(f"tokenised pairs need the columns {', '.join(TOKENIZED)}; {name!r} is missing")
    seq = max(len(row[f"{side}_input_ids"]) for row in tokenized for side in ("chosen", "rejected"))
    if pad_to_multiple_of:
        seq = -(-seq // pad_to_multiple_of) * pad_to_multiple_of
    batch = {}
    for side in ("chosen", "rejected"):
        ids = [row[f"{side}_input_ids"] for row in tokenized]
        batch[f"{side}_input_ids"] = _pad(ids, seq, pad_token_id, padding_side)
        batch[f"{side}_attention_mask"] = _pad([[1] * len(row) for row in ids], seq, 0, padding_side)
        batch[f"{side}_labels"] = _pad([row[f"{side}_labels"] for row in tokenized], seq, IGNORE_INDEX, padding_side)
    if all(name in row for name in REFERENCE for row in tokenized):
        batch |= {name: np.array([row[name] for row in tokenized], dtype=np.float32) for name in REFERENCE}
    return batch


def _pad(rows: Sequence[Sequence[int]], seq: int, value: int, side: str) -> np.ndarray:
    out = np.full((len(rows), seq), value, dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        if len(row):
            line[slice(0, len(row)) if side == "right" else slice(seq - len(row), seq)] = row
    return out


def batches(
    tokenized: Sequence[dict[str, Any]],
    batch_size: int,
    *,
    pad_token_id: int,
    seed: int = 0,
    epochs: int | None = 1,
    drop_last: bool = False,
    skip: int = 0,
    pad_to_multiple_of: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Collated batches, shuffled anew each epoch: the same ones for the same seed, whatever the backend.

    Each batch also holds "index" (N,), the rows it was made of. The first `skip` batches are passed over, to resume;
    `epochs` None goes on for ever. `pad_to_multiple_of` None rounds seq up to 32, though never beyond the longest row
    of all: JAX, MLX and `torch.compile` compile anew for each length. 1 pads to the longest row of each batch alone.

    Raises:
        ValueError: `batch_size` is not positive, or greater than the data with `drop_last`.
    """
    if batch_size < 1 or (drop_last and batch_size > len(tokenized)):
        raise ValueError(f"batch_size must be from 1 to the number of pairs, {len(tokenized)}; got {batch_size}")
    longest = max((len(row.get(name, ())) for row in tokenized for name in TOKENIZED), default=0)
    made = 0
    for epoch in count() if epochs is None else range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(tokenized))
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            if drop_last and len(index) < batch_size:
                break
            made += 1
            if made > skip:
                rows = [tokenized[i] for i in index]
                padded = collate_pairs(
                    rows, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of or _PAD_TO
                )
                if pad_to_multiple_of is None:  # a model may have no more positions
                    padded = {n: x[:, :longest] if x.ndim == 2 else x for n, x in padded.items()}
                yield {**padded, "index": index}
