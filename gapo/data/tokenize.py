"""A pair of answers as token ids and labels, in the convention of TRL's preference trainers.

A tokenizer may merge the prompt's last characters with the answer's first into one token. Prompt and answer are
therefore tokenised together, and the answer begins at the first token in which that differs from the prompt alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gapo.data.chat import chat_prompt, has_turns_of_others, require_text, split_chat, warn_once
from gapo.data.limits import Cuts, Limits
from gapo.data.messages import common_length
from gapo.data.pair_rows import name_of, require_columns, with_prompt
from gapo.pairs import SIDES

IGNORE_INDEX = -100
# Merges across the border change a token or two of the prompt. A tokenizer that changes more depends on later text.
_MOST_MERGED = 16

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
        rows: pairs, as for `tokenize_pair`.
        tokenizer: as for `tokenize_pair`; so are the limits.
        name: names the rows in warnings and errors.

    Raises:
        ValueError: as `tokenize_pair`, naming the row; or every row was left out.
    """
    limits, cuts, pairs = Limits(max_length, max_prompt_length), Cuts(), []
    for number, row in enumerate(rows):
        try:
            tokens = tokens_of(row, tokenizer, limits)
        except ValueError as error:
            raise ValueError(f"row {number} of {name}: {error}") from error
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
    return _encode(row["prompt"], tokenizer, _frame(tokenizer)[0]) or [_start(tokenizer)]


def tokens_of(row: dict[str, Any], tokenizer: Any, limits: Limits) -> Tokens:
    """The tokens of `tokenize_pair`, with the number of tokens removed; equal answers are not refused."""
    tokenizer = text_tokenizer(tokenizer)
    require_columns(row)
    row = with_prompt(row)
    require_text(row)
    if isinstance(row["chosen"], str):
        prompt, answers = _split_text(row, tokenizer)
    else:
        prompt, answers = split_chat(row, tokenizer)
        if has_turns_of_others(row):
            warn_once(
                "some answers hold messages that the policy did not write, such as results of tools. As in TRL, their "
                "tokens count as the answer's; to leave them out, end the prompt with the last of them"
            )
    for side, answer in zip(SIDES, answers, strict=True):
        if not answer:
            raise ValueError(f"the {side} answer of row {name_of(row)} has no token")
    if not prompt:  # nor a beginning-of-text token; an answer that begins with the substitute loses its own
        prompt = [_start(tokenizer)]
        answers = [answer[1:] if answer[:1] == prompt and len(answer) > 1 else answer for answer in answers]
    return _truncated(prompt, answers, limits, tokenizer.bos_token_id)


def _start(tokenizer: Any) -> int:
    """The token that replaces an empty prompt: it predicts the answer's first token."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            "the prompt is empty, and the tokenizer has neither a beginning-of-text nor an end-of-text token to "
            "predict the answer's first token: set tokenizer.bos_token"
        )
    return int(start)


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


def _split_text(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of the answers behind it; the prompt begins with the tokenizer's own first tokens."""
    opening, closing = _frame(tokenizer)
    eos = tokenizer.eos_token_id
    if row["prompt"].strip() and all(row[side].startswith(row["prompt"]) for side in SIDES):
        warn_once(
            "both answers of some pairs begin with the whole prompt, so that the model reads it twice: if the answers "
            "are whole texts, leave out the column 'prompt', and their common start becomes the prompt"
        )
    prompt, wholes = _encode(row["prompt"], tokenizer, opening), []
    for side in SIDES:
        whole = _encode(row["prompt"] + row[side], tokenizer, opening)
        if eos is not None and whole[-1:] != [eos]:
            whole.append(eos)
        wholes.append(whole if closing in ([], [eos]) else whole + closing)
    # As in TRL: where a merge across the border changes the prompt's last tokens, the answers begin with those.
    shared = min(common_length(prompt, whole) for whole in wholes)
    if len(prompt) - shared > _MOST_MERGED:
        raise ValueError(
            f"the tokenizer splits the prompt differently once an answer follows: only {shared} of its {len(prompt)} "
            "tokens stay. The answer's first token is therefore undefined: check that the tokenizer is not random"
        )
    return prompt[:shared], [whole[shared:] for whole in wholes]


def _encode(text: str, tokenizer: Any, opening: list[int]) -> list[int]:
    """The ids of `text` behind `opening`, which the tokenizer itself would add again where the text has it already."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids if ids[: len(opening)] == opening else opening + ids


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds before every text, and those that it adds after it."""
    framed, plain = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not plain:  # the vocabulary lacks this letter: only the beginning-of-text token can be told from the rest
        start = int(framed[:1] == [tokenizer.bos_token_id])
        return framed[:start], framed[start:]
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    return framed[:start], framed[start + len(plain) :]


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer itself, or the tokenizer of a processor (of a model for text and images or sounds)."""
    inner = getattr(processing_class, "tokenizer", None)
    return inner if hasattr(inner, "eos_token_id") else processing_class


def equal_message(row: dict[str, Any], tokens: Tokens, limits: Limits) -> str:
    """The error or warning about a pair whose answers are the same tokens."""
    reason, remedy = "as the tokenizer and its chat template print them", "leave it out"
    if tokens.answers_cut:
        reason, remedy = f"within max_length={limits.max_length}", "raise max_length, or leave it out"
    return (
        f"the chosen and rejected answers of row {name_of(row)} are the same tokens {reason}: such a pair teaches "
        f"nothing; {remedy}"
    )
