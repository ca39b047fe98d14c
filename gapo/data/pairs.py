"""Read preference pairs from files and data sets; count and name the rows that are no pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapo.data.sources import PairError, Unreadable, is_utf8, read_rows

ANSWERS = ("chosen", "rejected")
_DEEPEST = 50  # lists and objects within each other in a row: Python reads and compares more, but not much more


@dataclass(frozen=True)
class Problem:
    """A row that is no pair: its line (from 1; row number for Parquet and data sets) and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Pairs:
    """Checked pairs, and what was left out.

    Attributes:
        rows: the good rows: "prompt", "chosen", "rejected" (text, or lists of messages) and whatever else stood there.
        problems: the bad ones, in order.
        source: where they came from.
    """

    rows: list[dict[str, Any]]
    problems: list[Problem] = field(default_factory=list)
    source: str = ""

    def summary(self) -> str:
        """Counts of good rows and of each fault, with the first lines of each."""
        text = f"{self.source}: {len(self.rows)} pairs"
        if self.problems:
            text += f", {len(self.problems)} rows left out"
        for reason, count in Counter(problem.reason for problem in self.problems).most_common():
            lines = [str(problem.line) for problem in self.problems if problem.reason == reason][:5]
            text += f"\n  {count} x {reason} (line {', '.join(lines)}{', ...' if count > len(lines) else ''})"
        return text


def read_pairs(source: str | Path, *, split: str = "train", strict: bool = False, limit: int | None = None) -> Pairs:
    """Read and check preference pairs.

    A pair has "chosen" and "rejected", two different non-empty answers, and mostly "prompt": text, or lists of
    {"role", "content"} messages (TRL's standard and conversational formats). Without "prompt", what both answers begin
    with is the prompt. Other columns are kept; "is_flipped", where present, must be true or false.

    Args:
        source: a file (.json, .jsonl, each also .gz, .csv, .parquet), a folder saved by `datasets`, or the name of a
            data set on the Hub.
        split: which split of a data set; files have none.
        strict: True raises at the first bad row; False counts and names them in `problems`.
        limit: stop after this many good rows.

    Raises:
        PairError: nothing can be read from `source`, no good row is in it, or `strict` and a row is bad.
        ModuleNotFoundError: Parquet or a data set, without the `datasets` library.
    """
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for line, row in read_rows(source, split):
        reason = row if isinstance(row, Unreadable) else fault(row)
        if reason is None:
            rows.append(with_prompt(row))
            if limit is not None and len(rows) >= limit:
                break
            continue
        if strict:
            raise PairError(f"{source}, line {line}: {reason}. Mend or remove the row, or read without strict")
        problems.append(Problem(line, reason))
    pairs = Pairs(rows, problems, str(source))
    if not rows:
        raise PairError(f"no usable pair found. {pairs.summary()}")
    return pairs


def fault(row: Any) -> str | None:
    """Why `row` is no preference pair, or None if it is one."""
    if not isinstance(row, dict):
        return f"not an object with columns, but {type(row).__name__}"
    if (reason := _fault_within(row)) is not None:
        return reason
    missing = [name for name in ANSWERS if row.get(name) is None]
    if missing:
        return f"column {missing[0]!r} is missing"
    columns = [name for name in ("prompt", *ANSWERS) if row.get(name) is not None]
    for name in columns:
        if not isinstance(row[name], str) and not is_conversation(row[name]):
            return f"column {name!r} is neither text nor a list of messages with role and content"
    if len({isinstance(row[name], str) for name in columns}) > 1:
        return "text and messages are mixed"
    for name in ANSWERS:
        if not text_of(row[name]).strip():
            return f"column {name!r} is empty"
    if row["chosen"] == row["rejected"]:
        return "chosen equals rejected"
    if not isinstance(row.get("is_flipped", False), bool):
        return "column 'is_flipped' is not true or false"
    full = with_prompt(row)
    for name in ANSWERS:
        if not text_of(full[name]).strip():
            return f"column {name!r} is empty after the shared prompt"
    return None


def _fault_within(value: Any, depth: int = 0) -> str | None:
    """What in `value`, at any depth, could be read but not handled or written again."""
    if isinstance(value, str):
        return None if is_utf8(value) else "half a surrogate pair (such as \\ud800) is no text"
    if not isinstance(value, (dict, list)):
        return None
    if depth >= _DEEPEST:
        return f"nested more than {_DEEPEST} levels deep"
    inner: Iterable[Any] = value if isinstance(value, list) else (part for item in value.items() for part in item)
    return next((reason for part in inner if (reason := _fault_within(part, depth + 1)) is not None), None)


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, each with a role and a text."""
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with "prompt": as it stands, or what both answers begin with (whole words of text, whole messages)."""
    if row.get("prompt") is not None:
        return row
    chosen, rejected = row["chosen"], row["rejected"]
    shared = common_length(chosen, rejected)
    if isinstance(chosen, str):
        while shared and not chosen[shared - 1].isspace():
            shared -= 1
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items `a` and `b` have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def text_of(answer: str | list[dict[str, str]]) -> str:
    """The text of an answer; of messages, their contents one after another."""
    return answer if isinstance(answer, str) else "".join(message["content"] for message in answer)
