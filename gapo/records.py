"""Rows in memory, whatever holds them: a list of dicts, a data set of `datasets`, a table of pandas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

ACCEPTED = "a list of dicts, a datasets.Dataset or a pandas.DataFrame"


def in_memory(rows: Any, name: str) -> Any:
    """`rows` as they are, those of a `pandas.DataFrame` as a list of dicts in which what is missing is None.

    Args:
        rows: the rows.
        name: of the argument, for messages.

    Raises:
        TypeError: `rows` are a path, a dict of splits or of columns, a table in which a column stands twice, or hold no
            rows. The message says what to give.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "iterrows"):
        if twice := list(map(str, rows.columns[rows.columns.duplicated()])):
            raise TypeError(f"{name} have the column {twice[0]!r} twice: rename or drop one")
        records: list[dict[str, Any]] = rows.astype(object).where(rows.notna(), None).to_dict("records")
        return records
    if isinstance(rows, (str, bytes, PurePath)):
        raise TypeError(
            f"{name} must be {ACCEPTED}, got {str(rows)!r}: read a file with gapo.data.read_pairs(path).rows, a data "
            "set with datasets.load_dataset(name, split=...)"
        )
    if isinstance(rows, Mapping):
        keys = list(map(str, rows))
        if "chosen" in keys:
            raise TypeError(
                f"{name} must be {ACCEPTED}, got one dict of {', '.join(keys[:5])}: for one row write [row], for whole "
                "columns datasets.Dataset.from_dict(columns)"
            )
        hint = f": choose a split, such as [{keys[0]!r}]" if keys else ""
        raise TypeError(f"{name} must be {ACCEPTED}, got a dict of {', '.join(keys[:5]) or 'nothing'}{hint}")
    if not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        raise TypeError(f"{name} must be {ACCEPTED}, got {'None' if rows is None else type(rows).__name__}")
    return rows


def as_sequence(rows: Any, name: str) -> Any:
    """The rows of `in_memory`, those of an iterator as a list."""
    rows = in_memory(rows, name)
    return rows if hasattr(rows, "__len__") else list(rows)


def require_row(row: Any, number: int, name: str) -> Any:
    """`row`, if it is a dict. Raises TypeError that names its number."""
    if not isinstance(row, Mapping):
        raise TypeError(f"row {number} of {name} must be a dict, got {type(row).__name__}")
    return row
