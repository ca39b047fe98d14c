"""Data sets of pairs with their token ids, made once before the training."""

from __future__ import annotations

from typing import Any

from gapo.adapters.hf.arguments import GAPOConfig
from gapo.adapters.hf.collator import PreferenceCollator
from gapo.data.collate import TOKENIZED


def tokenized(rows: Any, name: str, collator: PreferenceCollator, args: GAPOConfig) -> Any:
    """`rows` with their token ids, where they are a data set of `datasets`; other rows are tokenised batch by batch."""
    if rows is None or not hasattr(rows, "map") or set(TOKENIZED) <= set(rows.column_names or ()):
        return rows

    def tokenize(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return collator.tokenize(dict(row))
        except ValueError as error:
            raise ValueError(f"row {index} of {name}: {error}") from error

    if not hasattr(rows, "__len__"):  # streamed
        return rows.map(tokenize, with_indices=True)
    with args.main_process_first():
        return rows.map(
            tokenize,
            with_indices=True,
            num_proc=args.dataset_num_proc,
            desc=f"Tokenising {name}",
        )
