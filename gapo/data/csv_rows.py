"""Rows of tables of text: separated by commas, semicolons or tabs."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from gapo.data.text_files import PairError, Unreadable, is_utf8, is_utf8_name, open_text

_LONGEST_CELL = 2**31 - 1  # a C long on every machine; the module's own limit, 131,072, cuts long answers
_SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}


def read_table(path: Path, kind: str, encoding: str, needed: Collection[str]) -> Iterator[tuple[int, Any]]:
    """Each row with the line that it begins on (from 1), or `Unreadable`.

    Args:
        path: the file.
        kind: ".csv" or ".tsv". Of a .csv, the first line shows the separator: the one that splits it into `needed`.
        encoding: as for `open_text`.
        needed: names of columns in lower case, without which no row is a pair.

    Raises:
        OSError, PairError: as `open_text`; or the first line names no columns. While iterating, PairError: every row
            that is not plain ASCII is of another encoding.
    """
    return _rows(open_text(path, encoding, newline=""), path, _SEPARATORS[kind], encoding, needed)


def _rows(
    file: io.TextIOWrapper, path: Path, separators: str, encoding: str, needed: Collection[str]
) -> Iterator[tuple[int, Any]]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with file:
            names, separator, lines = _header(file, path, separators, needed)
            prompts = {name for name in names if name.lower() == "prompt"}
            reader = csv.reader(file, delimiter=separator, strict=True)
            foreign: list[int] = []
            own = False  # whether a row has letters beyond ASCII that are of this encoding
            while True:
                line = lines + reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    yield line, Unreadable(f"not valid CSV: {error}")
                    continue
                if not cells:
                    continue
                if not all(map(is_utf8, cells)):
                    foreign.append(line)
                    yield line, Unreadable(f"not {'UTF-8' if is_utf8_name(encoding) else encoding}")
                    continue
                own = own or not all(map(str.isascii, cells))
                yield line, _row(names, cells, prompts)
            if foreign and not own and is_utf8_name(encoding):
                raise PairError(
                    f"{path} is not UTF-8, from line {foreign[0]} on ({len(foreign)} rows): save it as UTF-8, or "
                    "give its encoding, which is cp1252 where a spreadsheet on Windows saved it"
                )
    finally:
        csv.field_size_limit(limit)


def _header(file: Iterable[str], path: Path, separators: str, needed: Collection[str]) -> tuple[list[str], str, int]:
    """The names of the columns, the separator, and how many lines they take."""
    lines: list[str] = []

    def recorded() -> Iterator[str]:
        for line in file:
            lines.append(line)
            yield line

    readings: dict[str, list[str]] = {}
    fault: object = "another separator would end it earlier"
    for separator in separators:
        reader = csv.reader(lines if lines else recorded(), delimiter=separator, strict=True)
        try:
            names = next((cells for cells in reader if cells), [])
        except csv.Error as error:
            fault = error
            continue
        if reader.line_num == len(lines):  # the file has been read so far, and rows follow
            readings[separator] = names
    if not readings:
        raise PairError(f"{path}: the first line, the names of the columns, is not valid CSV: {fault}")
    complete = [s for s, names in readings.items() if set(needed) <= {name.strip().lower() for name in names}]
    separator = complete[0] if complete else max(readings, key=lambda s: len(readings[s]))
    names = [name.strip() for name in readings[separator]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise PairError(f"{path}: column {twice!r} occurs twice in the first line: rename one")
    return names, separator, len(lines)


def _row(names: list[str], cells: list[str], prompts: Collection[str]) -> dict[str, Any] | Unreadable:
    if len(cells) > len(names):
        return Unreadable("more cells than the first line names: quote texts that hold commas")
    row: dict[str, Any] = dict(zip(names, cells, strict=False))
    for name in names[len(cells) :]:
        if name in prompts:
            return Unreadable("fewer cells than the first line names, so that the prompt is missing")
        row[name] = None
    for name in names:
        if name.lower() == "is_flipped" and row[name] is not None:
            row[name] = {"true": True, "false": False, "1": True, "0": False}.get(row[name].lower(), row[name])
    return row
