"""Text files opened row by row: plain or gzipped, UTF-8 unless another encoding is named."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any

# gzip seldom shrinks text to less than a twentieth. A file that grows a hundredfold, past 100 MiB, is taken for a bomb.
_GROWTH, _HARMLESS = 100, 100 << 20


class PairError(ValueError):
    """A source of pairs cannot be read, or one of its rows is not a pair and `strict` is set."""


class Unreadable(str):
    """Replaces a row that cannot be read; the text is the reason."""

    __slots__ = ()


def open_text(path: Path, encoding: str, newline: str) -> io.TextIOWrapper:
    """The text of a file, without a byte order mark.

    Bytes of another encoding become lone surrogates (see `is_utf8`), so that only their own row is unreadable.

    Args:
        path: the file; one that ends in .gz is unpacked.
        encoding: a codec of Python.
        newline: as in `open`.

    Raises:
        OSError: the file cannot be opened.
        PairError: there is no such encoding, or the text is UTF-16 and `encoding` is not. When read: the gzip file is
            damaged, or unpacks to far more than text does.
    """
    raw: io.RawIOBase = _Unpacked(path) if path.suffix.lower() == ".gz" else path.open("rb", buffering=0)
    buffered = io.BufferedReader(raw, 1 << 20)
    try:
        if buffered.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff") and "16" not in encoding:
            raise PairError(f"{path} is UTF-16: save it as UTF-8, or give encoding utf-16")
        codec = "utf-8-sig" if is_utf8_name(encoding) else encoding
        return io.TextIOWrapper(buffered, encoding=codec, errors="surrogateescape", newline=newline)
    except LookupError as error:
        buffered.close()
        raise PairError(
            f"encoding must be a text encoding of Python such as utf-8 or cp1252, got {encoding!r}"
        ) from error
    except PairError:
        buffered.close()
        raise


def is_utf8_name(encoding: str) -> bool:
    """Whether `encoding` is a name of UTF-8."""
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")


def is_utf8(text: str) -> bool:
    """Whether `text` can be encoded as UTF-8; half a surrogate pair cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Unpacked(io.RawIOBase):
    """The content of a gzip file. Reading raises PairError where it is damaged, or grows beyond what text does."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, 0
        self._most = max(_HARMLESS, _GROWTH * path.stat().st_size)
        self._file = gzip.GzipFile(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            size = self._file.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            raise PairError(f"{self._path} is not a whole gzip file: {error}") from error
        self._size += size
        if self._size > self._most:
            raise PairError(
                f"{self._path} unpacks to more than {_GROWTH} times its size, which text never does, and may be meant "
                "to fill the memory: if you trust it, unpack it and give the file without .gz"
            )
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
