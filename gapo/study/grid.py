"""The grid: cells of the study, run in parallel processes, each finished one in a file of its own.

The file's name is a hash of everything that decides the cell's result. So a study that is stopped, or extended by arms
or seeds, runs only the cells whose files are missing. Several copies of the command, on one folder, share the cells.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import gapo
from gapo.files import write_text
from gapo.runs.claims import Claims
from gapo.runs.workers import Workers, run_missing
from gapo.study.arms import parts_of
from gapo.study.cell_run import measure
from gapo.study.cells import Cell
from gapo.study.material import Material, load_split
from gapo.study.names import shown
from gapo.study.study_config import StudyConfig

_FORMAT = 2  # of a record: raised when the meaning of a run changes, so that old files are not taken for it
_FAR = ".*first_order_ratio"  # the warning of `gapo.rounding`, which each run would repeat
# Of arms whose runs alone have changed, weighted and varied ones among them.
_FORMATS = dict.fromkeys(("gapo-gaussian", "re_po", "gapo_re_po", "alpha_dpo", "beta_dpo"), 3)


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
        self._has_warned = False
        self._workers = Workers(config.workers, _load, (config,), here=lambda cell: _run(material, config, cell))

    def __enter__(self) -> Grid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.__exit__(kind, error, trace)

    def path(self, cell: Cell) -> Path:
        """The file of a cell, named by a hash of all that decides its result."""
        text = json.dumps([[_format_of(cell.arm), *self._decisive], asdict(cell)], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def run(self, cells: Iterable[Cell], title: str) -> dict[Cell, dict[str, Any]]:
        """The records of `cells`, in their order; those that are missing are run now.

        A run whose log-probabilities stop being finite has the record {"failed": why}.
        """
        paths = {self.path(cell): cell for cell in cells}

        def write(path: Path, result: tuple[dict[str, Any], list[str]]) -> None:
            record, far = result
            self._warn_once(far, paths[path])
            entry = {"cell": asdict(paths[path]), "record": record, "made_by": self._made_by}
            write_text(path, json.dumps(entry) + "\n")

        run_missing(paths, self._workers, self._claims, write, title)
        entries = {cell: json.loads(path.read_text(encoding="utf-8")) for path, cell in paths.items()}
        for cell, entry in entries.items():
            if (by := entry.get("made_by")) != self._made_by:
                name = "an earlier version" if by is None else f"gapo {by['gapo']}, torch {by['torch']}, {by['code']}"
                self._others[self.path(cell)] = name
        return {cell: entry["record"] for cell, entry in entries.items()}

    def _warn_once(self, far: Sequence[str], cell: Cell) -> None:
        """Repeat the first of the runs' warnings for the whole study."""
        if far and not self._has_warned:
            self._has_warned = True
            what = f"{shown(cell.arm)}: {far[0]}. The other runs of this study are not warned of"
            warnings.warn(what, RuntimeWarning, stacklevel=2)

    def others(self) -> str | None:
        """A line on runs whose files were written by other code or another PyTorch than the present; None without."""
        if not self._others:
            return None
        by = "; ".join(f"{count} by {name}" for name, count in Counter(self._others.values()).items())
        return (
            f"{len(self._others)} runs, tries included, were kept from other code than now ({by}): "
            "--overwrite true makes them anew"
        )


def _format_of(arm: str) -> int:
    """The format of an arm's records: its own, or that of the objective it is made of."""
    return _FORMATS.get(arm, _FORMATS.get(parts_of(arm)[1], _FORMAT))


def _code() -> str:
    """A digest of gapo's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(gapo.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"code {digest.hexdigest()[:8]}"


def _load(config: StudyConfig) -> Callable[[Cell], tuple[dict[str, Any], list[str]]]:
    material = Material(config, load_split(config))
    return lambda cell: _run(material, config, cell)


def _run(material: Material, config: StudyConfig, cell: Cell) -> tuple[dict[str, Any], list[str]]:
    """The record of a cell, and the run's warnings that gaps do not fit their gradient; other warnings pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", _FAR, RuntimeWarning)
        record = measure(material, config, cell)
    far = []
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning) and re.match(_FAR, str(warning.message)):
            far.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return record, far
