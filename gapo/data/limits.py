"""How long a pair may be, and the account of what that cut."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from operator import index
from typing import Any


def whole_number(name: str, value: Any) -> int:
    """`value`, if it is a whole number. Raises ValueError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number or None, got {value!r}") from None


@dataclass(frozen=True)
class Limits:
    """Most tokens of prompt and answer together (>= 2), and of the prompt (>= 1); None for no limit.

    Raises:
        ValueError: a limit is no whole number, or too small.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None

    def __post_init__(self) -> None:
        for name, accepted, least in (
            ("max_length", "2, one token of prompt and one of answer; got {}", 2),
            ("max_prompt_length", "1 or None, got {}", 1),
        ):
            value = getattr(self, name)
            if value is not None and whole_number(name, value) < least:
                raise ValueError(f"{name} must be >= {accepted.format(value)}")


@dataclass
class Cuts:
    """Which rows the limits cut, and which were left out since their answers are the same tokens.

    Attributes:
        prompts, answers, equal: the rows, by number.
        rows: how many were seen.
    """

    prompts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    equal: list[int] = field(default_factory=list)
    rows: int = 0

    def add(self, row: int, prompt_cut: int, answers_cut: int, equal: bool) -> None:
        self.rows += 1
        for rows, counts in ((self.prompts, prompt_cut), (self.answers, answers_cut), (self.equal, equal)):
            if counts:
                rows.append(row)

    def tell(self, name: str, limits: Limits) -> None:
        """Log what was cut and left out of the data set `name`, in one warning; nothing if nothing was.

        Raises:
            ValueError: all pairs were left out.
        """
        text = self.summary(limits)
        if self.equal and len(self.equal) == self.rows:
            raise ValueError(f"{name}: no pair is left; {text}. Raise max_length, or look at the chat template")
        if text:
            logging.getLogger("gapo").warning("%s: %s", name, text)

    def summary(self, limits: Limits) -> str:
        """What was cut and what was left out, with the first rows of each; empty if nothing was."""
        found = [
            f"{what} of {_listed(rows)}"
            for what, rows in (("the prompts", self.prompts), ("the ends of the answers", self.answers))
            if rows
        ]
        allowed = f"max_length={limits.max_length}, max_prompt_length={limits.max_prompt_length}"
        parts = [f"{allowed} cut {' and '.join(found)} of {self.rows} pairs"] if found else []
        if self.equal:
            parts.append(f"left out, since their answers are the same tokens: {_listed(self.equal)}")
        return "; ".join(parts)


def _listed(rows: list[int]) -> str:
    return f"{len(rows)} (row {', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''})"
