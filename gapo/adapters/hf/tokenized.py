"""Data sets of pairs with their token ids, made once before the training."""

from __future__ import annotations

import logging
from typing import Any

from gapo.adapters.hf.arguments import GAPOConfig
from gapo.adapters.hf.collator import PreferenceCollator
from gapo.data.collate import TOKENIZED
from gapo.data.limits import Cuts

# Columns that a data set has while it is being tokenised: what the limits cut of a row, and whether it is to go.
_NOTES = ("_gapo_prompt_cut", "_gapo_answers_cut", "_gapo_equal")

_logger = logging.getLogger("gapo")


def tokenized(rows: Any, name: str, collator: PreferenceCollator, args: GAPOConfig) -> Any:
    """`rows` with their token ids, where they are a list or a data set of `datasets`.

    Pairs whose answers are the same tokens, mostly once truncated, are left out; how many, and how many were cut, is
    told in one warning. Streamed rows are tokenised as they come, other kinds of data sets batch by batch.

    Raises:
        ValueError: a row is no pair, naming it.
    """
    if isinstance(rows, (list, tuple)):
        return _of_list(rows, name, collator)
    if rows is None or not hasattr(rows, "map") or set(TOKENIZED) <= set(rows.column_names or ()):
        return rows

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        columns, notes = _row(row, index, name, collator)
        return {**columns, **dict(zip(_NOTES, notes, strict=True))}

    if not hasattr(rows, "__len__"):  # streamed
        return _of_stream(rows.map(tokenize, with_indices=True), name, collator)
    with args.main_process_first():
        mapped = rows.map(
            tokenize,
            with_indices=True,
            num_proc=args.dataset_num_proc,
            desc=f"Tokenising {name}",
        )
        cuts = Cuts()
        for index, notes in enumerate(zip(*(mapped[note] for note in _NOTES), strict=True)):
            cuts.add(index, *notes)
        if cuts.equal:
            equal = set(cuts.equal)
            mapped = mapped.select([index for index in range(len(mapped)) if index not in equal])
    cuts.tell(name, collator.limits)
    return mapped.remove_columns(list(_NOTES))


def _of_list(rows: Any, name: str, collator: PreferenceCollator) -> list[dict[str, Any]]:
    cuts, found = Cuts(), []
    for index, row in enumerate(rows):
        columns, notes = _row(row, index, name, collator)
        cuts.add(index, *notes)
        if not notes[-1]:
            found.append({**row, **columns})
    cuts.tell(name, collator.limits)
    return found


def _of_stream(mapped: Any, name: str, collator: PreferenceCollator) -> Any:
    """The stream without equal pairs. It has no end at which to count: the first of each kind is told."""
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            _logger.warning("%s: %s", name, text)

    def differ(prompt_cut: int, answers_cut: int, equal: bool) -> bool:
        if prompt_cut or answers_cut:
            tell(f"max_length={collator.limits.max_length} cuts prompts or the ends of answers")
        if equal:
            tell("pairs whose answers are the same tokens are left out")
        return not equal

    return mapped.filter(differ, input_columns=list(_NOTES)).remove_columns(list(_NOTES))


def _row(
    row: Any, index: int, name: str, collator: PreferenceCollator
) -> tuple[dict[str, list[int]], tuple[int, int, bool]]:
    """The token columns of a row; what was cut of its prompt and of its answers, and whether those are equal."""
    if hasattr(row, "keys") and all(column in row for column in TOKENIZED):
        return {column: row[column] for column in TOKENIZED}, (0, 0, False)
    try:
        _, tokens = collator.tokens_of(dict(row) if hasattr(row, "keys") else row)
    except ValueError as error:
        raise ValueError(f"row {index} of {name}: {error}") from error
    return tokens.columns, (tokens.prompt_cut, tokens.answers_cut, tokens.are_equal)
