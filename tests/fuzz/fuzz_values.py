"""Inputs of the right form with any value in any place, chosen by bytes: what mutated text seldom reaches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_NESTED: Any = []
for _ in range(60):
    _NESTED = [_NESTED]

MESSAGE = {"role": "user", "content": "text"}
PARTS: list[Any] = [
    "text", "other", "", " ", "\0", "\ud800", "\u2028\r\n", "text and more", None, True, False, 0, 1, -1.5,
    float("nan"), [], [MESSAGE], [MESSAGE, {**MESSAGE, "content": "more"}], [{**MESSAGE, "content": ""}],
    [{**MESSAGE, "content": None}], [{"role": 1, "content": "x"}], [{**MESSAGE, "\ud800": 1}],
    [{**MESSAGE, "x": _NESTED}], [1], ["text"], [None], [[]], {}, MESSAGE, {"text": "text"}, _NESTED, 10**400,
]  # fmt: skip
COLUMNS = ("prompt", "chosen", "rejected", "is_flipped", "id")

VALUES = (
    "0", "1", "-1", "2", "0.5", "1.5", "1e-3", "1e300", "-1e300", "1e999", ".nan", "-.inf", "1" + "0" * 30, "null",
    "true", "no", "''", "' '", "text", "a,b", ",", "all", "random", "length", "'('", "'['", "2020-01-01", "1:30",
    "0x10", "0o7", "1_0", "!!binary eA==", "[]", "[0]", "[1, 2]", "[null]", "[.nan]", "[-1]", "[a]", "[[]]",
    "[true]", "{}", "{beta: 1}", "{beta: null}", "{beta: []}", "{beta: .nan}", "{a: 1}", "{1: 1}", "{beta: {a: 1}}",
    "!!set {a}", "gapo", "dpo", "rdpo", "torch", "demo", "margin", "first_order", "gaussian", "hinge", "backbone",
    "'x\\\\y'", "\"\\u2028\"", "\"\\0\"", "\"\\x1b\"",
)  # fmt: skip


def rows(raw: bytes) -> bytes:
    """Lines of JSON: each byte gives a column of the next row its value; from 128 on, the row lacks it."""
    size = len(COLUMNS)
    groups = [raw[i : i + size] for i in range(0, len(raw), size)]
    made = [
        {name: PARTS[b % len(PARTS)] for name, b in zip(COLUMNS, group, strict=False) if b < 128} for group in groups
    ]
    return "\n".join(json.dumps(row) for row in made).encode()


def settings(raw: bytes, keys: Sequence[str]) -> dict[str, str]:
    """A value in YAML for some of `keys`: of each two bytes one chooses the key, one the value."""
    pairs = zip(raw[::2], raw[1::2], strict=False)
    return {keys[at % len(keys)]: VALUES[value % len(VALUES)] for at, value in pairs}
