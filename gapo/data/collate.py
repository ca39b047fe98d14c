"""Tokenised pairs as padded arrays, and seeded batches of them: the same on every backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np

from gapo.columns import REFERENCE_ALPHA
from gapo.data.limits import whole_number
from gapo.data.streams import stream
from gapo.data.tokenize import IGNORE_INDEX
from gapo.pairs import REFERENCE, SIDES
from gapo.records import as_sequence, require_row

_LENGTHS, _PAD_TO = 16, 32
TOKENIZED = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def collate_pairs(
    tokenized: Sequence[dict[str, Any]],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
    numbers: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Pad N tokenised pairs to one length: {chosen,rejected}_{input_ids,attention_mask,labels}, each (N, seq) int64.

    Both answers get the same seq, so that they can be stacked. Labels are -100 on padding. If all rows have the columns
    "ref_chosen_logps" and "ref_rejected_logps", the batch has them too, each (N,) float32, and likewise the alpha that
    they were measured with, "ref_ld_alpha".

    Args:
        tokenized: rows of `tokenize_pair`.
        pad_token_id: the id on padding; padding never counts.
        padding_side: "left" or "right".
        pad_to_multiple_of: round seq up to a multiple of this; None for no rounding.
        numbers: the rows' numbers in error messages; None counts from 0.

    Raises:
        TypeError: `tokenized` are no rows.
        ValueError: there is no pair, or `padding_side` is unknown. Or a row lacks a column, or has values other than
            ids and labels; the message names the row.

    >>> row = {"chosen_input_ids": [1, 2, 3], "chosen_labels": [-100, 2, 3],
    ...        "rejected_input_ids": [1, 4], "rejected_labels": [-100, 4]}
    >>> batch = collate_pairs([row], pad_token_id=0)
    >>> batch["rejected_input_ids"].tolist(), batch["rejected_labels"].tolist()
    ([[1, 4, 0]], [[-100, 4, -100]])
    """
    check_padding(padding_side, pad_to_multiple_of)
    if pad_token_id is None:
        raise ValueError("pad_token_id must be a whole number, got None: give any id, since padding never counts")
    tokenized = as_sequence(tokenized, "tokenized")
    if not len(tokenized):
        raise ValueError("a batch needs at least one pair, got none")
    numbers = range(len(tokenized)) if numbers is None else numbers
    names = [_name(require_row(row, n, "tokenized"), n) for row, n in zip(tokenized, numbers, strict=True)]
    for row, place in zip(tokenized, names, strict=True):
        if missing := [name for name in TOKENIZED if name not in row]:
            columns = ", ".join(TOKENIZED)
            raise ValueError(f"tokenised pairs need the columns {columns}; {missing[0]!r} is missing in {place}")
    sides = {side: [_checked(row, side, name) for row, name in zip(tokenized, names, strict=True)] for side in SIDES}
    seq = max(len(ids) for rows in sides.values() for ids, _ in rows)
    if pad_to_multiple_of:
        seq = -(-seq // pad_to_multiple_of) * pad_to_multiple_of
    batch = {}
    for side, rows in sides.items():
        batch[f"{side}_input_ids"] = _pad([ids for ids, _ in rows], seq, pad_token_id, padding_side)
        batch[f"{side}_attention_mask"] = _pad([np.ones_like(ids) for ids, _ in rows], seq, 0, padding_side)
        batch[f"{side}_labels"] = _pad([labels for _, labels in rows], seq, IGNORE_INDEX, padding_side)
    if all(name in row for name in REFERENCE for row in tokenized):
        batch |= {name: np.array([row[name] for row in tokenized], dtype=np.float32) for name in REFERENCE}
        finite = np.isfinite([batch[name] for name in REFERENCE]).all(0)
        if not finite.all():
            raise ValueError(f"the reference log-probabilities of {names[int(finite.argmin())]} are not finite")
        alphas = [row.get(REFERENCE_ALPHA) for row in tokenized]
        if any(alpha is not None for alpha in alphas):
            if (plain := next((name for name, a in zip(names, alphas, strict=True) if a is None), None)) is not None:
                raise ValueError(
                    f"the reference log-probabilities of {plain} were measured without ld_alpha, and those of other "
                    "rows with it: measure them all with the same (with_reference_logps)"
                )
            batch[REFERENCE_ALPHA] = np.array(alphas, dtype=np.float32)
    return batch


def check_padding(padding_side: Any, pad_to_multiple_of: Any) -> None:
    """Raise ValueError unless both settings are accepted."""
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    if pad_to_multiple_of is not None and whole_number("pad_to_multiple_of", pad_to_multiple_of) < 0:
        raise ValueError(f"pad_to_multiple_of must be a whole number >= 1 or None, got {pad_to_multiple_of!r}")


def padding_multiple(tokenized: Sequence[dict[str, Any]]) -> int:
    """The least multiple of 32 that pads these rows to at most 16 lengths.

    JAX, MLX and `torch.compile` compile for each length.
    """
    return _multiple(_longest(tokenized))


def _multiple(longest: int) -> int:
    return _PAD_TO * max(1, -(-longest // (_LENGTHS * _PAD_TO)))


def _longest(tokenized: Sequence[dict[str, Any]]) -> int:
    rows = (require_row(row, number, "tokenized") for number, row in enumerate(tokenized))
    return max((len(row[name]) for row in rows for name in TOKENIZED if row.get(name) is not None), default=0)


def _name(row: dict[str, Any], number: int) -> str:
    return f"row {number}" if row.get("id") is None else f"row {number} (id {row['id']})"


def _checked(row: dict[str, Any], side: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of an answer, each (seq,) integers, with at least one label that counts."""
    ids, labels = (np.asarray(row[f"{side}_{part}"]) for part in ("input_ids", "labels"))
    for part, values in (("input_ids", ids), ("labels", labels)):
        if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
            raise ValueError(
                f"{side}_{part} of {name} must be a list of whole numbers, not empty; got {_briefly(values)}"
            )
    if len(ids) != len(labels):
        raise ValueError(
            f"{name} has {len(ids)} {side}_input_ids and {len(labels)} {side}_labels: give one label for each id"
        )
    counts = labels != IGNORE_INDEX
    if ids.min() < 0 or (counts & (labels < 0)).any():
        raise ValueError(f"{name}: {side} ids must be >= 0, labels >= 0 or {IGNORE_INDEX}; got {_briefly(ids, labels)}")
    if not counts[1:].any():
        raise ValueError(
            f"no token of the {side} answer of {name} counts: its labels are all {IGNORE_INDEX}, except perhaps the "
            "first, which no token predicts"
        )
    if _are_shifted(ids, labels, counts):
        raise ValueError(
            f"the {side}_labels of {name} are shifted: put each label at the position of its own id, because "
            "gapo.sequence_logps shifts them itself"
        )
    return ids, labels


def _are_shifted(ids: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> bool:
    """Whether each label that counts is the NEXT position's id, as where a model does not shift by itself."""
    if (labels[counts] == ids[counts]).all():  # as they should be; a text of one repeated token also looks shifted
        return False
    early = counts[:-1]
    return bool(early.any() and (labels[:-1] == ids[1:])[early].all())


def _briefly(*arrays: np.ndarray) -> str:
    return " and ".join(np.array2string(array, threshold=6, edgeitems=3) for array in arrays).replace("\n", " ")


def _pad(rows: Sequence[np.ndarray], seq: int, value: int, side: str) -> np.ndarray:
    out = np.full((len(rows), seq), value, dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
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

    Each batch also holds "index" (N,), the numbers of its rows.

    Args:
        tokenized: rows of `tokenize_pair`.
        batch_size: pairs in a batch, >= 1.
        pad_token_id: the id on padding.
        seed: of the order of the rows.
        epochs: passes over the rows; None for no end.
        drop_last: leave out an epoch's last batch if it has fewer than `batch_size` pairs.
        skip: leave out this many batches at the start, to resume.
        pad_to_multiple_of: round seq up to a multiple of this; 1 for no rounding. None takes the least multiple of 32
            that leaves at most 16 lengths, and never exceeds the longest of all rows: JAX, MLX and `torch.compile`
            compile for each length.

    Raises:
        TypeError: `tokenized` are no rows.
        ValueError: `batch_size` is not positive, or exceeds the number of rows while `drop_last`; a row is not a
            tokenised pair (the message names it).
    """
    tokenized = as_sequence(tokenized, "tokenized")
    if batch_size < 1 or (drop_last and batch_size > len(tokenized)):
        raise ValueError(f"batch_size must be from 1 to the number of pairs, {len(tokenized)}; got {batch_size}")
    longest = _longest(tokenized)
    multiple = pad_to_multiple_of or _multiple(longest)
    numbers = count()
    for epoch in count() if epochs is None else range(epochs):
        order = stream(seed, "batches", epoch).permutation(len(tokenized))
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            if drop_last and len(index) < batch_size:
                break
            if next(numbers) < skip:
                continue
            padded = collate_pairs(
                [tokenized[i] for i in index],
                pad_token_id=pad_token_id,
                pad_to_multiple_of=multiple,
                numbers=index.tolist(),
            )
            if pad_to_multiple_of is None:  # a model may have no position beyond the longest row
                padded = {name: x[:, :longest] if x.ndim == 2 else x for name, x in padded.items()}
            yield {**padded, "index": index}
