"""Files written whole or not at all, whatever interrupts: an error, a full disk, a kill."""

from __future__ import annotations

import errno
import glob
import gzip
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to: it takes the place of `path`, old content and all, if the block ends well.

    Otherwise it is removed, and `path` stays as it was. What a killed process left beside `path` is removed too.

    Raises:
        OSError: it cannot be written; names `path` and says what to do.
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
    """The name under which this process writes what becomes `path`. Other processes have other names."""
    return path.with_name(f"{path.name}.part{os.getpid()}")


def sweep(path: Path) -> None:
    """Remove what processes that are gone have left of `path`: files and folders named by `partial_of`."""
    start = f"{path.name}.part"
    for old in path.parent.glob(f"{glob.escape(start)}*"):
        number = old.name[len(start) :]
        if number.isdecimal() and not _is_running(int(number)):
            with suppress(OSError):
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def require_writable(path: Path) -> None:
    """Raise OSError, naming `path`, unless a file or folder can be made there. Nothing is left behind."""
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    above = path if path == there else Path(there, path.relative_to(there).parts[0])
    if above != path and above.exists():
        raise cannot_write(path, NotADirectoryError(errno.ENOTDIR, f"{above} is a file"))
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> OSError:
    """`error`, met while writing `path`, as one that names it and says what to do."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    number = _number(error)
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room" if full else "see that the folder can be written to, or give another"
    text = f"{path} could not be written: {reason}. Nothing is half written; {remedy}, then run it again"
    told = OSError(text)
    told.errno = number  # not in the text
    return told


def _number(error: Exception) -> int:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    in_text = re.search(r"os error (\d+)", str(error))  # of safetensors
    return int(in_text[1]) if in_text else errno.EIO


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, gzipped if the name ends in .gz; whole or not at all.

    Raises:
        ValueError: a row holds what JSON cannot, such as a date.
        OSError: the file cannot be written.
    """
    path = Path(path)
    with whole(path) as partial, open(partial, "wb") as raw:
        # A gzip file without name and time: the same rows give the same bytes.
        opened = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
        with io.TextIOWrapper(opened, encoding="utf-8", newline="\n") as file:
            for number, row in enumerate(rows, start=1):
                file.write(_line(row, f"{path}, row {number}"))


def _line(row: dict[str, Any], where: str) -> str:
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{where} cannot be stored as JSON: {error}. Drop that column") from error


def _to_disk(path: Path) -> None:
    """A file system may say only now that the disk is full; and without it a rename may outlive the content."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_errors() -> tuple[type[Exception], ...]:
    """What writing may raise: safetensors, where it is loaded, has a class of its own for it."""
    loaded = sys.modules.get("safetensors")
    return (OSError,) if loaded is None else (OSError, loaded.SafetensorError)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # there, signal 0 is a real one
        return True
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
