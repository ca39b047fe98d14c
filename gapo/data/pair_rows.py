"""The form of a preference pair: a row is brought into it, or refused with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

from gapo.data.messages import OTHERS, bare, common_length, is_blank, is_conversation, text_of
from gapo.data.text_files import is_utf8
from gapo.pairs import SIDES

_DEEPEST = 50  # levels of lists and objects in a row; Python's recursion limit is not far beyond
# A list of messages printed as JSON or Python text, as a table of text holds it.
_PRINTED_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
# Heads of turns in texts that are whole conversations: those of Anthropic's HH sets and of common chat templates. Both
# answers may begin with the same words. The prompt therefore ends with the answers' head, not with their first
# difference.
_ANSWER_HEAD = re.compile(
    r"\n\nAssistant:|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
    r"|<start_of_turn>model\n|<\|assistant\|>\n?|\[/INST\]|### (?:Assistant|Response):"
)
_OTHER_HEAD = re.compile(
    r"\n\nHuman:|<\|im_start\|>user\n|<\|start_header_id\|>user<|<start_of_turn>user\n|<\|user\|>|\[INST\]"
    r"|### (?:User|Human|Instruction):"
)


class RowFault(ValueError):
    """A row is not a preference pair; the message is the reason."""


def as_pair(row: Any) -> dict[str, Any]:
    """`row` as a checked pair, in the form of `with_prompt`.

    Raises:
        RowFault: the row is not a pair.
    """
    if isinstance(row, dict) and (reason := _fault_within(row)) is not None:
        raise RowFault(reason)
    require_columns(row)
    pair = with_prompt(row)
    if not isinstance(pair.get("is_flipped", False), bool):
        raise RowFault("column 'is_flipped' is not true or false")
    for name in SIDES:
        if is_blank(pair[name]):
            raise RowFault(f"column {name!r} is empty after the shared prompt")
        require_turns(name, pair[name])
    return pair


def require_columns(row: Any) -> None:
    """Raise RowFault unless `row` has a prompt and two different answers of one kind, text or messages."""
    if not isinstance(row, dict):
        raise RowFault(f"not an object with columns, but {'null' if row is None else type(row).__name__}")
    if (reason := _fault_of_columns(row)) is not None:
        raise RowFault(reason)


def _fault_of_columns(row: dict[str, Any]) -> str | None:
    missing = [name for name in SIDES if row.get(name) is None]
    if missing:
        return f"column {missing[0]!r} is missing"
    columns = [name for name in ("prompt", *SIDES) if row.get(name) is not None]
    for name in columns:
        if not isinstance(row[name], str) and not is_conversation(row[name]):
            return f"column {name!r} is neither text nor a list of messages with role and content"
        if isinstance(row[name], str) and _PRINTED_MESSAGES.match(row[name]):
            return f"column {name!r} is a list of messages written out as text: give the list itself, as .jsonl can"
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str) or (
        isinstance(row["chosen"], str) and isinstance(row.get("prompt"), list)
    ):
        return "text and messages are mixed"
    for name in SIDES:
        if is_blank(row[name]):
            return f"column {name!r} is empty"
    return "chosen equals rejected" if row["chosen"] == row["rejected"] else None


def _fault_within(value: Any, depth: int = 0) -> str | None:
    """The reason why `value` cannot be processed or written, at any depth; None if it can."""
    if isinstance(value, str):
        return None if is_utf8(value) else "half a surrogate pair (such as \\ud800) is not text"
    if not isinstance(value, (dict, list)):
        return None
    if depth >= _DEEPEST:
        return f"nested more than {_DEEPEST} levels deep"
    inner: Iterable[Any] = value if isinstance(value, list) else (part for item in value.items() for part in item)
    return next((reason for part in inner if (reason := _fault_within(part, depth + 1)) is not None), None)


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with "prompt" separate from its answers, and with "is_flipped" true, false or absent.

    A row without a prompt gets the common start of both answers, in whole messages or words. Of texts that are whole
    conversations, it gets all up to the last shared head of an answer, such as "\\n\\nAssistant:". Messages of the
    prompt that both answers repeat are removed from the answers. If the prompt is text and the answers are messages,
    as in UltraFeedback, the common messages of both answers become the prompt.

    Raises:
        RowFault: prompt and answers contradict each other.
    """
    row = _with_flag(row)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        return row if prompt is not None else _split(row, _end_of_prompt(chosen, rejected))
    if not prompt:
        return _split(row, common_length(bare(chosen), bare(rejected)))
    if isinstance(prompt, str):
        return _split(row, _end_of_messages(prompt, chosen, rejected))
    return _without_repeated(row)


def _split(row: dict[str, Any], end: int) -> dict[str, Any]:
    return {**row, "prompt": row["chosen"][:end], "chosen": row["chosen"][end:], "rejected": row["rejected"][end:]}


def _with_flag(row: dict[str, Any]) -> dict[str, Any]:
    """`row` without an empty "is_flipped" (null, an empty cell, NaN); 0 and 1 become false and true."""
    if "is_flipped" not in row or isinstance(row["is_flipped"], bool):
        return row
    flag = row["is_flipped"]
    is_number = isinstance(flag, (Real, np.bool_))
    if flag is None or (isinstance(flag, str) and not flag) or (is_number and flag != flag):  # NaN differs from itself
        return {name: value for name, value in row.items() if name != "is_flipped"}
    return {**row, "is_flipped": bool(flag)} if is_number and flag in (0, 1) else row


def _end_of_prompt(chosen: str, rejected: str) -> int:
    shared = common_length(chosen, rejected)
    heads = list(_ANSWER_HEAD.finditer(chosen, 0, shared))
    if heads:
        end = heads[-1].end()
        # A turn of the user behind the last shared head: both conversations go on, and differ only later.
        if _OTHER_HEAD.search(chosen, end, shared):
            raise RowFault("the answers differ within a turn of the user, so that they have no prompt in common")
        return end
    while shared and not chosen[shared - 1].isspace():  # back to the end of a word
        shared -= 1
    return shared


def _end_of_messages(prompt: str, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> int:
    shared = common_length(bare(chosen), bare(rejected))
    if not any(text_of([message]).strip() == prompt.strip() for message in chosen[:shared]):
        raise RowFault(
            "column 'prompt' is text, and none of the messages that both answers begin with has it: leave the column "
            "out, or give the prompt as messages"
        )
    return shared


def _without_repeated(row: dict[str, Any]) -> dict[str, Any]:
    prompt = bare(row["prompt"])
    while prompt:  # until no copy is left: `with_prompt` of a checked pair must change nothing
        repeats = [bare(row[name][: len(prompt)]) == prompt for name in SIDES]
        if not any(repeats):
            break
        if not all(repeats):
            raise RowFault(f"{SIDES[repeats.index(True)]!r} repeats the messages of the prompt, the other does not")
        row = {**row, **{name: row[name][len(prompt) :] for name in SIDES}}
    return row


def require_turns(name: str, answer: str | list[dict[str, Any]]) -> None:
    """Raise RowFault unless an answer of messages begins and ends with a turn of the policy's own."""
    if isinstance(answer, str) or not answer:
        return
    for message, verb in ((answer[0], "begins"), (answer[-1], "ends")):
        if message["role"].lower() in OTHERS:
            raise RowFault(
                f"column {name!r}, without the prompt, {verb} with a message of the role {message['role']!r}: an "
                "answer begins and ends with the model's own messages"
            )


def name_of(row: dict[str, Any]) -> str:
    """The name of a row in error messages: its id, or the start of its text."""
    return f"{row['id']}" if row.get("id") is not None else repr(row)[:80]
