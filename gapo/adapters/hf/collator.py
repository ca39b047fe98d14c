"""`PreferenceCollator`: raw or tokenised pairs to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gapo.data.collate import TOKENIZED, collate_pairs
from gapo.data.pairs import fault, with_prompt
from gapo.data.tokenize import tokenize_pair


class PreferenceCollator:
    """Make a batch of preference pairs: {chosen,rejected}_{input_ids,attention_mask,labels}, each (N, seq) int64.

    Rows are pairs in TRL's formats ("prompt", "chosen", "rejected": text or messages), or rows of
    `gapo.data.tokenize_pair`.

    Args:
        tokenizer: a `transformers` tokenizer. Without a pad token, its end-of-text token pads (padding never counts).
        max_length: most tokens of prompt and answer together; the answer's start stays, the prompt is cut from its
            left.
        max_prompt_length: most tokens of the prompt, or None.
        padding_side: "left" or "right"; None for the tokenizer's own.
        pad_to_multiple_of: round the length up, e.g. to 8 for tensor cores.
        keep: other columns (numbers or booleans) to pass on as tensors, such as "is_flipped". Reference
            log-probabilities, "ref_chosen_logps" and "ref_rejected_logps", are passed on wherever all rows have them.

    Raises:
        ValueError: the tokenizer can pad with nothing. When called: a row is no pair, naming the fault.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError("the tokenizer has neither a pad token nor an end-of-text token: set tokenizer.pad_token")
        self.tokenizer = tokenizer
        self.keep = tuple(keep)
        self._limits: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        self._padding: dict[str, Any] = {
            "pad_token_id": int(pad),
            "padding_side": padding_side or getattr(tokenizer, "padding_side", "right"),
            "pad_to_multiple_of": pad_to_multiple_of,
        }

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        arrays = collate_pairs([{**row, **self.tokenize(row)} for row in rows], **self._padding)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for name in self.keep:
            if any(name not in row for row in rows):
                raise ValueError(f"column {name!r} was to be kept, but a row lacks it; it has {sorted(rows[0])}")
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def tokenize(self, row: dict[str, Any]) -> dict[str, Any]:
        """Token ids and labels of one pair (`gapo.data.tokenize_pair`); a row that has them comes back as it is."""
        if all(name in row for name in TOKENIZED):
            return row
        reason = fault(row)
        if reason is not None:
            raise ValueError(
                f"a row is no preference pair: {reason}. Accepted are prompt, chosen and rejected (text or "
                f"messages), or {', '.join(TOKENIZED)}; got {sorted(row)}. If columns were there before, the Trainer "
                "dropped them: set TrainingArguments(remove_unused_columns=False)"
            )
        return tokenize_pair(with_prompt(row), self.tokenizer, **self._limits)
