"""Files that a run writes: whole or not at all, and logs that survive an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gapo.data.writing import cannot_write, whole
from gapo.runs.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(content)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of `path`; a last line that an interruption cut is left out. Empty without a file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The safetensors file `path` of a run, opened for NumPy.

    Raises:
        ConfigError: it is no such file, or lacks what is looked for in it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it, or give --overwrite true to start anew") from error


class JsonLines:
    """A log of JSON lines, flushed line by line.

    Args:
        path: the file.
        until_step: keep what stands there up to this step, drop what came after: a resumed run does those steps again.

    Raises:
        OSError: it cannot be written; names the file. So may `write`.
    """

    def __init__(self, path: Path, until_step: int) -> None:
        kept = [row for row in read_lines(path) if row.get("step", 0) <= until_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one line. One that is cut by an error is left out by `read_lines`."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            self.close()
            raise cannot_write(self._path, error) from error

    def close(self) -> None:
        """Close the file. Every line is in it already, or its error was raised."""
        with suppress(OSError):
            self._file.close()
