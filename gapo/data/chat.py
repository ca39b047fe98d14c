"""Conversations as token ids, through the tokenizer's chat template.

A chat template is a Jinja program. It may leave messages out, and it may render a prompt differently once an answer
follows. The labels need the answer's first token, so this module renders the prompt alone and the whole conversation,
and compares the two. It refuses a row whose answer has no first token that both renderings agree on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from gapo.data.messages import OTHERS, bare, common_length, media_of, text_of
from gapo.data.pair_rows import require_turns
from gapo.pairs import SIDES

# Arguments of `apply_chat_template` that this module sets, or that change the kind of its result.
_RESERVED = ("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict",
             "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length")  # fmt: skip
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")


class Chat:
    """The conversations of a row: its prompt, and the prompt with each answer behind it.

    Args:
        row: a pair of messages, with "prompt" separate.
        tokenizer: has the chat template.

    Raises:
        ValueError: the prompt has no message. `texts` and `split` raise it where an answer does not begin and end with
            the policy's own messages, or the template refuses them.
    """

    def __init__(self, row: dict[str, Any], tokenizer: Any) -> None:
        if not row["prompt"]:
            raise ValueError("the prompt has no message, and a chat template begins an answer behind one")
        self.row, self._template = row, _Template(tokenizer, row)

    def texts(self) -> list[str] | None:
        """The three conversations as the template renders them; None where the tokenizer has its own way to ids."""
        return self._rendered(self._template.text) if self._template.is_plain else None

    def _rendered(self, render: Callable[..., Any]) -> list[Any]:
        prompt = self.row["prompt"]
        rendered = [render(prompt, generation=True)]
        for side in SIDES:
            require_turns(side, self.row[side])
            rendered.append(render([*prompt, *self.row[side]]))
        return rendered

    def split(self, ids: list[list[int]] | None) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, and of "chosen" and "rejected" behind it.

        As in TRL, the prompt ends with the template's generation prompt. An answer begins at the first token in which
        the whole conversation differs from the prompt.

        Args:
            ids: of `texts`, without special tokens; None where there are none.

        Raises:
            ValueError: the template leaves out a tool call. Or it renders the prompt differently once an answer
                follows, so that the answer's first token is undefined.
        """
        prompt, *conversations = self._rendered(self._template.ids) if ids is None else ids
        for side, conversation in zip(SIDES, conversations, strict=True):
            self._template.require_complete(self.row["prompt"], self.row[side], side)
            if conversation[: len(prompt)] != prompt:
                self._template.require_same_prompt(self.row["prompt"], self.row[side], side)
        # A token may merge the prompt's last characters with the answer's first: the prompt ends before it.
        shared = min(common_length(prompt, conversation) for conversation in conversations)
        return prompt[:shared], [conversation[shared:] for conversation in conversations]


def chat_prompt(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of the prompt's messages, with the template's generation prompt. Raises ValueError as `Chat.split`."""
    return _Template(tokenizer, row).ids(row["prompt"], generation=True)


def require_text(row: dict[str, Any]) -> None:
    """Raise ValueError if `row` holds pictures or sounds, which the tokenizer would drop silently."""
    for name in _MEDIA_COLUMNS:
        value = row.get(name)
        if value is not None and (not hasattr(value, "__len__") or len(value)):
            raise ValueError(
                f"column {name!r} holds media, not text, and would be dropped: remove the column if the answers do not "
                "depend on it"
            )
    for name in ("prompt", *SIDES):
        if kinds := media_of(row[name]):
            raise ValueError(f"column {name!r} has a part of the type {kinds[0]!r}; accepted are parts of text")


def has_turns_of_others(row: dict[str, Any]) -> bool:
    """Whether an answer of several messages holds some that the policy did not write, such as results of tools."""
    answers = [row[side] for side in SIDES if not isinstance(row[side], str)]
    return any(message["role"].lower() in OTHERS for answer in answers for message in answer)


class _Template:
    """A tokenizer's chat template, with the tools and settings of one row."""

    def __init__(self, tokenizer: Any, row: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        tools, settings = _parsed(row, "tools", list), _parsed(row, "chat_template_kwargs", dict)
        self._options = {name: value for name, value in (settings or {}).items() if value is not None}
        if reserved := [name for name in self._options if name in _RESERVED]:
            raise ValueError(
                "chat_template_kwargs may hold variables that the template reads, such as enable_thinking; got "
                f"{reserved[0]!r}"
            )
        if tools:  # some templates print a frame for an empty list
            self._options["tools"] = tools

    @property
    def is_plain(self) -> bool:
        """Whether ids are those of the rendered text, as in transformers; some tokenizers have their own method."""
        method = getattr(type(self._tokenizer), "apply_chat_template", None)
        return getattr(method, "__module__", "") == "transformers.tokenization_utils_base"

    def ids(self, messages: list[dict[str, Any]], *, generation: bool = False) -> list[int]:
        output = self._apply(messages, generation, tokenize=True)
        return list(output["input_ids"] if hasattr(output, "keys") else output)

    def text(self, messages: list[dict[str, Any]], *, generation: bool = False) -> str:
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

    def require_complete(self, prompt: list[dict[str, Any]], answer: list[dict[str, Any]], side: str) -> None:
        """Raise ValueError where the template leaves out a tool call, or the texts of a list of parts."""
        messages = [*prompt, *answer]
        has_lists = any(isinstance(message.get("content"), list) for message in messages)
        calls = [call for message in answer for call in message.get("tool_calls") or ()]
        tools = [_name_of_tool(tool) for tool in self._options.get("tools") or ()]
        if not has_lists and not calls and not tools:
            return
        text = self.text(messages)
        if has_lists and not all(_is_printed(message, text) for message in messages):
            raise ValueError(
                "the tokenizer's chat template cannot render a content that is a list of parts: give each message "
                "its content as one text"
            )
        if tools and not any(name in text for name in tools):
            warn_once("the tokenizer's chat template does not render tools: the column 'tools' has no effect")
        answer_text = text[common_length(text, self.text(prompt, generation=True)) :] if calls else ""
        for name in map(_name_of_tool, calls):
            if name not in answer_text:
                raise ValueError(
                    f"the tokenizer's chat template leaves the call of the tool {name!r} out of the {side} answer: use "
                    "a tokenizer whose template renders tool calls (some render none beside a content, even an empty "
                    "one)"
                )

    def require_same_prompt(self, prompt: list[dict[str, Any]], answer: list[dict[str, Any]], side: str) -> None:
        """Raise ValueError unless the conversation begins with the rendered prompt, up to its generation prompt.

        Allowed are tokens that merge across the border, and the text that closes every conversation. The generation
        prompt may also differ from the head of the answer's turn, for example by an empty block of thoughts.
        """
        opening, text = self.text(prompt, generation=True), self.text([*prompt, *answer])
        shared = common_length(opening, text)
        if opening[shared:].strip() in ("", self._tokenizer.eos_token):
            return
        # Where the generation prompt begins: until there, opening and closed prompt are the same text.
        end_of_prompt = common_length(opening, self.text(prompt))
        if shared > end_of_prompt and not _is_within_head(answer[0], text, shared):
            return
        raise ValueError(
            f"the tokenizer's chat template renders the prompt differently once the {side} answer follows. Alone, it "
            f"continues with {opening[shared:][:40]!r}; before the answer, with {text[shared:][:40]!r}. The answer's "
            "first token is therefore undefined: use a template whose rendering of a message does not depend on later "
            "messages"
        )


def _is_within_head(message: dict[str, Any], text: str, border: int) -> bool:
    """Whether a part of the turn's head, such as a role, stands between the border and the text of the answer."""
    start = text_of([message]).strip()[:20]
    if set(bare([message])[0]) - {"role", "content", "name"} or not start or "<" in start:
        return False
    between = text[border : text.find(start, border)] if start in text[border:] else ""
    return bool(between.strip()) and "<" not in between  # "<" opens a block of thoughts or a mark of the template


def _name_of_tool(tool: Any) -> str:
    """The name in a tool's schema or in a call; a Python function's own name."""
    if not isinstance(tool, dict):
        return str(getattr(tool, "__name__", ""))
    return str((tool.get("function") or tool).get("name") or "")


@cache
def warn_once(text: str) -> None:
    """Log a warning, the same text only once in a process."""
    logging.getLogger("gapo").warning(text)


def _is_printed(message: dict[str, Any], conversation: str) -> bool:
    """Whether the conversation holds the message's text, and no list of parts as Python or JSON prints it."""
    text = text_of([message]).strip()
    has_list = any(key in conversation for key in ("'type': 'text'", '"type": "text"'))
    return not has_list and (text in conversation or "</think>" in text)  # templates may reformat thoughts


def _parsed(row: dict[str, Any], name: str, kind: type) -> Any:
    """A column that may be JSON text, as TRL stores tools: an Arrow column cannot hold objects of varying shape."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(f"column {name!r} is text that is not valid JSON: {error}") from error
    if value is None or value == "":
        return None
    if isinstance(value, kind):
        return value
    raise ValueError(f"column {name!r} must be a {kind.__name__}, or JSON of one; got {type(value).__name__}")
