"""The grid: cells of the study, run in parallel processes, each finished one in a file of its own.

The file's name is a hash of everything that decides the cell's result. So a study that is stopped, or extended by arms
or seeds, runs only the cells whose files are missing. Several copies of the command, on one folder, share the cells: a
copy claims those that it runs, and waits for the others'.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

import gapo
from gapo.files import write_text
from gapo.runs.claims import POLL, Claims
from gapo.study.cell_run import measure
from gapo.study.cells import Cell
from gapo.study.material import Material, load_split
from gapo.study.study_config import StudyConfig

_FORMAT = 2  # of a record: raised when the meaning of a run changes, so that old files are not taken for it
_FORMATS = {"gapo-gaussian": 3}  # of arms whose runs alone have changed


class Grid:
    """Runs cells and writes their records under `folder`; a cell with a record is not run again.

    Args:
        config: the study.
        folder: of the records, one JSON file for each.
        material: the policy and the pairs, which also decide a result. With one worker runs are made on it, in this
            process.
        claims: of this copy of the command.
    """

    def __init__(self, config: StudyConfig, folder: Path, material: Material, claims: Claims) -> None:
        self._config, self._folder, self._material, self._claims = config, folder, material, claims
        decisive = ("train_pairs", "epochs", "batch_size", "warmup_ratio", "valuation_share")
        checks = [config.checks, config.check_pairs] if config.checks else []
        self._decisive = [material.fingerprint, *(getattr(config, name) for name in decisive), *checks]
        self._made_by = {"gapo": gapo.__version__, "torch": torch.__version__, "code": _code()}
        self._others: dict[Path, str] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Grid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)

    def path(self, cell: Cell) -> Path:
        """The file of a cell, named by a hash of all that decides its result."""
        text = json.dumps([[_FORMATS.get(cell.arm, _FORMAT), *self._decisive], asdict(cell)], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def run(self, cells: Iterable[Cell], title: str) -> dict[Cell, dict[str, Any]]:
        """The records of `cells`, in their order; those that are missing are run now.

        A run whose log-probabilities stop being finite has the record {"failed": why}.
        """
        cells = list(dict.fromkeys(cells))
        missing = self._missing(cells)
        with tqdm(total=len(cells), initial=len(cells) - len(missing), desc=title, smoothing=0.05) as bar:
            for cell, record in self._records(missing):
                entry = {"cell": asdict(cell), "record": record, "made_by": self._made_by}
                write_text(self.path(cell), json.dumps(entry) + "\n")
                self._claims.release(self.path(cell))
                bar.update()
            bar.update(bar.total - bar.n)  # those of other copies
        entries = {cell: json.loads(self.path(cell).read_text(encoding="utf-8")) for cell in cells}
        for cell, entry in entries.items():
            if (by := entry.get("made_by")) != self._made_by:
                name = "an earlier version" if by is None else f"gapo {by['gapo']}, torch {by['torch']}, {by['code']}"
                self._others[self.path(cell)] = name
        return {cell: entry["record"] for cell, entry in entries.items()}

    def others(self) -> str | None:
        """A line on runs whose files were written by other code or another PyTorch than the present; None without."""
        if not self._others:
            return None
        by = "; ".join(f"{count} by {name}" for name, count in Counter(self._others.values()).items())
        return (
            f"{len(self._others)} runs, tries included, were kept from other code than now ({by}): "
            "--overwrite true makes them anew"
        )

    def _missing(self, cells: Sequence[Cell]) -> list[Cell]:
        written = set(os.listdir(self._folder)) if self._folder.is_dir() else set()
        return [cell for cell in cells if self.path(cell).name not in written]

    def _records(self, missing: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """The cells that this copy runs, as they end. At the end every cell of `missing` has a record."""
        workers = self._config.workers or _cores()
        running: dict[Future[dict[str, Any]], Cell] = {}
        is_waiting = False
        while missing or running:
            missing = [cell for cell in self._missing(missing) if cell not in running.values()]
            for cell in missing:
                if len(running) == workers:
                    break
                if self._claims.take(self.path(cell)):
                    if self.path(cell).exists():  # since we looked
                        self._claims.release(self.path(cell))
                    else:
                        running[self._submit(cell, workers)] = cell
            if running:
                done = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)[0]
                yield from ((running.pop(future), future.result()) for future in done)
            elif missing:
                if not is_waiting:
                    tqdm.write(f"waiting for runs of other copies of this study: {len(missing)}")
                is_waiting = True
                time.sleep(POLL)

    def _submit(self, cell: Cell, workers: int) -> Future[dict[str, Any]]:
        if workers == 1:
            here: Future[dict[str, Any]] = Future()
            here.set_result(measure(self._material, self._config, cell))
            return here
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(self._config,)
            )
        return self._pool.submit(_measure, cell)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _code() -> str:
    """A digest of gapo's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(gapo.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"code {digest.hexdigest()[:8]}"


_worker: dict[str, Any] = {}  # of a worker process: what every run needs, loaded once


def _start(config: StudyConfig) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    one_thread()
    _worker.update(config=config, material=Material(config, load_split(config)))


def _end_with_parent() -> None:
    """A killed study leaves no process behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measure(cell: Cell) -> dict[str, Any]:
    return measure(_worker["material"], _worker["config"], cell)


def one_thread() -> int:
    """Compute with one thread from now on, so that processes do not get in each other's way and results do not depend
    on the number of cores; returns how many there were. The progress bars of transformers are silenced."""
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads
