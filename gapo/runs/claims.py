"""Claims: which process works on what, where several copies of one command share a folder, on one machine or on many.

A claim is a file beside what it claims, made with O_EXCL, so that one copy alone can make it. A thread touches the
claims that a copy holds. A claim is stale when its process is gone, which shows on its own machine, or when nothing
has touched it for `PATIENCE` seconds by the clock of the folder; then another copy takes it over. Should its owner be
alive after all, both do the same work, and write the same file whole: time is lost, and no number changes.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gapo.files import cannot_write, is_running

BEAT = 20.0  # seconds between two touches
PATIENCE = 300.0  # seconds without one; well above what network file systems cache of a file's time
POLL = 2.0  # seconds between two looks


class Claims:
    """The claims of this process. On leaving the block all of them are released.

    Raises:
        OSError: a claim cannot be written; the message names it.
    """

    def __init__(self) -> None:
        self._held: set[Path] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for claim in list(self._held):
            claim.unlink(missing_ok=True)
        self._held.clear()

    def take(self, path: Path) -> bool:
        """Claim `path`; whether it was free, or the claim on it stale."""
        claim = _claim_on(path)
        for _ in range(2):
            try:
                claim.parent.mkdir(parents=True, exist_ok=True)
                with open(claim, "x", encoding="utf-8") as file:
                    json.dump({"host": socket.gethostname(), "process": os.getpid()}, file)
            except FileExistsError:
                if not self._is_stale(claim):
                    return False
                claim.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(claim, error) from error
            else:
                self._held.add(claim)
                return True
        return False

    def release(self, path: Path) -> None:
        """Give up the claim on `path`."""
        claim = _claim_on(path)
        self._held.discard(claim)
        claim.unlink(missing_ok=True)

    @contextmanager
    def alone(self, path: Path, what: str) -> Iterator[None]:
        """Run the block while no other copy holds `path`: it waits for them, and says so once, naming `what`."""
        if not self.take(path):
            print(f"waiting for {what}, which {owner_of(path)} has in hand", flush=True)
            while not self.take(path):
                time.sleep(POLL)
        try:
            yield
        finally:
            self.release(path)

    def others(self, folder: Path) -> list[Path]:
        """The claims in `folder` that are neither this process's nor stale."""
        return [claim for claim in sorted(folder.glob("*.claim")) if not (claim in self._held or self._is_stale(claim))]

    def _is_stale(self, claim: Path) -> bool:
        owner = _read(claim)
        if owner.get("host") == socket.gethostname():
            if owner["process"] == os.getpid():  # left by an earlier process of this number, as in a container
                return claim not in self._held
            if not is_running(owner["process"]):
                return True
        try:
            with tempfile.NamedTemporaryFile(dir=claim.parent, prefix=".now-") as now:
                return os.stat(now.name).st_mtime - claim.stat().st_mtime > PATIENCE
        except FileNotFoundError:  # released since
            return True

    def _touch(self) -> None:
        while not self._ended.wait(BEAT):
            for claim in list(self._held):
                with suppress(OSError):
                    os.utime(claim)


def owner_of(path: Path) -> str:
    """Who has claimed `path`, for messages."""
    owner = _read(_claim_on(path))
    return f"process {owner['process']} on {owner['host']}" if owner else "another process"


def _claim_on(path: Path) -> Path:
    return path.with_name(f"{path.name}.claim")


def _read(claim: Path) -> dict[str, Any]:
    """What a claim says; nothing, where it is being written, or gone."""
    try:
        owner = json.loads(claim.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and {"host", "process"} <= owner.keys() else {}
