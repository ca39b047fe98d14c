"""`PreferenceCollator`: raw or tokenised pairs to a batch of tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gapo.data.collate import TOKENIZED, check_padding, collate_pairs
from gapo.data.limits import Limits
from gapo.data.pair_rows import RowFault, as_pair
from gapo.data.special_tokens import text_tokenizer
from gapo.data.tokenize import Tokens, equal_message, tokens_of, tokens_of_each
from gapo.pairs import SIDES

_logger = logging.getLogger("gapo")


class PreferenceCollator:
    """Make a batch of preference pairs: {chosen,rejected}_{input_ids,attention_mask,labels}, each (N, seq) int64.

    Rows are pairs in TRL's formats ("prompt", "chosen", "rejected": text or messages), or rows of
    `gapo.data.tokenize_pair`. A warning names the first row that a limit cuts, and another one the first row whose
    answers are then the same tokens. Such a row stays in the batch, and teaches nothing.

    Args:
        tokenizer: a `transformers` tokenizer, or a processor that has one. Without a pad token, its end-of-text token
            pads (padding never counts).
        max_length: most tokens of prompt and answer together; the answer's start stays, the prompt is cut from its
            left. None for no limit.
        max_prompt_length: most tokens of the prompt, or None.
        padding_side: "left" or "right"; None for the tokenizer's own.
        pad_to_multiple_of: round the length up, e.g. to 8 for tensor cores.
        keep: other columns (numbers or booleans) to pass on as tensors, such as "is_flipped". Reference
            log-probabilities, "ref_chosen_logps" and "ref_rejected_logps", are passed on wherever all rows have them.

    Raises:
        ValueError: a limit is out of range, or the tokenizer can pad with nothing. When called: a row is no pair,
            naming its place in the batch and the fault.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        self.tokenizer = text_tokenizer(tokenizer)
        if not hasattr(self.tokenizer, "eos_token_id"):
            raise ValueError(
                "tokenizer must be a transformers tokenizer, or a processor that has one; got "
                f"{type(tokenizer).__name__}"
            )
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        pad = next((i for i in ids if i is not None), None)
        if pad is None:
            raise ValueError("the tokenizer has neither a pad token nor an end-of-text token: set tokenizer.pad_token")
        self.keep = tuple(keep)
        self.limits = Limits(max_length, max_prompt_length)
        side = padding_side or getattr(self.tokenizer, "padding_side", "right")
        check_padding(side, pad_to_multiple_of)
        self._padding: dict[str, Any] = {
            "pad_token_id": int(pad),
            "padding_side": side,
            "pad_to_multiple_of": pad_to_multiple_of,
        }
        self._warnings: set[str] = set()

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenized = []
        for place, row in enumerate(rows):
            try:
                tokenized.append({**row, **self.tokenize(row)})
            except ValueError as error:
                raise ValueError(f"row {place} of the batch: {error}") from error
        batch = {name: torch.from_numpy(array) for name, array in collate_pairs(tokenized, **self._padding).items()}
        for name in self.keep:
            lacking = next((place for place, row in enumerate(rows) if row.get(name) is None), None)
            if lacking is not None:
                raise ValueError(
                    f"column {name!r} was to be kept, but a row lacks it: row {lacking} of the batch has "
                    f"{sorted(map(str, rows[lacking]))}"
                )
            try:
                batch[name] = torch.tensor([row[name] for row in rows])
            except (TypeError, ValueError) as error:
                raise ValueError(f"column {name!r} was to be kept, but is no numbers or booleans: {error}") from error
        return batch

    def tokenize(self, row: dict[str, Any]) -> dict[str, Any]:
        """Token ids and labels of one pair (`gapo.data.tokenize_pair`); a row that has them is returned unchanged."""
        if isinstance(row, dict) and all(name in row for name in TOKENIZED):
            return row
        pair, tokens = self.tokens_of(row)
        if tokens.prompt_cut or tokens.answers_cut:
            self._warn(
                "cut",
                f"max_length={self.limits.max_length}, max_prompt_length={self.limits.max_prompt_length} cut "
                f"{tokens.prompt_cut} tokens of a prompt and {tokens.answers_cut} of the ends of its answers. Rows "
                "that follow are cut without a warning",
            )
        if tokens.are_equal:
            self._warn("equal", f"{equal_message(pair, tokens, self.limits)}. It is kept, as are others that follow")
        return tokens.columns

    def tokens_of(self, row: Any) -> tuple[dict[str, Any], Tokens]:
        """A row as a checked pair, and its tokens with how many were cut. Raises ValueError where it is no pair."""
        pair = _pair(row)
        return pair, tokens_of(pair, self.tokenizer, self.limits)

    def tokens_of_each(self, rows: Sequence[Any], numbers: Sequence[int], name: str) -> list[Tokens]:
        """The tokens of several rows, which is faster than of each alone.

        Raises:
            ValueError: a row is no pair, or cannot be tokenised; the message has its number.
        """

        def pairs() -> Iterator[dict[str, Any]]:
            for number, row in zip(numbers, rows, strict=True):
                try:
                    yield _pair(dict(row) if hasattr(row, "keys") else row)
                except ValueError as error:
                    raise ValueError(f"row {number} of {name}: {error}") from error

        each = tokens_of_each(pairs(), self.tokenizer, self.limits, name=name, numbers=numbers)
        return [tokens for _, tokens in each]

    def _warn(self, what: str, text: str) -> None:
        """Log a warning, once for each `what`."""
        if what not in self._warnings:
            self._warnings.add(what)
            _logger.warning(text)


def _pair(row: Any) -> dict[str, Any]:
    try:
        return as_pair(row)
    except RowFault as error:
        raise ValueError(_refusal(row, error)) from None


def _refusal(row: Any, fault: RowFault) -> str:
    text = (
        f"a row is no preference pair: {fault}. Accepted are prompt, chosen and rejected (text or "
        f"messages), or {', '.join(TOKENIZED)}"
    )
    if not isinstance(row, dict):
        return text
    text += f"; got {sorted(map(str, row))}"
    if all(name in row for name in SIDES):
        return text
    return (
        f"{text}. If columns were there before, the Trainer dropped them: set "
        "TrainingArguments(remove_unused_columns=False)"
    )
