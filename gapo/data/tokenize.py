"""A pair of answers as token ids and labels, in the convention of TRL's preference trainers.

A tokenizer may merge the prompt's last characters with the answer's first into one token. Prompt and answer are
therefore tokenised together, and the answer begins at the first token in which that differs from the prompt alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gapo.data.chat import Chat, chat_prompt, has_turns_of_others, require_text, warn_once
from gapo.data.limits import Cuts, Limits
from gapo.data.messages import common_length
from gapo.data.pair_rows import name_of, require_columns, with_prompt
from gapo.data.special_tokens import behind, frame, start_token, text_tokenizer
from gapo.pairs import SIDES
from gapo.records import in_memory

IGNORE_INDEX = -100
# Merges across the border change a token or two of the prompt. A tokenizer that changes more depends on later text.
_MOST_MERGED = 16
_AT_ONCE = 256  # pairs whose texts the tokenizer gets in one call

_logger = logging.getLogger("gapo")


@dataclass(frozen=True)
class Tokens:
    """The ids and labels of a pair, and how many tokens the limits removed from its prompt and from its answers."""

    columns: dict[str, list[int]]
    prompt_cut: int
    answers_cut: int

    @property
    def are_equal(self) -> bool:
        return self.columns["chosen_input_ids"] == self.columns["rejected_input_ids"]


def tokenize_pair(
    row: dict[str, Any], tokenizer: Any, *, max_length: int | None = 1024, max_prompt_length: int | None = None
) -> dict[str, list[int]]:
    """Token ids and labels of both answers, each behind the prompt; labels are -100 on the prompt.

    Text: prompt and answer are tokenised together, as one text. An answer without an end-of-text token gets one; a
    beginning-of-text token that the text already has is not added again. Messages: the tokenizer's chat template
    renders them, with the row's "tools" and "chat_template_kwargs" (each also as JSON text). Messages of the prompt
    that the answers repeat are removed from the answers (see `gapo.data.read_pairs`).

    Truncation to `max_length` removes the start of the prompt first, then the ends of the answers. A beginning-of-text
    token stays. Both answers keep the same prompt.

    Args:
        row: a pair with "prompt", "chosen", "rejected": text, or lists of messages.
        tokenizer: a `transformers` tokenizer, or a processor that has one.
        max_length: most tokens of prompt and answer together, >= 2; None for no limit.
        max_prompt_length: most tokens of the prompt, of which the last are kept; None for no limit of its own.

    Returns:
        "chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels", each a list of `seq` ids.

    Raises:
        ValueError: the row is not a pair, or holds images or sounds. An answer has no token, or both are the same
            tokens (only a warning, if truncation is the cause). The chat template refuses the messages. The answer's
            first token is undefined. A limit is too small.
    """
    limits = Limits(max_length, max_prompt_length)
    tokens = tokens_of(row, tokenizer, limits)
    if tokens.are_equal and not tokens.answers_cut:
        raise ValueError(equal_message(row, tokens, limits))
    if tokens.are_equal:
        _logger.warning(equal_message(row, tokens, limits))
    return tokens.columns


def tokenize_pairs(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    name: str = "pairs",
) -> list[dict[str, Any]]:
    """The rows with the token ids and labels of `tokenize_pair`.

    Pairs whose answers are the same tokens are left out; truncation is the usual cause. One warning counts these pairs
    and the pairs that were cut, and names the first rows of each, from 0.

    Args:
        rows: pairs, as for `tokenize_pair`: a list of dicts, a `datasets.Dataset` or a `pandas.DataFrame`.
        tokenizer: as for `tokenize_pair`; so are the limits.
        name: names the rows in warnings and errors.

    Raises:
        TypeError: `rows` are no rows.
        ValueError: as `tokenize_pair`, naming the row; or every row was left out.
    """
    limits, cuts, pairs = Limits(max_length, max_prompt_length), Cuts(), []
    for number, (row, tokens) in enumerate(tokens_of_each(in_memory(rows, name), tokenizer, limits, name=name)):
        cuts.add(number, tokens.prompt_cut, tokens.answers_cut, tokens.are_equal)
        if not tokens.are_equal:
            pairs.append({**row, **tokens.columns})
    cuts.tell(name, limits)
    return pairs


def tokenize_prompt(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """The ids of the prompt of `row`, as `tokenize_pair` puts them before an answer: what a model continues.

    Args:
        row: "prompt", text or a list of messages, and for the chat template "tools" and "chat_template_kwargs".
        tokenizer: as for `tokenize_pair`.

    Raises:
        ValueError: the chat template refuses the messages.
    """
    tokenizer = text_tokenizer(tokenizer)
    if not isinstance(row["prompt"], str):
        return chat_prompt(row, tokenizer)
    ids = list(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
    return behind(frame(tokenizer)[0], ids) or [start_token(tokenizer)]


def tokens_of(row: dict[str, Any], tokenizer: Any, limits: Limits) -> Tokens:
    """The tokens of `tokenize_pair`, with the number of tokens removed; equal answers are not refused."""
    try:
        return _Tokenizing(tokenizer, limits).all([row])[0]
    except _AtRow as error:
        raise ValueError(str(error.__cause__)) from error.__cause__


def tokens_of_each(
    rows: Iterable[dict[str, Any]], tokenizer: Any, limits: Limits, *, name: str, numbers: Sequence[int] | None = None
) -> Iterator[tuple[dict[str, Any], Tokens]]:
    """Each row with its tokens, as `tokens_of`. The tokenizer gets the texts of many rows in one call, which is faster.

    Args:
        rows: pairs.
        tokenizer: as for `tokenize_pair`.
        limits: likewise.
        name: names the rows in errors.
        numbers: the rows' numbers in errors; None counts from 0.

    Raises:
        ValueError: as `tokenize_pair`, naming the row.
    """
    tokenizing, remaining, done = _Tokenizing(tokenizer, limits), iter(rows), 0
    while chunk := list(islice(remaining, _AT_ONCE)):
        try:
            yield from zip(chunk, tokenizing.all(chunk), strict=True)
        except _AtRow as error:
            place = done + error.place
            number = place if numbers is None else numbers[place]
            raise ValueError(f"row {number} of {name}: {error.__cause__}") from error.__cause__
        done += len(chunk)


class _AtRow(Exception):
    """A row of a chunk cannot be tokenised; the cause says why."""

    def __init__(self, place: int) -> None:
        self.place = place


class _Tokenizing:
    """A tokenizer with limits, and what is known of it once it has been used."""

    def __init__(self, tokenizer: Any, limits: Limits) -> None:
        self._tokenizer, self._limits = text_tokenizer(tokenizer), limits
        self._framing: tuple[list[int], list[int]] | None = None

    def all(self, rows: Sequence[dict[str, Any]]) -> list[Tokens]:
        """The tokens of each row. Raises _AtRow for the first that cannot be tokenised."""
        checked: list[tuple[dict[str, Any] | Chat, list[str] | None]] = []
        texts: list[str] = []
        fault: ValueError | None = None
        for row in rows:
            try:
                checked.append(self._checked(row))
            except ValueError as error:
                fault = error  # of an earlier row that fails below, the error comes first
                break
            texts += checked[-1][1] or []
        encoded = iter(self._encoded(texts))
        tokens = []
        try:
            for pair, row_texts in checked:
                tokens.append(self._tokens(pair, [next(encoded) for _ in row_texts] if row_texts else None))
            if fault is not None:
                raise fault
        except ValueError as error:
            raise _AtRow(len(tokens)) from error
        return tokens

    def _checked(self, row: Any) -> tuple[dict[str, Any] | Chat, list[str] | None]:
        """A pair of text, or its conversations; and its texts: of the prompt, and of both answers behind it."""
        require_columns(row)
        row = with_prompt(row)
        require_text(row)
        if not isinstance(row["chosen"], str):
            chat = Chat(row, self._tokenizer)
            return chat, chat.texts()
        if row["prompt"].strip() and all(row[side].startswith(row["prompt"]) for side in SIDES):
            warn_once(
                "both answers of some pairs begin with the whole prompt, so that the model reads it twice: if the "
                "answers are whole texts, leave out the column 'prompt', and their common start becomes the prompt"
            )
        return row, [row["prompt"], *(row["prompt"] + row[side] for side in SIDES)]

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        # Special tokens are added by `_behind`.
        if texts and hasattr(self._tokenizer, "is_fast"):  # those of transformers take lists
            return list(self._tokenizer(texts, add_special_tokens=False)["input_ids"])
        return [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def _tokens(self, checked: dict[str, Any] | Chat, ids: list[list[int]] | None) -> Tokens:
        if isinstance(checked, Chat):
            row = checked.row
            prompt, answers = checked.split(ids)
            if has_turns_of_others(row):
                warn_once(
                    "some answers hold messages that the policy did not write, such as results of tools. As in TRL, "
                    "their tokens count as the answer's; to leave them out, end the prompt with the last of them"
                )
        else:
            assert ids is not None
            row = checked
            prompt, answers = self._split_text(ids)
        for side, answer in zip(SIDES, answers, strict=True):
            if not answer:
                raise ValueError(f"the {side} answer of row {name_of(row)} has no token")
        if not prompt:  # nor a beginning-of-text token; an answer that begins with the substitute loses its own
            prompt = [start_token(self._tokenizer)]
            answers = [answer[1:] if answer[:1] == prompt and len(answer) > 1 else answer for answer in answers]
        return _truncated(prompt, answers, self._limits, self._tokenizer.bos_token_id)

    def _split_text(self, encoded: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, which begins with the tokenizer's own first tokens, and of the answers behind it."""
        if self._framing is None:
            self._framing = frame(self._tokenizer)
        opening, closing = self._framing
        eos = self._tokenizer.eos_token_id
        prompt, *wholes = [behind(opening, list(ids)) for ids in encoded]
        for whole in wholes:
            if eos is not None and whole[-1:] != [eos]:
                whole.append(eos)
            if closing not in ([], [eos]):
                whole += closing
        # As in TRL: where a merge across the border changes the prompt's last tokens, the answers begin with those.
        shared = min(common_length(prompt, whole) for whole in wholes)
        if len(prompt) - shared > _MOST_MERGED:
            raise ValueError(
                f"the tokenizer splits the prompt differently once an answer follows: only {shared} of its "
                f"{len(prompt)} tokens stay. The answer's first token is therefore undefined: check that the tokenizer "
                "is not random"
            )
        return prompt[:shared], [whole[shared:] for whole in wholes]


def _truncated(prompt: list[int], answers: list[list[int]], limits: Limits, bos: int | None) -> Tokens:
    most = sys.maxsize if limits.max_length is None else limits.max_length
    short_answers = [answer[: most - 1] for answer in answers]  # one token of the prompt predicts an answer's first
    room = min(most - max(map(len, short_answers)), limits.max_prompt_length or sys.maxsize)
    short = prompt
    if len(prompt) > room:  # its last tokens stay, behind the beginning-of-text token
        opening = prompt[:1] if prompt[0] == bos else []
        short = opening + prompt[len(prompt) - room + len(opening) :]
    columns = {}
    for side, answer in zip(SIDES, short_answers, strict=True):
        columns[f"{side}_input_ids"] = short + answer
        columns[f"{side}_labels"] = [IGNORE_INDEX] * len(short) + answer
    return Tokens(columns, len(prompt) - len(short), sum(map(len, answers)) - sum(map(len, short_answers)))


def equal_message(row: dict[str, Any], tokens: Tokens, limits: Limits) -> str:
    """The error or warning about a pair whose answers are the same tokens."""
    reason, remedy = "as the tokenizer and its chat template print them", "leave it out"
    if tokens.answers_cut:
        reason, remedy = f"within max_length={limits.max_length}", "raise max_length, or leave it out"
    return (
        f"the chosen and rejected answers of row {name_of(row)} are the same tokens {reason}: such a pair teaches "
        f"nothing; {remedy}"
    )
