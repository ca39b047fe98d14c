"""Data sets of pairs, tokenised once before the training."""

from __future__ import annotations

import logging
from typing import Any

from gapo.adapters.hf.arguments import GAPOConfig
from gapo.adapters.hf.collator import PreferenceCollator
from gapo.data.collate import TOKENIZED
from gapo.data.limits import Cuts

# Columns that a data set has while it is tokenised: how many tokens of a row were cut, and whether it is left out.
_NOTES = ("_gapo_prompt_cut", "_gapo_answers_cut", "_gapo_equal")

_logger = logging.getLogger("gapo")


def tokenized(rows: Any, name: str, collator: PreferenceCollator, args: GAPOConfig) -> Any:
    """`rows` with their token ids, where they are a list or a data set of `datasets`; others are returned unchanged.

    Pairs whose answers are the same tokens, mostly after truncation, are left out. One warning says how many, and how
    many pairs were cut. Streamed rows are tokenised when they are read, other kinds of data sets by the collator.

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
    cuts, tokenized_rows = Cuts(), []
    for index, row in enumerate(rows):
        columns, notes = _row(row, index, name, collator)
        cuts.add(index, *notes)
        if not notes[-1]:
            tokenized_rows.append({**row, **columns})
    cuts.tell(name, collator.limits)
    return tokenized_rows


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

    return mapped.filter(differ, input_columns=list(_NOTES)).remove_columns(list(_NOTES))


def _row(
    row: Any, index: int, name: str, collator: PreferenceCollator
) -> tuple[dict[str, list[int]], tuple[int, int, bool]]:
    """The token columns of a row; the tokens cut of its prompt and of its answers, and whether these are equal."""
    if hasattr(row, "keys") and all(column in row for column in TOKENIZED):
        return {column: row[column] for column in TOKENIZED}, (0, 0, False)
    try:
        _, tokens = collator.tokens_of(dict(row) if hasattr(row, "keys") else row)
    except ValueError as error:
        raise ValueError(f"row {index} of {name}: {error}") from error
    return tokens.columns, (tokens.prompt_cut, tokens.answers_cut, tokens.are_equal)
