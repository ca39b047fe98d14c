"""Answers as lists of messages: which lists are conversations, what they say, where two of them start to differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Roles whose messages the policy reads; every other role is the policy's own ("assistant", "model", ...).
OTHERS = ("system", "developer", "user", "human", "tool", "function", "ipython", "environment")
_BESIDE_CONTENT = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, each with a role and a content.

    A content is text, or a list of parts, each with its "type". It may be absent beside "tool_calls" or reasoning.
    """
    return isinstance(value, list) and all(map(_is_message, value))


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
    return isinstance(content, str) or (content is None and _has_more(message))


def _has_more(message: dict[str, Any]) -> bool:
    return any(message.get(name) for name in _BESIDE_CONTENT)


def text_of(answer: str | list[dict[str, Any]]) -> str:
    """The text of an answer; for messages, their joined contents."""
    return answer if isinstance(answer, str) else "".join(map(_text_within, answer))


def _text_within(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def is_blank(answer: str | list[dict[str, Any]]) -> bool:
    """Whether an answer says nothing: neither text nor a tool call nor reasoning."""
    if text_of(answer).strip():
        return False
    return isinstance(answer, str) or not any(_has_more(message) or _media(message) for message in answer)


def media_of(messages: str | list[dict[str, Any]]) -> list[str]:
    """The types of the parts that are not text, such as "image"."""
    return [] if isinstance(messages, str) else [kind for message in messages for kind in _media(message)]


def _media(message: dict[str, Any]) -> list[str]:
    content = message.get("content")
    return [part["type"] for part in content if part["type"] != "text"] if isinstance(content, list) else []


def bare(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without keys whose value is None. Arrow adds such keys: it gives every message the same keys."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the longest common start of `a` and `b`."""
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
