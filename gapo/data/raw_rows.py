"""Rows of files and data sets, each with its line: JSON, JSON lines, CSV, Parquet, and data sets of `datasets`.

Files come from strangers. A damaged row becomes `Unreadable` with its reason; a file that may run code or fill the
memory is refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapo._extras import named_extra
from gapo.data.csv_rows import read_table
from gapo.data.text_files import PairError, Unreadable, is_utf8, is_utf8_name, open_text

Rows = Iterable[tuple[int, Any]]

FILES = ".json, .jsonl, .csv, .tsv (each also .gz), .parquet"
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")
_PARQUET_ROWS = 1024  # decoded at a time


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how they are read; the fields are those of `gapo.data.read_pairs`.

    `names` are the columns that no row may have twice, `needed` those that each must have, in lower case.
    """

    path: str
    split: str = "train"
    encoding: str = "utf-8"
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    names: Collection[str] = ("prompt", "chosen", "rejected")
    needed: Collection[str] = ("chosen", "rejected")


def read_rows(source: Source) -> Rows:
    """Each row of `source` with its line (from 1; row number for Parquet and data sets), or `Unreadable`.

    Raises:
        PairError: `source` cannot be read. The iteration may raise it too.
        ModuleNotFoundError: Parquet or a data set, without the `datasets` library.
    """
    path = Path(source.path)
    kind = _kind(path)
    if kind in _PICKLES:
        raise PairError(f"{path} is a {kind} file, which may run code when read; accepted are {FILES}")
    try:
        if path.is_file():
            if kind not in _READERS:
                raise PairError(f"{path} has no known ending; accepted are {FILES}, or the name of a data set")
            _require_of_hub(source, "a file")
            if not takes(source.path, "encoding"):
                _require_no_encoding(source, "a Parquet file")
            return _READERS[kind](path, kind, source)
        if kind in _READERS or (path.exists() and not path.is_dir()):
            raise PairError(f"{path} {_what(path)}; give a file ({FILES}) or the name of a data set")
    except OSError as error:
        raise PairError(f"{path} cannot be read: {error.strerror}") from error
    return enumerate(_load_dataset(source), start=1)


def takes(path: str, option: str) -> bool:
    """Whether a source is read by `option`: files of text have an encoding, data sets of the Hub can be streamed."""
    is_file = Path(path).is_file()
    if option == "encoding":
        return is_file and _kind(Path(path)) != ".parquet"
    assert option == "streaming"
    return not is_file and not _is_saved(Path(path))


def _kind(path: Path) -> str:
    """The ending of a file, in lower case, without .gz."""
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


def _is_saved(path: Path) -> bool:
    """Whether `path` is a folder of `save_to_disk`."""
    return path.is_dir() and any((path / file).exists() for file in ("state.json", "dataset_dict.json"))


def _what(path: Path) -> str:
    if path.is_dir():
        return "is a folder"
    if path.exists():
        return "is a device or a pipe"
    return "is a link to nothing" if path.is_symlink() else "does not exist"


def _read_lines(path: Path, kind: str, source: Source) -> Rows:
    return _lines(open_text(path, source.encoding, newline="\n"), source)


def _lines(file: io.TextIOBase, source: Source) -> Iterator[tuple[int, Any]]:
    with file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, _parse(line, source)


def _read_json(path: Path, kind: str, source: Source) -> Rows:
    with open_text(path, source.encoding, newline="\n") as file:
        text = file.read()
    parsed = _parse(text, source)
    # Many .json files are JSON lines.
    return enumerate(parsed, start=1) if isinstance(parsed, list) else _lines(io.StringIO(text, newline="\n"), source)


def _parse(text: str, source: Source) -> Any:
    if not is_utf8(text):
        return Unreadable(f"not {'UTF-8' if is_utf8_name(source.encoding) else source.encoding}")
    try:
        # Python keeps the last of two equal keys. The slower hook that sees both runs only where a key may be repeated.
        once = all(text.count(f'"{name}"') < 2 for name in source.names)
        return json.loads(text) if once else json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, source))
    except (ValueError, RecursionError):
        return Unreadable("not valid JSON")


def _object(pairs: list[tuple[str, Any]], source: Source) -> Any:
    """A JSON object; `Unreadable` if it repeats a column of a pair, whose first value Python would drop."""
    names = [name for name, _ in pairs]
    twice = next((name for name in source.names if names.count(name) > 1), None)
    return dict(pairs) if twice is None else Unreadable(f"column {twice!r} occurs twice in the row")


def _read_table(path: Path, kind: str, source: Source) -> Rows:
    return read_table(path, kind, source.encoding, source.needed)


def _read_parquet(path: Path, kind: str, source: Source) -> Rows:
    _datasets()
    return enumerate(_parquet_rows(path), start=1)


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                yield from batch.to_pylist()
    except Exception as error:  # PyArrow raises many kinds; all mean that the rest is unreadable
        raise PairError(f"{path} is not a whole Parquet file: {' '.join(str(error).split())}") from error


def _datasets() -> Any:
    with named_extra("reading Parquet files and data sets", "hf"):
        import datasets
    return datasets


def _load_dataset(source: Source) -> Iterable[Any]:
    datasets = _datasets()
    _require_no_encoding(source, "a data set")
    try:
        if _is_saved(Path(source.path)):
            _require_of_hub(source, "a saved data set")
            loaded = datasets.load_from_disk(source.path)
            rows = loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(
                source.path,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
            )
    except PairError:
        raise
    except Exception as error:  # `datasets` raises many kinds; all mean that the source is unreadable
        raise PairError(
            f"{source.path!r} is neither a file ({FILES}) nor a data set that could be loaded ({_part(source)}): "
            f"{type(error).__name__}: {error}"
        ) from error
    return _of_dataset(rows, source)


def _require_of_hub(source: Source, what: str) -> None:
    for name in ("config", "revision"):
        if (value := getattr(source, name)) is not None:
            raise PairError(f"{name} {value!r} is of a data set on the Hub, but {source.path} is {what}: leave it out")
    if source.streaming:
        raise PairError(f"streaming is for a data set on the Hub, but {source.path} is {what}: leave it out")


def _require_no_encoding(source: Source, what: str) -> None:
    if not is_utf8_name(source.encoding):
        raise PairError(f"encoding {source.encoding!r} is of a file of text, but {source.path} is {what}: leave it out")


def _part(source: Source) -> str:
    parts = {"split": source.split, "config": source.config, "revision": source.revision}
    return ", ".join(f"{name} {value!r}" for name, value in parts.items() if value is not None)


def _of_dataset(rows: Iterable[Any], source: Source) -> Iterator[Any]:
    """The rows one by one; a stream may break off at any of them."""
    try:
        yield from rows
    except Exception as error:  # as above
        raise PairError(
            f"{source.path!r} ({_part(source)}) cannot be read to its end: {type(error).__name__}: {error}"
        ) from error


_READERS = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
