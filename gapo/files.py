"""Atomic files, and logs that survive an interruption.

A file is written under another name beside its own, flushed to the disk and then renamed. Whatever interrupts (an
error, a full disk, a kill), a reader sees the old content or the new one. Logs grow line by line instead, and
`read_lines` drops a last line that was cut.
"""

from __future__ import annotations

import errno
import glob
import gzip
import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gapo.records import in_memory, require_row


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which replaces `path` when the block ends without an error.

    After an error it is removed, and `path` stays as it was. What killed processes left beside `path` is removed.

    Raises:
        OSError: the file cannot be written; the message names `path` and says what to do.
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
    except write_errors() as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The name under which this process writes what becomes `path`. Others, on any machine, have other names."""
    return path.with_name(f"{path.name}.part{os.getpid()}@{socket.gethostname()}")


def sweep(path: Path) -> None:
    """Remove the files and folders named by `partial_of` that ended processes of this machine have left of `path`."""
    start = f"{path.name}.part"
    for old in path.parent.glob(f"{glob.escape(start)}*"):
        number, _, host = old.name[len(start) :].partition("@")
        if number.isdecimal() and host in ("", socket.gethostname()) and not is_running(int(number)):
            with suppress(OSError):
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path`, atomically."""
    with whole(path) as partial:
        partial.write_bytes(content)


def require_writable(path: Path) -> None:
    """Raise OSError, naming `path`, unless a file or folder can be made there. Nothing is left behind."""
    existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
    below = path if path == existing else Path(existing, path.relative_to(existing).parts[0])
    if below != path and below.exists():
        raise cannot_write(path, NotADirectoryError(errno.ENOTDIR, f"{below} is a file"))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> OSError:
    """`error`, raised while writing `path`, as an OSError whose message names `path` and says what to do."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    number = _number(error)
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room" if full else "see that the folder can be written to, or give another"
    text = f"{path} could not be written: {reason}. Nothing is half written; {remedy}, then run it again"
    renamed = OSError(text)
    renamed.errno = number  # an attribute, since OSError(number, text) would print the number
    return renamed


def _number(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    in_text = re.search(r"os error (\d+)", str(error))  # as safetensors, written in Rust, words it
    return int(in_text[1]) if in_text else errno.EIO


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, gzipped if the name ends in .gz, atomically.

    Args:
        path: the file.
        rows: a list of dicts, a `datasets.Dataset`, a `pandas.DataFrame`, or anything else that yields dicts.

    Raises:
        TypeError: `rows` are no rows, or one of them is no dict.
        ValueError: a row holds what JSON cannot, such as a date.
        OSError: the file cannot be written.
    """
    path, rows = Path(path), in_memory(rows, "rows")
    with whole(path) as partial, open(partial, "wb") as raw:
        # A gzip file without name and time: the same rows give the same bytes.
        opened = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
        with io.TextIOWrapper(opened, encoding="utf-8", newline="\n") as file:
            for number, row in enumerate(rows, start=1):
                file.write(_line(require_row(row, number, "rows"), f"{path}, row {number}"))


def _line(row: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{where} cannot be stored as JSON: {error}. Drop that column") from error


def _to_disk(path: Path) -> None:
    """Flush `path`: some file systems report a full disk only now, and a rename may reach the disk before the data."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_errors() -> tuple[type[Exception], ...]:
    """The exceptions that writing may raise: safetensors, once it is loaded, has a class of its own."""
    loaded = sys.modules.get("safetensors")
    return (OSError,) if loaded is None else (OSError, loaded.SafetensorError)


def is_running(process: int) -> bool:
    """Whether this machine has a process of that number; on Windows, which cannot be asked, it is taken for granted."""
    if os.name == "nt":  # there, signal 0 is a real one
        return True
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of `path`, without a last line that an interruption cut; none without a file."""
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


class JsonLines:
    """A log of JSON lines, flushed line by line.

    Args:
        path: the file.
        until_step: lines of the file up to this step stay; later ones are dropped, since a resumed run repeats them.

    Raises:
        OSError: the file cannot be written; the message names it. `write` raises it too.
    """

    def __init__(self, path: Path, until_step: int) -> None:
        rows = [row for row in read_lines(path) if row.get("step", 0) <= until_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one line. `read_lines` leaves out a line that an error cut."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            self.close()
            raise cannot_write(self._path, error) from error

    def close(self) -> None:
        """Close the file; every line was flushed, or its error was raised."""
        with suppress(OSError):
            self._file.close()
