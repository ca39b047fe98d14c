"""Rows on disk, and views of them: a million pairs take the memory of their numbers, not of their texts.

The rows are Python objects of any shape, so that they come back as they were read. Arrow, which gives every row the
same columns, would add keys to messages and change types.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn, overload

import numpy as np

Row = dict[str, Any]

_IN_MEMORY = 16 << 20  # bytes of rows that are not worth a file


class ReadRow(dict[str, Any]):
    """A row as it was read. It cannot be changed: the next look at the same row would not show the change."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "rows of read_pairs are read anew at each look, so that a change would be lost: make new ones, such as "
            "[{**row, 'id': i} for i, row in enumerate(rows)]"
        )

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class Rows(Sequence[Row]):
    """A read-only sequence of rows, each made when it is looked at.

    Args:
        source: the row of a number; picklable, for processes that load batches.
        index: the numbers of these rows, (n,) integers.
    """

    def __init__(self, source: Callable[[int], Row], index: np.ndarray) -> None:
        self._source, self._index = source, index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> Row | Rows:
        return self.select(place) if isinstance(place, slice) else self._source(int(self._index[place]))

    def __iter__(self) -> Iterator[Row]:
        return map(self._source, map(int, self._index))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Rows, list)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Rows({len(self)} rows)" if len(self) > 3 else f"Rows({list(self)!r})"

    def select(self, index: Sequence[int] | np.ndarray | slice) -> Rows:
        """The rows of these places, in their order."""
        return Rows(self._source, self._index[index])

    def map(self, function: Callable[[int, Row], Row]) -> Rows:
        """The rows as `function` makes them of (place, row), when they are looked at; it must be picklable."""
        return Rows(_Mapped(self, function), np.arange(len(self)))


class _Mapped:
    def __init__(self, rows: Rows, function: Callable[[int, Row], Row]) -> None:
        self._rows, self._function = rows, function

    def __call__(self, place: int) -> Row:
        return self._function(place, self._rows[place])


def selected(rows: Sequence[Row], index: Iterable[int]) -> Sequence[Row]:
    """The rows of these places: a view of `Rows`, a list of others."""
    if isinstance(rows, Rows):
        return rows.select(np.fromiter(index, dtype=np.int64))
    return [rows[i] for i in index]


def mapped(rows: Sequence[Row], function: Callable[[int, Row], Row]) -> Sequence[Row]:
    """`function` of (place, row) for each row: a view of `Rows`, a list of others."""
    return rows.map(function) if isinstance(rows, Rows) else [function(i, row) for i, row in enumerate(rows)]


def joined(*parts: Sequence[Row]) -> Rows:
    """The rows of several sequences behind each other, as a view."""
    return Rows(_Joined(parts), np.arange(sum(map(len, parts))))


class _Joined:
    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __call__(self, place: int) -> Row:
        part = int(np.searchsorted(self._ends, place, side="right"))
        return self._parts[part][place - int(self._ends[part]) + len(self._parts[part])]


class WithColumns:
    """For `mapped`: a row with more columns, from an array (n, columns) of numbers."""

    def __init__(self, names: Sequence[str], values: np.ndarray) -> None:
        self._names, self._values = names, values

    def __call__(self, place: int, row: Row) -> Row:
        return {**row, **dict(zip(self._names, self._values[place].tolist(), strict=True))}


class RowWriter:
    """Collects rows in memory, and beyond 16 MiB in a temporary file, which is removed with the last view of them."""

    def __init__(self) -> None:
        self._ends, self._block, self._written = array("q", [0]), bytearray(), 0
        self._file: _TemporaryFile | None = None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, row: Row) -> None:
        """Add a row. Raises OSError if the folder of temporary files is full."""
        self._block += pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        self._ends.append(self._written + len(self._block))
        if len(self._block) > _IN_MEMORY:
            self._flush()

    def rows(self) -> Rows:
        """The rows; none can be added afterwards."""
        if self._file is not None:
            self._flush()
        source = _Stored(self._file or bytes(self._block), np.frombuffer(self._ends, dtype=np.int64))
        return Rows(source, np.arange(len(self)))

    def _flush(self) -> None:
        self._file = self._file or _TemporaryFile()
        try:
            with open(self._file.path, "ab") as file:
                file.write(self._block)
        except OSError as error:
            raise OSError(
                f"the rows could not be written to {self._file.path}: {error.strerror}. Make room, or name another "
                "folder for temporary files in the environment variable TMPDIR"
            ) from error
        self._written += len(self._block)
        self._block.clear()


class _Stored:
    """The row of a number, from its bytes in memory or in a file. The bytes are this module's own."""

    def __init__(self, content: bytes | _TemporaryFile, ends: np.ndarray) -> None:
        self._content, self._ends = content, ends

    def __call__(self, number: int) -> Row:
        start, end = int(self._ends[number]), int(self._ends[number + 1])
        content = self._content if isinstance(self._content, bytes) else self._content.mapping()
        return ReadRow(pickle.loads(content[start:end]))


class _TemporaryFile:
    """A file that lasts as long as this object, in the process that made it; others open it by its path."""

    def __init__(self) -> None:
        descriptor, self.path = tempfile.mkstemp(prefix="gapo-rows-")
        os.close(descriptor)
        self._mapping: mmap.mmap | None = None
        weakref.finalize(self, _remove, self.path, os.getpid())

    def mapping(self) -> mmap.mmap:
        if self._mapping is None:
            with open(self.path, "rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapping

    def __reduce__(self) -> Any:
        return _opened, (self.path,)


def _opened(path: str) -> _TemporaryFile:
    file = _TemporaryFile.__new__(_TemporaryFile)
    file.path, file._mapping = path, None
    return file


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # a forked process has a copy of the object
        with suppress(OSError):
            os.unlink(path)
