"""Read preference pairs from files and data sets; count and name the rows that are no pair."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapo.data.rows import RowFault, as_pair
from gapo.data.sources import PairError, Unreadable, read_rows


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
    with is the prompt; answers that are whole conversations may repeat it, also beside a prompt of text (the layout of
    UltraFeedback). Other columns are kept; "is_flipped" must be true, false or missing.

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
        try:
            if isinstance(row, Unreadable):
                raise RowFault(row)
            rows.append(as_pair(row))
        except RowFault as error:
            if strict:
                raise PairError(
                    f"{source}, line {line}: {error}. Mend or remove the row, or read without strict"
                ) from None
            problems.append(Problem(line, str(error)))
        if limit is not None and len(rows) >= limit:
            break
    pairs = Pairs(rows, problems, str(source))
    if not rows:
        raise PairError(f"no usable pair found. {pairs.summary()}")
    return pairs
