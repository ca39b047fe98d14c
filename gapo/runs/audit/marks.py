"""`marks.json`: what a person marked on the page of an audit, "wrong", "right" or "unsure", as the page saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT, VERSION = "gapo-marks", 1
MARKS = ("wrong", "right", "unsure")


def read_marks(path: str | Path, digest: str, *, pairs: int | None = None) -> dict[int, str]:
    """The mark of each row that the file marks: {place among the usable pairs, from 0: mark}.

    Args:
        path: the file that the page saved.
        digest: of the pairs, `summary["digest"]` of the audit.
        pairs: how many there are, or None where that is not known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no marks, those of another version or of other pairs, or one that cannot be; in one
            line.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: save the marks on the audit's page, and name that file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no marks.json, as an audit's page saves it: {_reason(error)}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{path} is no marks.json, as an audit\'s page saves it: it has no "format": {FORMAT!r}')
    if (version := json.dumps(content.get("version"))) != str(VERSION):
        raise ValueError(f"{path} holds marks of version {version}, and this gapo reads {VERSION}: save them anew")
    if content.get("pairs_digest") != digest:
        theirs = str(content.get("pairs_digest"))
        raise ValueError(
            f"{path} marks other pairs (their digest begins with {theirs[:12]!r}, that of these with {digest[:12]!r}): "
            "give the pairs and the columns that the page was made of"
        )
    entries = content.get("marks")
    if not isinstance(entries, list):
        raise ValueError(f'{path} is no marks.json, as an audit\'s page saves it: its "marks" are no list')
    marks: dict[int, str] = {}
    for place, entry in enumerate(entries):
        where = f"{path}, marks[{place}]"
        row, mark = _checked(entry, where, pairs)
        if marks.setdefault(row, mark) != mark:
            raise ValueError(
                f"{where}: row {row} is marked {marks[row]!r} before, and {mark!r} here; leave one of them"
            )
    return marks


def _checked(entry: Any, where: str, pairs: int | None) -> tuple[int, str]:
    if not isinstance(entry, dict):
        raise ValueError(f'{where}: must be an object with "row" and "mark", got {json.dumps(entry)[:60]}')
    row, mark = entry.get("row"), entry.get("mark")
    if mark not in MARKS:
        raise ValueError(f"{where}: mark must be {', '.join(map(repr, MARKS))}, got {json.dumps(mark)[:60]}")
    if type(row) is not int or row < 0 or (pairs is not None and row >= pairs):
        end = "up" if pairs is None else f"to {pairs - 1}"
        raise ValueError(f"{where}: row must be a whole number from 0 {end}, got {json.dumps(row)[:60]}")
    return row, mark


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} in line {error.lineno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
