"""A pair of answers as token ids and labels, in the convention of TRL's preference trainers."""

from __future__ import annotations

from typing import Any

IGNORE_INDEX = -100


def tokenize_pair(
    row: dict[str, Any], tokenizer: Any, *, max_length: int = 1024, max_prompt_length: int | None = None
) -> dict[str, list[int]]:
    """Token ids and labels of both answers, each behind the prompt; labels are -100 on the prompt.

    The prompt is tokenised alone and together with each answer, so that merges at the border come out as they do in one
    text; an end-of-text token is appended to an answer of plain text that lacks it. Messages go through the tokenizer's
    chat template.

    Truncation to `max_length` cuts the prompt from its left first, then the answer's end: the answer's START stays.

    Args:
        row: a pair with "prompt", "chosen", "rejected": text, or lists of messages.
        tokenizer: a `transformers` tokenizer.
        max_length: most tokens of prompt and answer together, >= 2.
        max_prompt_length: most tokens of the prompt, from its end; None for no limit of its own.

    Returns:
        "chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels".

    Raises:
        ValueError: an answer has no token, the chat template refuses the messages, or a limit is too small.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be >= 2, one token of prompt and one of answer; got {max_length}")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be >= 1 or None, got {max_prompt_length}")
    out: dict[str, list[int]] = {}
    for side in ("chosen", "rejected"):
        prompt, answer = _split(row, side, tokenizer)
        if not answer:
            raise ValueError(f"the {side} answer of row {row.get('id', repr(row)[:80])} has no token")
        if not prompt:  # the first token needs one before it that predicts it
            start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            prompt = [start] if start is not None else []
        if max_prompt_length is not None:
            prompt = prompt[-max_prompt_length:]
        answer = answer[: max_length - 1]
        prompt = prompt[max(0, len(prompt) + len(answer) - max_length) :]
        out[f"{side}_input_ids"] = prompt + answer
        out[f"{side}_labels"] = [IGNORE_INDEX] * len(prompt) + answer
    return out


def _split(row: dict[str, Any], side: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer behind it."""
    if isinstance(row[side], str):
        prompt = tokenizer(row["prompt"])["input_ids"] if row["prompt"] else []
        both = tokenizer(row["prompt"] + row[side])["input_ids"]
        eos = tokenizer.eos_token_id
        prompt = prompt[:-1] if prompt[-1:] == [eos] else prompt  # some tokenizers close every text
        if eos is not None and both[-1:] != [eos]:
            both = [*both, eos]
    else:
        prompt = _template(tokenizer, row["prompt"], add_generation_prompt=True) if row["prompt"] else []
        both = _template(tokenizer, [*row["prompt"], *row[side]], add_generation_prompt=False)
    # A merge across the border may change the prompt's last tokens: the answer begins where the two first differ.
    shared = next(
        (i for i, (a, b) in enumerate(zip(prompt, both, strict=False)) if a != b), min(len(prompt), len(both))
    )
    return both[:shared], both[shared:]


def _template(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=True)
    except Exception as error:
        if not type(error).__module__.startswith("jinja2"):
            raise
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the tokenizer's chat template refuses messages of the roles {roles}: {error}") from error
    return list(ids["input_ids"] if hasattr(ids, "keys") else ids)
