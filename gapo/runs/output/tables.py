"""Tables of rows as files: JSON lines or Parquet, by their ending."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gapo.data import write_rows
from gapo.files import whole

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")

Row = dict[str, Any]


def require_ending(name: str, path: str) -> None:
    """Raise ValueError unless `path`, the value of option `name`, ends as a table can."""
    if not path.endswith(ENDINGS):
        raise ValueError(f"{name} must end in {', '.join(ENDINGS)}, got {path!r}")


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` to `path`, atomically; the same rows give the same bytes.

    Raises:
        ValueError: a column holds values of several kinds, which Parquet cannot, or of a kind that JSON cannot.
        OSError: the file cannot be written.
    """
    if path.suffix == ".parquet":
        _write_parquet(path, rows)
    else:
        write_rows(path, rows)


def read_table(path: Path) -> list[Row]:
    """The rows that `write_table` wrote to `path`."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: a column cannot be stored as Parquet ({error}); write .jsonl instead") from error
    with whole(path) as partial:
        pyarrow.parquet.write_table(table, partial)
