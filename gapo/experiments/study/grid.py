"""The grid: cells, each finished one a file of its own, run in parallel processes and resumed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from gapo.experiments.files import write_text
from gapo.experiments.study.config import StudyConfig

_FORMAT = 1  # of a record: raised when the meaning of a run changes, so that old files are not taken for it


@dataclass(frozen=True)
class Cell:
    """One training run, or one valuation, of the study.

    Attributes:
        arm: name of the arm.
        settings: (name, value), sorted: the learning rate and the objective's own.
        mode: flip mode.
        rate: share of flipped labels.
        seed: of pairs, order and flips.
        judged_on: "test" or "validation".
        anchor_pairs: pairs that share an anchor, 0 for the whole batch.
        valuation: the SimPO settings of a valuation, whose gaps come from this cell's own run; () for a plain run.
    """

    arm: str
    settings: tuple[tuple[str, Any], ...]
    mode: str
    rate: float
    seed: int
    judged_on: str = "test"
    anchor_pairs: int = 0
    valuation: tuple[tuple[str, Any], ...] = ()


def settings_key(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings as a cell holds them."""
    return tuple(sorted(settings.items()))


class Grid:
    """Runs cells and keeps their records under `folder`; what is there already is not run again.

    Args:
        config: the study.
        folder: where the records are kept, one JSON file for each.
        fingerprint: of the policy and the pairs, which also decide a result.
    """

    def __init__(self, config: StudyConfig, folder: Path, fingerprint: str) -> None:
        self._config, self._folder = config, folder
        decisive = ("train_pairs", "epochs", "batch_size", "warmup_ratio", "valuation_share")
        self._decisive = [_FORMAT, fingerprint, *(getattr(config, name) for name in decisive)]
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
        text = json.dumps([self._decisive, asdict(cell)], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def run(self, cells: Iterable[Cell], title: str) -> dict[Cell, dict[str, Any]]:
        """The records of `cells`, in their order; those that are missing are run now.

        A run whose log-probabilities stop being finite has the record {"failed": why}.
        """
        cells = list(dict.fromkeys(cells))
        missing = [cell for cell in cells if not self.path(cell).exists()]
        with tqdm(total=len(cells), initial=len(cells) - len(missing), desc=title, smoothing=0.05) as bar:
            for cell, record in self._made(missing):
                write_text(self.path(cell), json.dumps({"cell": asdict(cell), "record": record}) + "\n")
                bar.update()
        return {cell: json.loads(self.path(cell).read_text(encoding="utf-8"))["record"] for cell in cells}

    def _made(self, cells: Sequence[Cell]) -> Iterable[tuple[Cell, dict[str, Any]]]:
        if not cells:
            return
        workers = self._config.workers or os.cpu_count() or 1
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(self._config,)
            )
        waiting = {self._pool.submit(_measure, cell): cell for cell in cells}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


_worker: dict[str, Any] = {}


def _start(config: StudyConfig) -> None:
    """Load what every run needs, once for each process: one thread each, so that processes do not get in each other's
    way and results do not depend on the number of cores."""
    import torch

    from gapo.experiments.study.policy import Material, load_split

    torch.set_num_threads(1)
    _quiet()
    _worker.update(config=config, material=Material(config, load_split(config)))


def _measure(cell: Cell) -> dict[str, Any]:
    from gapo.experiments.study.run import measure

    return measure(_worker["material"], _worker["config"], cell)


def _quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
