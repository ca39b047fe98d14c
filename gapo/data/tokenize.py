"""A pair of answers as token ids and labels, in the convention of TRL's preference trainers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gapo.data.chat import has_turns_of_others, require_text, say_once, split_chat
from gapo.data.limits import Cuts, Limits
from gapo.data.messages import common_length
from gapo.data.rows import ANSWERS, name_of, require_columns, with_prompt

IGNORE_INDEX = -100
# Merges across the border change a token or two of the prompt. More is a tokenizer that reads its text otherwise.
_MOST_MERGED = 16

_logger = logging.getLogger("gapo")


@dataclass(frozen=True)
class Tokens:
    """The ids and labels of a pair, and how many tokens of its prompt and of its answers the limits took."""

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

    The prompt is tokenised alone and together with each answer, so that merges at the border come out as they do in one
    text; an end-of-text token is appended to an answer of plain text that lacks it, and a beginning-of-text token that
    the text has already is not set before it again. Messages go through the tokenizer's chat template, with the row's
    "tools" and "chat_template_kwargs" (each also as JSON text). Messages of the prompt that the answers repeat are
    taken from them (`gapo.data.read_pairs` says which).

    Truncation to `max_length` cuts the prompt from its left first, then the answer's end: the answer's START stays, and
    so does a beginning-of-text token. Both answers keep the same prompt.

    Args:
        row: a pair with "prompt", "chosen", "rejected": text, or lists of messages.
        tokenizer: a `transformers` tokenizer, or a processor that has one.
        max_length: most tokens of prompt and answer together, >= 2; None for no limit.
        max_prompt_length: most tokens of the prompt, from its end; None for no limit of its own.

    Returns:
        "chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels".

    Raises:
        ValueError: the row is no pair, an answer has no token, both are the same tokens (a warning, where truncation
            made them so), the chat template refuses the messages or hides where the answer begins, the row holds
            images, or a limit is too small.
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
    """The rows with their token ids and labels, as `tokenize_pair` makes them.

    Pairs whose answers are the same tokens, mostly once truncated, are left out. How many they are, and how many were
    cut, is said in one warning, with the first rows, counted from 0.

    Raises:
        ValueError: as `tokenize_pair`, naming the row; or no row is left.
    """
    limits, cuts, found = Limits(max_length, max_prompt_length), Cuts(), []
    for number, row in enumerate(rows):
        try:
            tokens = tokens_of(row, tokenizer, limits)
        except ValueError as error:
            raise ValueError(f"row {number} of {name}: {error}") from error
        cuts.add(number, tokens.prompt_cut, tokens.answers_cut, tokens.are_equal)
        if not tokens.are_equal:
            found.append({**row, **tokens.columns})
    cuts.tell(name, limits)
    return found


def tokens_of(row: dict[str, Any], tokenizer: Any, limits: Limits) -> Tokens:
    """What `tokenize_pair` documents, with how much was cut; equal answers are not refused."""
    tokenizer = text_tokenizer(tokenizer)
    require_columns(row)
    row = with_prompt(row)
    require_text(row)
    if isinstance(row["chosen"], str):
        prompt, answers = _split_text(row, tokenizer)
    else:
        prompt, answers = split_chat(row, tokenizer)
        if has_turns_of_others(row):
            say_once(
                "some answers hold messages that the policy did not write, such as results of tools: as in TRL, their "
                "tokens count as the answer's. To leave them out, end the prompt with the last of them"
            )
    for side, answer in zip(ANSWERS, answers, strict=True):
        if not answer:
            raise ValueError(f"the {side} answer of row {name_of(row)} has no token")
    if not prompt:
        prompt = [_start(tokenizer)]
        answers = [answer[1:] if answer[:1] == prompt and len(answer) > 1 else answer for answer in answers]
    return _truncated(prompt, answers, limits, tokenizer.bos_token_id)


def _start(tokenizer: Any) -> int:
    """The token that stands for an empty prompt: the first of an answer needs one before it, which predicts it."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            "the prompt is empty, and the tokenizer has neither a beginning-of-text nor an end-of-text token from "
            "which an answer's first token could be predicted: set tokenizer.bos_token"
        )
    return int(start)


def _truncated(prompt: list[int], answers: list[list[int]], limits: Limits, bos: int | None) -> Tokens:
    most = sys.maxsize if limits.max_length is None else limits.max_length
    kept = [answer[: most - 1] for answer in answers]
    room = min(most - max(map(len, kept)), limits.max_prompt_length or sys.maxsize)
    short = prompt
    if len(prompt) > room:
        opening = prompt[:1] if prompt[0] == bos else []
        short = opening + prompt[len(prompt) - room + len(opening) :]
    columns = {}
    for side, answer in zip(ANSWERS, kept, strict=True):
        columns[f"{side}_input_ids"] = short + answer
        columns[f"{side}_labels"] = [IGNORE_INDEX] * len(short) + answer
    return Tokens(columns, len(prompt) - len(short), sum(map(len, answers)) - sum(map(len, kept)))


def _split_text(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of the answers behind it, all with what the tokenizer opens a text with."""
    opening, closing = _frame(tokenizer)
    eos = tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if ids[: len(opening)] == opening else opening + ids

    if row["prompt"].strip() and all(row[side].startswith(row["prompt"]) for side in ANSWERS):
        say_once(
            "both answers of some pairs begin with the whole prompt, which then stands twice before the model: if the "
            "answers are whole texts, leave out the column 'prompt', and it is taken from them"
        )
    prompt, wholes = encode(row["prompt"]), []
    for side in ANSWERS:
        whole = encode(row["prompt"] + row[side])
        if eos is not None and whole[-1:] != [eos]:
            whole.append(eos)
        wholes.append(whole if closing in ([], [eos]) else whole + closing)
    # As in TRL: a merge across the border may change the prompt's last tokens, and the answers begin where it does.
    shared = min(common_length(prompt, whole) for whole in wholes)
    if len(prompt) - shared > _MOST_MERGED:
        raise ValueError(
            f"the tokenizer reads the prompt otherwise once an answer follows: only {shared} of its {len(prompt)} "
            "tokens stay. No token can be said to be the answer's first: look whether the tokenizer draws at random"
        )
    return prompt[:shared], [whole[shared:] for whole in wholes]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer sets before every text, and what behind it."""
    framed, plain = list(tokenizer("a")["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not plain:  # a vocabulary without this letter
        start = int(framed[:1] == [tokenizer.bos_token_id])
        return framed[:start], framed[start:]
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    return framed[:start], framed[start + len(plain) :]


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer itself, or that of a processor (of a model which sees or hears as well)."""
    inner = getattr(processing_class, "tokenizer", None)
    return inner if hasattr(inner, "eos_token_id") else processing_class


def equal_message(row: dict[str, Any], tokens: Tokens, limits: Limits) -> str:
    """Why a pair of equal tokens is refused."""
    why, remedy = "as the tokenizer and its chat template print them", "leave it out"
    if tokens.answers_cut:
        why, remedy = f"within max_length={limits.max_length}", "raise max_length, or leave it out"
    return (
        f"the chosen and rejected answers of row {name_of(row)} are the same tokens {why}: such a pair teaches "
        f"nothing; {remedy}"
    )
