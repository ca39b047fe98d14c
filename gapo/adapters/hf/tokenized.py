"""Data sets of pairs, tokenised once before the training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from gapo.adapters.hf.arguments import GAPOConfig
from gapo.adapters.hf.collator import PreferenceCollator
from gapo.data.collate import TOKENIZED
from gapo.data.lazy_rows import Rows
from gapo.data.limits import Cuts
from gapo.data.token_table import NOTES, columns_of, tokenized_rows, tokens_key
from gapo.records import in_memory

_STREAMED = 64  # pairs of a stream that are tokenised at a time

_logger = logging.getLogger("gapo")


def tokenized(rows: Any, name: str, collator: PreferenceCollator, args: GAPOConfig) -> Any:
    """`rows` with their token ids, where they are a list, a table of pandas, the rows of `read_pairs` or a data set.

    Others are returned unchanged. Pairs whose answers are the same tokens, mostly after truncation, are left out. One
    warning says how many, and how many pairs were cut. Tokens of data sets are made once, in `dataset_num_proc`
    processes of the first rank, and found again in the cache of `datasets`; those of a list in every rank. Streamed
    rows are tokenised when they are read, other kinds of data sets by the collator.

    Raises:
        TypeError: `rows` are no rows, but a path, a dict of splits, or something else.
        ValueError: a row is no pair, naming it.
    """
    rows = None if rows is None else in_memory(rows, name)
    if isinstance(rows, Rows):
        folder, limits = Path(datasets.config.HF_DATASETS_CACHE, "gapo"), collator.limits
        with args.main_process_first():
            return tokenized_rows(
                rows, collator.tokenizer, limits, name=name, folder=folder, processes=args.dataset_num_proc
            )
    if isinstance(rows, (list, tuple)):
        return _of_list(rows, name, collator)
    if rows is None or not hasattr(rows, "map") or set(TOKENIZED) <= set(rows.column_names or ()):
        return rows

    def tokenize(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return _columns(batch, indices, name, collator)

    if not hasattr(rows, "__len__"):  # streamed
        mapped = rows.map(tokenize, with_indices=True, batched=True, batch_size=_STREAMED)
        return _of_stream(mapped, name, collator)
    with args.main_process_first():
        mapped = rows.map(
            tokenize,
            with_indices=True,
            batched=True,
            num_proc=args.dataset_num_proc,
            # The function's own fingerprint would change with the tokenizer's state and the collator's warnings.
            new_fingerprint=Hasher.hash([rows._fingerprint, name, tokens_key(collator.tokenizer, collator.limits)]),
            desc=f"Tokenising {name}",
        )
        cuts = Cuts()
        for index, notes in enumerate(zip(*(mapped[note] for note in NOTES), strict=True)):
            cuts.add(index, *notes)
        if cuts.equal:
            equal = set(cuts.equal)
            mapped = mapped.select([index for index in range(len(mapped)) if index not in equal])
    cuts.tell(name, collator.limits)
    return mapped.remove_columns(list(NOTES))


def _of_list(rows: Any, name: str, collator: PreferenceCollator) -> list[dict[str, Any]]:
    numbers = [i for i, row in enumerate(rows) if not _has_tokens(row)]
    tokens = dict(zip(numbers, collator.tokens_of_each([rows[i] for i in numbers], numbers, name), strict=True))
    cuts, whole = Cuts(), []
    for index, row in enumerate(rows):
        own = tokens.get(index)
        cuts.add(index, *((0, 0, False) if own is None else (own.prompt_cut, own.answers_cut, own.are_equal)))
        if own is None or not own.are_equal:
            whole.append({**row, **({} if own is None else own.columns)})
    cuts.tell(name, collator.limits)
    return whole


def _has_tokens(row: Any) -> bool:
    return hasattr(row, "keys") and all(column in row for column in TOKENIZED)


def _of_stream(mapped: Any, name: str, collator: PreferenceCollator) -> Any:
    """The stream without equal pairs. It has no end at which to count, so that the first of each kind is warned of."""
    warnings: set[str] = set()

    def warn(text: str) -> None:
        if text not in warnings:
            warnings.add(text)
            _logger.warning("%s: %s", name, text)

    def differ(prompt_cut: int, answers_cut: int, equal: bool) -> bool:
        if prompt_cut or answers_cut:
            warn(f"max_length={collator.limits.max_length} cuts prompts or the ends of answers")
        if equal:
            warn("pairs whose answers are the same tokens are left out")
        return not equal

    return mapped.filter(differ, input_columns=list(NOTES)).remove_columns(list(NOTES))


def _columns(
    batch: dict[str, list[Any]], indices: list[int], name: str, collator: PreferenceCollator
) -> dict[str, list[Any]]:
    """The token columns of several rows, and `NOTES` on them."""
    if all(None not in batch.get(column, [None]) for column in TOKENIZED):
        uncut = {note: [value] * len(indices) for note, value in zip(NOTES, (0, 0, False), strict=True)}
        return {column: batch[column] for column in TOKENIZED} | uncut
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return columns_of(collator.tokens_of_each(rows, indices, name))
