"""Rows of files and data sets, each with its line: JSON, JSON lines, CSV, Parquet, and data sets of `datasets`.

Files come from strangers. A damaged row becomes `Unreadable` with its reason; a file that may run code or fill the
memory is refused.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gapo._extras import named_extra

Rows = Iterable[tuple[int, Any]]

_FILES = ".json, .jsonl (each also .gz), .csv, .parquet"
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")
_COLUMNS = ("prompt", "chosen", "rejected")
_BLOCK = 1 << 20
# gzip seldom shrinks text to less than a twentieth. A file that grows a hundredfold, past 100 MiB, is taken for a bomb.
_GROWTH, _HARMLESS = 100, 100 * _BLOCK


class PairError(ValueError):
    """A source of pairs cannot be read, or one of its rows is not a pair and `strict` is set."""


class Unreadable(str):
    """Replaces a row that cannot be read; the text is the reason."""

    __slots__ = ()


def read_rows(source: str | Path, split: str) -> Rows:
    """Each row of `source` with its line (from 1; row number for Parquet and data sets), or `Unreadable`.

    Args:
        source: as in `gapo.data.read_pairs`; so is `split`.

    Raises:
        PairError: `source` cannot be read. The iteration may raise it too.
        ModuleNotFoundError: Parquet or a data set, without the `datasets` library.
    """
    path = Path(source)
    suffixes = [s.lower() for s in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if kind in _PICKLES:
        raise PairError(f"{source} is a {kind} file, which may run code when read; accepted are {_FILES}")
    try:
        if path.is_file():
            if kind not in _READERS:
                raise PairError(f"{source} has no known ending; accepted are {_FILES}, or the name of a data set")
            return _READERS[kind](path)
        if kind in _READERS or (path.exists() and not path.is_dir()):
            raise PairError(f"{source} {_what(path)}; give a file ({_FILES}) or the name of a data set")
    except OSError as error:
        raise PairError(f"{source} cannot be read: {error.strerror}") from error
    return enumerate(_load_dataset(str(source), split), start=1)


def _what(path: Path) -> str:
    if path.is_dir():
        return "is a folder"
    if path.exists():
        return "is a device or a pipe"
    return "is a link to nothing" if path.is_symlink() else "does not exist"


def _bytes(path: Path) -> bytes:
    """The content of a text file, unpacked, without a byte order mark.

    Raises:
        OSError: the file cannot be opened.
        PairError: the gzip file is damaged or unpacks to far more than text does, or the text is UTF-16.
    """
    raw = path.read_bytes()
    if path.suffix.lower() == ".gz":
        raw = _unpacked(raw, path)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PairError(f"{path} is UTF-16: save it as UTF-8")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _unpacked(raw: bytes, path: Path) -> bytes:
    most = max(_HARMLESS, _GROWTH * len(raw))
    blocks, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            while block := file.read(_BLOCK):
                blocks.append(block)
                size += len(block)
                if size > most:
                    raise PairError(
                        f"{path} unpacks to more than {_GROWTH} times its size, which text never does, and may be "
                        "meant to fill the memory: if you trust it, unpack it and give the file without .gz"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise PairError(f"{path} is not a whole gzip file: {error}") from error
    return b"".join(blocks)


def _read_lines(path: Path) -> Rows:
    return _lines(_bytes(path))


def _lines(raw: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            yield number, _parse(line)


def _read_json(path: Path) -> Rows:
    raw = _bytes(path)
    parsed = _parse(raw)
    # Many .json files are JSON lines.
    return enumerate(parsed, start=1) if isinstance(parsed, list) else _lines(raw)


def _parse(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8")
        # Python keeps the last of two equal keys. The slower hook that sees both runs only where a key may be repeated.
        once = all(text.count(f'"{name}"') < 2 for name in _COLUMNS)
        return json.loads(text) if once else json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except (ValueError, RecursionError):
        return Unreadable("not valid JSON")


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object; `Unreadable` if it repeats a column of a pair, whose first value Python would drop."""
    names = [name for name, _ in pairs]
    twice = next((name for name in _COLUMNS if names.count(name) > 1), None)
    return dict(pairs) if twice is None else Unreadable(f"column {twice!r} occurs twice in the row")


def _read_csv(path: Path) -> Rows:
    # Bytes that are not UTF-8 become lone surrogates, so that only their own row is unreadable.
    return _csv_rows(_bytes(path).decode("utf-8", errors="surrogateescape"), path)


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    limit = csv.field_size_limit(min(sys.maxsize, max(1, len(text))))  # the default, 131,072, cuts long answers
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _require_distinct(reader, path)
        while True:
            try:
                row = next(reader)
            except csv.Error as error:
                yield (
                    reader.reader.line_num,
                    Unreadable(f"not valid CSV: {error}"),
                )  # the reader's own line number does not advance
            else:
                yield reader.line_num, _csv_row(row)
    except StopIteration:
        return
    finally:
        csv.field_size_limit(limit)


def _require_distinct(reader: csv.DictReader[str], path: Path) -> None:
    try:
        names = reader.fieldnames or []
    except csv.Error as error:
        raise PairError(f"{path}: the first line, the names of the columns, is not valid CSV: {error}") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise PairError(f"{path}: column {twice!r} occurs twice in the first line: rename one")


def _csv_row(row: dict[Any, Any]) -> dict[str, Any] | Unreadable:
    if any(not is_utf8(cell) for pair in row.items() for cell in pair if isinstance(cell, str)):
        return Unreadable("not UTF-8")
    if None in row:  # csv.DictReader's key for surplus cells; a missing cell has the value None
        return Unreadable("more cells than the first line names: quote texts that hold commas")
    if row.get("prompt", "") is None:
        return Unreadable("fewer cells than the first line names, so that the prompt is missing")
    flag = {"true": True, "false": False, "1": True, "0": False}
    if (flipped := row.get("is_flipped")) is not None:
        row["is_flipped"] = flag.get(str(flipped).lower(), flipped)
    return row


def is_utf8(text: str) -> bool:
    """Whether `text` can be encoded as UTF-8; half a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Rows:
    _datasets()
    return enumerate(_parquet_rows(path), start=1)


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except Exception as error:  # PyArrow raises many kinds; all mean that the rest is unreadable
        raise PairError(f"{path} is not a whole Parquet file: {' '.join(str(error).split())}") from error


def _datasets() -> Any:
    with named_extra("reading Parquet files and data sets", "hf"):
        import datasets
    return datasets


def _load_dataset(name: str, split: str) -> Iterable[Any]:
    datasets = _datasets()
    try:
        if Path(name).is_dir() and any(Path(name, file).exists() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # `datasets` raises many kinds; all mean that the source is unreadable
        raise PairError(
            f"{name!r} is neither a file ({_FILES}) nor a data set that could be loaded (split {split!r}): "
            f"{type(error).__name__}: {error}"
        ) from error


_READERS = {".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
