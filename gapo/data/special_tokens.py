"""The special tokens with which a tokenizer frames a text."""

from __future__ import annotations

from typing import Any


def start_token(tokenizer: Any) -> int:
    """The token that replaces an empty prompt: it predicts the answer's first token."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            "the prompt is empty, and the tokenizer has neither a beginning-of-text nor an end-of-text token to "
            "predict the answer's first token: set tokenizer.bos_token"
        )
    return int(start)


def behind(opening: list[int], ids: list[int]) -> list[int]:
    """`ids` behind `opening`, which the tokenizer itself would add again where the text has it already."""
    return ids if ids[: len(opening)] == opening else opening + ids


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
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
