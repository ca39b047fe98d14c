"""The whole study: policy, settings of each arm, grid, curves, valuation, report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from gapo.files import require_writable, write_text
from gapo.runs.claims import Claims, owner_of
from gapo.runs.errors import ConfigError
from gapo.runs.ranks import require_one
from gapo.runs.versions import versions
from gapo.runs.workers import one_thread
from gapo.study.arms import ARMS, Settings
from gapo.study.cell_run import before, draw
from gapo.study.cells import Cell, settings_key
from gapo.study.grid import Grid
from gapo.study.material import Material, Split, load_split
from gapo.study.outcome import Study
from gapo.study.report import write_report
from gapo.study.study_config import StudyConfig, as_dict
from gapo.study.tune import tune


def run_study(config: StudyConfig) -> Study:
    """Run the study, or what is missing of it, and write its report into `config.output_dir`.

    Several copies may run at the same time over one folder: they share the runs, and each ends with all of them.

    Raises:
        ConfigError: the pairs are too few, or the runs that `overwrite` would forget are in another copy's hands.
        gapo.data.PairError: the pairs cannot be read.
    """
    require_one("gapo study")
    folder = Path(config.output_dir)
    if folder.is_file():
        raise ConfigError(f"output_dir {config.output_dir!r} is a file; give a folder")
    for path in (folder, Path(config.cache_dir)):
        require_writable(path)
    split = load_split(config)
    print(split.summary, flush=True)
    with Claims() as claims:
        if config.overwrite:
            _forget(folder / "cells", claims)
        threads = one_thread()
        try:
            study = _measured(config, split, folder / "cells", claims)
        finally:
            torch.set_num_threads(threads)
        with claims.alone(folder / "study.html", "the report"):
            write_text(folder / "config.json", json.dumps(as_dict(config), indent=2) + "\n")
            write_report(folder, study)
    return study


def _forget(cells: Path, claims: Claims) -> None:
    """Remove the records. Raises ConfigError while another copy makes some."""
    if busy := claims.others(cells):
        raise ConfigError(
            f"{cells.parent} is in use by another copy ({owner_of(busy[0].with_suffix(''))}): to overwrite, end the "
            "others, start one, and then the others without overwrite"
        )
    shutil.rmtree(cells, ignore_errors=True)


def _measured(config: StudyConfig, split: Split, folder: Path, claims: Claims) -> Study:
    began = time.monotonic()
    with claims.alone(Path(config.cache_dir) / "study", "the policy"):
        material = Material(config, split)
    start = before(material, "test")
    print(f"policy before training: reward accuracy {start['accuracy']:.4f} on test pairs", flush=True)
    noises, left_out = possible_noises(material, config)
    for reason in left_out.values():
        print(f"left out: {reason}", flush=True)
    with Grid(config, folder, material, claims) as grid:
        labels = ("noisy", "clean") if config.validation_labels == "both" else (config.validation_labels,)
        by_labels = {name: tune(config, grid, name) for name in labels}
        chosen, tries = by_labels[labels[-1]]
        parts = plan(config, chosen, noises)
        if config.validation_labels == "both":
            parts["noisy choice"] = plan(config, by_labels["noisy"][0], noises)["grid"]
        every = [cell for cells in parts.values() for cell in cells]
        # Seed by seed, so that a study that is cut short is a whole one of fewer seeds.
        records = grid.run(sorted(every, key=lambda cell: cell.seed), "study")
        others = grid.others()
    if others is not None:
        print(others, flush=True)
    facts = {
        "data": split.summary,
        "before": start,
        "parameters": sum(p.numel() for p in material.model.parameters()),
        "trained": sum(p.numel() for p in material.model.parameters() if p.requires_grad),
        "perplexity": material.plain,
        "before_transfer": before(material, "transfer") if "transfer" in material.start else None,
        "seconds": round(time.monotonic() - began),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "others": others,
        "versions": versions(),
    }
    chosen_by = {name: settings for name, (settings, _) in by_labels.items()}
    return Study(config, chosen, tries, records, parts, left_out, facts, chosen_by)


def possible_noises(material: Material, config: StudyConfig) -> tuple[list[tuple[str, float]], dict[str, str]]:
    """(mode, rate) of the grid, and the reason for each one left out. Without flips the modes are one, run once."""
    noises: list[tuple[str, float]] = []
    left_out: dict[str, str] = {}
    for mode in config.modes:
        for rate in config.flip_rates:
            if rate == 0 and any(other == 0 for _, other in noises):
                continue
            try:
                for seed in range(config.seeds):
                    draw(material, config, mode, rate, seed)
                noises.append((mode, rate))
            except ValueError as error:
                left_out[f"{mode} {rate}"] = f"{mode} flips at {rate}: {error}"
    return noises, left_out


def plan(config: StudyConfig, chosen: dict[str, Settings], noises: list[tuple[str, float]]) -> dict[str, list[Cell]]:
    """The cells of each part: the grid (methods, then controls), the curves, the valuation."""
    methods = [name for name in chosen if not ARMS[name].control]
    controls = [name for name in chosen if ARMS[name].control]
    fewer = [(mode, rate) for mode, rate in noises if rate in (config.control_flip_rates or config.flip_rates)]
    seeds = range(config.seeds)
    fewer_seeds = seeds[: config.control_seeds or config.seeds]

    def cells(names: list[str], noises: list[tuple[str, float]], seeds: Sequence[int]) -> list[Cell]:
        return [
            Cell(name, settings_key(chosen[name]), mode, rate, seed)
            for seed in seeds
            for mode, rate in noises
            for name in names
        ]

    parts = {"grid": cells(methods, noises, seeds) + cells(controls, fewer, fewer_seeds)}
    if "gapo" in chosen:
        gapo, rate = chosen["gapo"], config.curve_flip_rate
        parts["rho"] = [
            Cell("gapo", settings_key({**gapo, "rho": rho}), "random", rate, seed)
            for seed in fewer_seeds
            for rho in config.curve_rhos
        ]
        parts["anchor"] = [
            Cell("gapo", settings_key(gapo), "random", rate, seed, anchor_pairs=pairs % config.batch_size)
            for seed in fewer_seeds
            for pairs in config.curve_anchor_pairs
        ]
        if "simpo" in chosen:
            parts["valuation"] = [
                Cell("gapo", settings_key(gapo), "random", rate, seed, valuation=settings_key(chosen["simpo"]))
                for seed in fewer_seeds
                for rate in config.valuation_rates
            ]
    return parts


def _commit() -> str | None:
    """The commit of the code, where it is in a git repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
