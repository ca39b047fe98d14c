"""Conversations as token ids: through the tokenizer's chat template, the answer apart from its prompt."""

from __future__ import annotations

import json
import logging
from functools import cache
from typing import Any

from gapo.data.messages import OTHERS, bare, common_length, media_of, text_of
from gapo.data.rows import ANSWERS, require_turns

# What `apply_chat_template` is given here, or what would change the kind of its result.
_OURS = ("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict",
         "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length")  # fmt: skip
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")


def split_chat(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of "chosen" and "rejected" behind it.

    As in TRL, the prompt ends with the template's generation prompt, and an answer begins where the ids of the prompt
    and of the whole conversation part.

    Raises:
        ValueError: the template refuses the messages, leaves out a tool call, or renders the prompt otherwise once an
            answer follows, so that no token can be said to be the answer's first.
    """
    if not row["prompt"]:
        raise ValueError("the prompt has no message, and a chat template begins an answer behind one")
    chat = _Chat(tokenizer, row)
    prompt = chat.ids(row["prompt"], generation=True)
    wholes = []
    for side in ANSWERS:
        require_turns(side, row[side])
        whole = chat.ids([*row["prompt"], *row[side]])
        chat.require_printed(row["prompt"], row[side], side)
        if whole[: len(prompt)] != prompt:
            chat.require_border(row["prompt"], row[side], side)
        wholes.append(whole)
    shared = min(common_length(prompt, whole) for whole in wholes)
    return prompt[:shared], [whole[shared:] for whole in wholes]


def require_text(row: dict[str, Any]) -> None:
    """Raise ValueError if `row` holds pictures or sounds: they would be dropped without a word."""
    column = next((name for name in _MEDIA_COLUMNS if row.get(name) is not None and len_of(row[name])), None)
    if column is not None:
        raise ValueError(
            f"column {column!r} holds what is no text, and would be dropped: remove the column, if the answers do not "
            "depend on it"
        )
    for name in ("prompt", *ANSWERS):
        if kinds := media_of(row[name]):
            raise ValueError(f"column {name!r} has a part of the type {kinds[0]!r}; accepted are parts of text")


def len_of(value: Any) -> int:
    """Items in `value`; what has no length counts as one."""
    return len(value) if hasattr(value, "__len__") else 1


def has_turns_of_others(row: dict[str, Any]) -> bool:
    """Whether an answer of several messages holds some that the policy did not write, such as results of tools."""
    answers = [row[side] for side in ANSWERS if not isinstance(row[side], str)]
    return any(message["role"].lower() in OTHERS for answer in answers for message in answer)


class _Chat:
    """A tokenizer's chat template, with the tools and settings of one row."""

    def __init__(self, tokenizer: Any, row: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        tools, settings = _parsed(row, "tools", list), _parsed(row, "chat_template_kwargs", dict)
        self._options = {name: value for name, value in (settings or {}).items() if value is not None}
        if taken := [name for name in self._options if name in _OURS]:
            raise ValueError(
                f"chat_template_kwargs may hold what the template reads, such as enable_thinking; got {taken[0]!r}"
            )
        if tools:  # none at all for an empty list, for which some templates print a frame
            self._options["tools"] = tools

    def ids(self, messages: list[dict[str, Any]], *, generation: bool = False) -> list[int]:
        found = self._apply(messages, generation, tokenize=True)
        return list(found["input_ids"] if hasattr(found, "keys") else found)

    def _text(self, messages: list[dict[str, Any]], *, generation: bool = False) -> str:
        return str(self._apply(messages, generation, tokenize=False))

    def _apply(self, messages: list[dict[str, Any]], generation: bool, tokenize: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                bare(messages), add_generation_prompt=generation, tokenize=tokenize, **self._options
            )
        except Exception as error:
            # A template that adds text to a list, or looks for a key in a text, ends in a TypeError.
            if not type(error).__module__.startswith("jinja2") and not isinstance(error, TypeError):
                raise
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the tokenizer's chat template refuses messages of the roles {roles}: {error}") from error

    def require_printed(self, prompt: list[dict[str, Any]], answer: list[dict[str, Any]], side: str) -> None:
        """Raise ValueError where the template leaves out a tool call, or the texts of a list of parts."""
        messages = [*prompt, *answer]
        lists = any(isinstance(message.get("content"), list) for message in messages)
        calls = [call for message in answer for call in message.get("tool_calls") or ()]
        tools = self._options.get("tools") or ()
        if not lists and not calls and not tools:
            return
        whole = self._text(messages)
        if lists and not all(_is_printed(message, whole) for message in messages):
            raise ValueError(
                "the tokenizer's chat template has no place for a content that is a list of parts: give each message "
                "its content as one text"
            )
        names = [_name_of_tool(tool) for tool in tools]
        if names and not any(name in whole for name in names):
            say_once("the tokenizer's chat template has no place for tools: the column 'tools' has no effect")
        if not calls:
            return
        written = whole[common_length(whole, self._text(prompt, generation=True)) :]
        for call in calls:
            name = _name_of_tool(call)
            if name not in written:
                raise ValueError(
                    f"the tokenizer's chat template leaves the call of the tool {name!r} out of the {side} answer: use "
                    "a tokenizer whose template has tool calls (some have none beside a content, even an empty one)"
                )

    def require_border(self, prompt: list[dict[str, Any]], answer: list[dict[str, Any]], side: str) -> None:
        """Raise ValueError unless the rendered prompt, up to its generation prompt, opens the whole conversation.

        Allowed are tokens that merge across the border; a generation prompt that goes on otherwise than the turn, such
        as with an empty block of thoughts; and what closes every conversation.
        """
        opened, whole = self._text(prompt, generation=True), self._text([*prompt, *answer])
        shared = common_length(opened, whole)
        if opened[shared:].strip() in ("", self._tokenizer.eos_token):
            return
        closed = common_length(opened, self._text(prompt))
        if shared > closed and not _is_within_head(answer[0], whole, shared):
            return
        raise ValueError(
            f"the tokenizer's chat template renders the prompt otherwise once the {side} answer follows: alone it "
            f"goes on with {opened[shared:][:40]!r}, before the answer with {whole[shared:][:40]!r}. No token "
            "can be said to be the answer's first: use a template whose rendering of a message does not "
            "depend on what follows"
        )


def _is_within_head(message: dict[str, Any], whole: str, shared: int) -> bool:
    """Whether a part of the turn's head, such as a role, stands between the border and the text of the answer."""
    text = text_of([message]).strip()[:20]
    if set(bare([message])[0]) - {"role", "content", "name"} or not text or "<" in text:
        return False
    between = whole[shared : whole.find(text, shared)] if text in whole[shared:] else ""
    return bool(between.strip()) and "<" not in between  # "<" opens a block of thoughts, or what the template marks


def _name_of_tool(tool: Any) -> str:
    """The name in a tool's schema or in a call; of a Python function its own."""
    if not isinstance(tool, dict):
        return str(getattr(tool, "__name__", ""))
    return str((tool.get("function") or tool).get("name") or "")


@cache
def say_once(text: str) -> None:
    """Log a warning, the same one only once in a process."""
    logging.getLogger("gapo").warning(text)


def _is_printed(message: dict[str, Any], whole: str) -> bool:
    """Whether the text of `message` stands in `whole`, and not as Python or JSON prints a list of parts."""
    text = text_of([message]).strip()
    printed = any(key in whole for key in ("'type': 'text'", '"type": "text"'))
    return not printed and (text in whole or "</think>" in text)  # templates print thoughts in their own way, or not


def _parsed(row: dict[str, Any], name: str, kind: type) -> Any:
    """A column that may stand as JSON in a text, as TRL has it of tools, since tables know no objects of any shape."""
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"column {name!r} is text that is not valid JSON: {error}") from error
    if value is None or isinstance(value, kind):
        return value
    if isinstance(value, str):
        return None
    raise ValueError(f"column {name!r} must be a {kind.__name__}, or JSON of one; got {type(value).__name__}")
