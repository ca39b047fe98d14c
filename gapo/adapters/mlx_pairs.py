"""Pairs as batches of MLX arrays, from mlx-lm's folder convention and with the signature of its `iterate_batches`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import CacheDataset

from gapo.columns import REFERENCE_ALPHA
from gapo.data import batches, read_pairs, tokenize_pairs
from gapo.data.collate import TOKENIZED
from gapo.data.tokenize import IGNORE_INDEX
from gapo.pairs import REFERENCE, SIDES, stacked


def load_pairs(
    folder: str | Path, tokenizer: Any, *, max_length: int = 2048, strict: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tokenised pairs of a folder in mlx-lm's convention: `train.jsonl` and `valid.jsonl`.

    Args:
        folder: the folder; rows have "prompt", "chosen", "rejected", each text or messages.
        tokenizer: mlx-lm's, or one of `transformers`.
        max_length: the greatest number of tokens of prompt and answer together. Use it as
            `TrainingArgs.max_seq_length` too.
        strict: whether a bad row raises; otherwise it is left out.

    Returns:
        (train, valid), for `iterate_batches`. `valid` is empty where there is no `valid.jsonl`.

    Raises:
        gapo.data.PairError: `train.jsonl` is missing, or a file has no pair.
    """
    plain = tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer
    splits = []
    for name in ("train.jsonl", "valid.jsonl"):
        path = Path(folder) / name
        rows = read_pairs(path, strict=strict).rows if path.exists() or name == "train.jsonl" else []
        splits.append(tokenize_pairs(rows, plain, max_length=max_length, name=str(path)) if rows else [])
    return splits[0], splits[1]


def iterate_batches(
    dataset: Sequence[dict[str, Any]],
    batch_size: int,
    max_seq_length: int,
    loop: bool = False,
    seed: int | None = None,
    comm_group: Any = None,
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Batches (ids, labels, reference) of `as_arrays`, with mlx-lm's signature and its sharding over ranks.

    A batch always has three arrays, also without a reference. So mlx-lm's own `default_loss`, which takes two and would
    train on nonsense, raises a TypeError.

    Args:
        dataset: rows of `load_pairs` or `gapo.data.tokenize_pair`; mlx-lm's `CacheDataset` of them works too.
        batch_size: pairs in a batch, over all ranks together. The ranks share one anchor.
        max_seq_length: the longest row that is accepted, in tokens.
        loop: repeat without end, shuffled anew each time. Otherwise, as in evaluation, a data set smaller than a batch
            is one batch. Of a larger data set, the pairs that do not fill a batch are left out, as mlx-lm does.
        seed: of the shuffling; None for 0.
        comm_group: an `mx.distributed` group; each of its ranks yields its share of each batch.

    Raises:
        ValueError: too few pairs, a row that is too long or not tokenised, or a batch that does not divide among the
            ranks.
    """
    rank, size = (comm_group.rank(), comm_group.size()) if comm_group is not None else (0, 1)
    if batch_size % size:
        raise ValueError(f"batch_size={batch_size} pairs cannot be divided among {size} ranks")
    rows = dataset._data if isinstance(dataset, CacheDataset) else dataset  # its items would be processed as mlx-lm's
    _require_tokenized(rows, max_seq_length)
    if len(rows) < batch_size:
        if loop or size > 1 or not len(rows):
            raise ValueError(
                f"the data set has {len(rows)} pairs, fewer than batch_size={batch_size}: give more pairs or a smaller "
                "batch_size, and for validation without pairs no data set"
            )
        batch_size = len(rows)
    padded = batches(
        rows,
        batch_size,
        pad_token_id=0,  # never counted
        seed=seed or 0,
        epochs=None if loop else 1,
        drop_last=True,
    )
    for batch in padded:
        yield as_arrays({name: x[rank::size] for name, x in batch.items()})


def as_arrays(batch: Mapping[str, np.ndarray]) -> tuple[mx.array, mx.array, mx.array]:
    """(ids, labels, reference) of a batch of `gapo.data.collate_pairs`.

    `ids` and `labels` are (2N, seq), chosen rows first. `reference` is (2, N), the reference log-probabilities of the
    chosen and rejected responses, or (2, 0) where the batch has none. Where they were measured with an `ld_alpha`, that
    is its third row.

    Raises:
        ValueError: rows are padded on the left.
    """
    columns = {name: np.array(x) for name, x in batch.items()}
    for side in SIDES:
        mask = columns.get(f"{side}_attention_mask")
        if mask is not None and not mask[:, 0].all():
            raise ValueError(_LEFT)
    ids, labels = map(mx.array, stacked(columns, "input_ids", "labels"))
    reference = [columns[name] for name in (*REFERENCE, REFERENCE_ALPHA) if name in columns]
    return ids, labels, mx.array(np.stack(reference)) if reference else mx.zeros((2, 0))


def require_pairs(ids: mx.array, labels: mx.array) -> None:
    """Raise ValueError unless `ids` and `labels` are (2N, seq)."""
    if ids.ndim != 2 or ids.shape != labels.shape or ids.shape[0] % 2:
        raise ValueError(
            "a batch of pairs is (ids, labels), each (2N, seq), chosen rows first; "
            f"got {tuple(ids.shape)} and {tuple(labels.shape)}. In mlx-lm's train and evaluate, pass "
            "iterate_batches=gapo.adapters.mlx_lm.iterate_batches"
        )


def require_right_padding(ids: np.ndarray, labels: np.ndarray) -> None:
    """Raise ValueError if rows look padded on the left.

    mlx-lm's models are called without a mask, so that padding before a prompt would be attended to. Without a mask,
    padding shows by two signs: every row ends on an answer, and the shorter row of each pair begins with a run of one
    token, as long as the prompts of the pair are shifted against each other.
    """
    counted = labels != IGNORE_INDEX
    start, half = counted.argmax(axis=1), len(ids) // 2
    shift = np.abs(start[:half] - start[half:])
    if not counted[:, -1].all() or shift.max() < 2:
        return
    shorter = np.where(start[:half] > start[half:], ids[:half].T, ids[half:].T).T
    if len({int(token) for row, n in zip(shorter, shift, strict=True) for token in row[:n]}) == 1:
        raise ValueError(_LEFT)


_LEFT = (
    "rows are padded on the left, and MLX models are called without a mask: padding before the prompt would be "
    "attended to. Pad on the right: gapo.data.collate_pairs(..., padding_side='right')"
)


def _require_tokenized(rows: Sequence[Any], max_seq_length: int) -> None:
    longest = 0
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or any(name not in row for name in TOKENIZED):
            has = f"the columns {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise ValueError(
                f"row {i} is not a tokenised pair: it is {has}. Use load_pairs(folder, tokenizer), or "
                "gapo.data.tokenize_pair(row, tokenizer) on each row"
            )
        longest = max(longest, *(len(row[name]) for name in TOKENIZED))
    if longest > max_seq_length:
        raise ValueError(
            f"a row has {longest} tokens, more than max_seq_length={max_seq_length}: pass "
            f"max_length={max_seq_length} to "
            "load_pairs or tokenize_pair, which cut the prompt first"
        )
