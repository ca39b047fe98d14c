"""Read preference pairs from files and data sets; count and name the rows that are not pairs."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gapo.data.layouts import Layout, listed_columns
from gapo.data.lazy_rows import RowWriter
from gapo.data.pair_rows import RowFault, as_pair
from gapo.data.raw_rows import Source, read_rows
from gapo.data.text_files import PairError, Unreadable
from gapo.records import in_memory

_logger = logging.getLogger("gapo")

_MOST_LISTED = 20  # bad rows in one error


@dataclass(frozen=True)
class Problem:
    """A row that is not a pair: its line (from 1; row number for Parquet and data sets), and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class Pairs:
    """Checked pairs, and the rows that were left out.

    Attributes:
        rows: the pairs: "prompt", "chosen", "rejected" (text, or lists of messages), and the row's other columns. Those
            of `read_pairs` are a read-only sequence, whose rows lie in a temporary file where they are many.
        problems: the rows left out, in order.
        source: the file or data set.
        ties: rows left out because neither output is preferred.
        lines: the line of each pair, counted as in `problems`; empty where the pairs were not read from rows.
    """

    rows: Sequence[dict[str, Any]]
    problems: list[Problem] = field(default_factory=list)
    source: str = ""
    ties: int = 0
    lines: Sequence[int] = ()

    def summary(self) -> str:
        """Counts of good rows and of each fault, with the first lines of each."""
        text = f"{self.source}: {len(self.rows)} pairs"
        if self.problems:
            text += f", {len(self.problems)} rows left out"
        if self.ties:
            text += f", {self.ties} ties dropped"
        for reason, count in Counter(problem.reason for problem in self.problems).most_common():
            lines = [str(problem.line) for problem in self.problems if problem.reason == reason][:5]
            text += f"\n  {count} x {reason} (line {', '.join(lines)}{', ...' if count > len(lines) else ''})"
        return text


def read_pairs(
    source: str | Path,
    *,
    split: str = "train",
    strict: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    preference: str | None = None,
    encoding: str = "utf-8",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Pairs:
    """Read and check preference pairs.

    A pair has "chosen" and "rejected", two different non-empty answers, and usually "prompt". Each is text, or a list
    of {"role", "content"} messages (TRL's standard and conversational formats). Without "prompt", the common start of
    both answers is the prompt. Answers that are whole conversations may repeat the prompt, which may then be text (the
    layout of UltraFeedback). Other columns are kept; "is_flipped" must be true, false or missing.

    Names of columns match without regard to case.

    Args:
        source: a file (.json, .jsonl, .csv, .tsv, each also .gz, .parquet), a folder saved by `datasets`, or the name
            of a data set on the Hub.
        split: the split of a data set, such as "train_prefs" or "train[:10%]"; ignored for files.
        strict: True raises where rows are not pairs, and lists them; False lists them in `problems`.
        limit: stop after this many pairs.
        columns: other names of columns, such as {"prompt": "question", "chosen": "good", "rejected": "bad"}. A column
            that has the name of a pair's already is replaced.
        preference: the column that says which of "output_a" and "output_b" is preferred, in a table without "chosen"
            and "rejected": a or b (also model_a, response_b, ...), the name of the output's column, or 1 or 2. Ties
            are dropped and counted. Values that can be understood in two ways, such as 0 and 1, are refused.
        encoding: of a file of text: a codec of Python, such as "cp1252".
        config: the configuration (subset) of a data set on the Hub.
        revision: its branch, tag or commit.
        streaming: read a data set of the Hub row by row, without saving it; with `limit`, only its start.

    Raises:
        PairError: `source` cannot be read or holds no pair, or rows are not pairs and `strict` is True.
        ValueError: `columns` names what is no column of a pair.
        ModuleNotFoundError: Parquet or a data set, without the `datasets` library.

    >>> from tempfile import mkdtemp
    >>> from gapo.data import generate_pairs, write_rows
    >>> path = f"{mkdtemp()}/pairs.jsonl"
    >>> write_rows(path, [*generate_pairs(3), {"chosen": "Yes.", "rejected": "Yes."}])
    >>> pairs = read_pairs(path)
    >>> len(pairs.rows), pairs.problems
    (3, [Problem(line=4, reason='chosen equals rejected')])
    """
    layout = Layout(columns, preference)
    raw = Source(str(source), split, encoding, config, revision, streaming, layout.names, layout.needed)
    try:
        return _collected(lambda: read_rows(raw), layout, str(source), strict, limit)
    except UnicodeDecodeError as error:
        raise PairError(f"{source} is not {encoding}: {error}") from error


def pairs_of(
    rows: Iterable[Any],
    *,
    source: str = "the rows",
    strict: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    preference: str | None = None,
) -> Pairs:
    """Check preference pairs that are in memory, as `read_pairs` does.

    Args:
        rows: a list of dicts, a `datasets.Dataset` or a `pandas.DataFrame`; the first row is line 1.
        source: their name, for messages.
        strict, limit, columns, preference: as for `read_pairs`.

    Raises:
        PairError, ValueError: as `read_pairs`.
        TypeError: `rows` are no rows, but a path, a dict of splits, or something else.
    """
    layout = Layout(columns, preference)
    each = (dict(row) if isinstance(row, Mapping) else row for row in in_memory(rows, source))
    return _collected(lambda: enumerate(each, start=1), layout, source, strict, limit)


def _collected(
    read: Callable[[], Iterable[tuple[int, Any]]], layout: Layout, source: str, strict: bool, limit: int | None
) -> Pairs:
    """The pairs among the rows that `read` gives with their lines."""
    writer, problems, first = RowWriter(), [], None
    lines = array("q")
    line = 0
    try:
        for line, row in read():
            try:
                if isinstance(row, Unreadable):
                    raise RowFault(row)
                first = first or (row if isinstance(row, dict) else None)
                pair = layout.pair(row)
                if row is None or pair is not None:  # a tie becomes None
                    writer.append(as_pair(pair))
                    lines.append(line)
            except RowFault as error:
                problems.append(Problem(line, str(error)))
            if limit is not None and len(writer) >= limit:
                break
        layout.finish()
    except (PairError, UnicodeDecodeError):
        raise
    except ValueError as error:  # of the layout
        raise PairError(f"{source}, line {line}: {error}") from None
    if strict and problems:
        raise PairError(_strict_message(source, problems))
    if layout.ties:
        text = "%s: %d ties dropped, which column %r calls neither better"
        _logger.warning(text, source, layout.ties, layout.preference)
    pairs = Pairs(writer.rows(), problems, source, layout.ties, lines)
    if not len(writer):
        has = f"\n  the columns are: {listed_columns(first)}; name others with columns" if first else ""
        raise PairError(f"no usable pair found. {pairs.summary()}{has}")
    return pairs


def _strict_message(source: str, problems: list[Problem]) -> str:
    if len(problems) == 1:
        ((line, reason),) = ((problem.line, problem.reason) for problem in problems)
        return f"{source}, line {line}: {reason}. Mend or remove the row, or read without strict"
    lines = [f"  line {problem.line}: {problem.reason}" for problem in problems[:_MOST_LISTED]]
    more = [f"  and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
    head = f"{source}: {len(problems)} rows are no pairs. Mend or remove them, or read without strict:"
    return "\n".join([head, *lines, *more])
