"""Read preference pairs from files and data sets; count and name the rows that are not pairs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapo.data.pair_rows import RowFault, as_pair
from gapo.data.raw_rows import PairError, Unreadable, read_rows


@dataclass(frozen=True)
class Problem:
    """A row that is not a pair: its line (from 1; row number for Parquet and data sets), and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class Pairs:
    """Checked pairs, and the rows that were left out.

    Attributes:
        rows: the pairs: "prompt", "chosen", "rejected" (text, or lists of messages), and the row's other columns.
        problems: the rows left out, in order.
        source: the file or data set.
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

    A pair has "chosen" and "rejected", two different non-empty answers, and usually "prompt". Each is text, or a list
    of {"role", "content"} messages (TRL's standard and conversational formats). Without "prompt", the common start of
    both answers is the prompt. Answers that are whole conversations may repeat the prompt, which may then be text (the
    layout of UltraFeedback). Other columns are kept; "is_flipped" must be true, false or missing.

    Args:
        source: a file (.json, .jsonl, each also .gz, .csv, .parquet), a folder saved by `datasets`, or the name of a
            data set on the Hub.
        split: the split of a data set; ignored for files.
        strict: True raises at the first row that is not a pair; False lists such rows in `problems`.
        limit: stop after this many pairs.

    Raises:
        PairError: `source` cannot be read or holds no pair, or a row is not a pair and `strict` is True.
        ModuleNotFoundError: Parquet or a data set, without the `datasets` library.

    >>> from tempfile import mkdtemp
    >>> from gapo.data import generate_pairs, write_rows
    >>> path = f"{mkdtemp()}/pairs.jsonl"
    >>> write_rows(path, [*generate_pairs(3), {"chosen": "Yes.", "rejected": "Yes."}])
    >>> pairs = read_pairs(path)
    >>> len(pairs.rows), pairs.problems
    (3, [Problem(line=4, reason='chosen equals rejected')])
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
