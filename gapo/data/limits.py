"""Limits on the length of a pair, and the record of the rows that they cut."""

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
    """Limits in tokens; None for no limit.

    Args:
        max_length: of prompt and answer together, >= 2.
        max_prompt_length: of the prompt, >= 1.

    Raises:
        ValueError: a limit is not a whole number, or too small.
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
    """The rows that the limits cut, and the rows that were left out because their answers are the same tokens.

    Attributes:
        prompts: numbers of the rows whose prompt was cut.
        answers: numbers of the rows whose answers were cut.
        equal: numbers of the rows left out.
        rows: number of rows counted.
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
        """Log one warning that counts the cut and the omitted rows of the data set `name`; none if there are none.

        Raises:
            ValueError: every pair was left out.
        """
        text = self.summary(limits)
        if self.equal and len(self.equal) == self.rows:
            raise ValueError(f"{name}: no pair is left; {text}. Raise max_length, or look at the chat template")
        if text:
            logging.getLogger("gapo").warning("%s: %s", name, text)

    def summary(self, limits: Limits) -> str:
        """Counts of cut and of omitted rows, with the first numbers of each; empty if there are none."""
        kinds = (("the prompts", self.prompts), ("the ends of the answers", self.answers))
        cut = " and ".join(f"{kind} of {_listed(rows)}" for kind, rows in kinds if rows)
        allowed = f"max_length={limits.max_length}, max_prompt_length={limits.max_prompt_length}"
        parts = [f"{allowed} cut {cut} of {self.rows} pairs"] if cut else []
        if self.equal:
            parts.append(f"left out, since their answers are the same tokens: {_listed(self.equal)}")
        return "; ".join(parts)


def _listed(rows: list[int]) -> str:
    return f"{len(rows)} (row {', '.join(map(str, rows[:5]))}{', ...' if len(rows) > 5 else ''})"
