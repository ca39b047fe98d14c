"""`gapo train`: pairs in, a tuned model, metrics and a report out."""

from __future__ import annotations

import importlib
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import gapo
from gapo._extras import named_extra
from gapo.config import GAPOConfig
from gapo.data import Pairs, flip_pairs, generate_pairs, read_pairs
from gapo.experiments.config import ConfigError, TrainConfig, as_dict, require_loss_settings
from gapo.experiments.files import write_text
from gapo.experiments.records import RunData
from gapo.experiments.report import write_report
from gapo.experiments.tiny import tiny_model

_FILES = ("summary.json", "report.html", "metrics.jsonl", "steps.jsonl", "config.json", "reference.safetensors")
_VERSIONS = ("torch", "transformers", "accelerate", "peft", "jax", "flax", "mlx", "mlx-lm", "numpy", "tokenizers")


def train(run: TrainConfig, step: GAPOConfig) -> dict[str, Any]:
    """Run one training; returns its summary, which is also `summary.json` in the output folder.

    Raises:
        ConfigError: the output folder holds a finished run, or one of other settings.
        gapo.data.PairError: the pairs cannot be read.
        ModuleNotFoundError: the backend's libraries are not installed.
    """
    require_loss_settings(run, step)
    loop = _loop(run.backend)
    folder = Path(run.output_dir)
    _prepare_folder(folder, run, step)
    data = load_data(run)
    print(data.summary, flush=True)
    write_text(folder / "config.json", json.dumps(as_dict(run, step), indent=2) + "\n")
    write_text(folder / "data.txt", data.summary + "\n")
    model = str(tiny_model(run, data.train)) if run.model == "tiny" else run.model
    began = time.monotonic()
    before, after = loop.run(run, step, data, model, folder)
    summary = {
        "loss": run.loss,
        "before": before,
        "after": after,
        "train_pairs": len(data.train),
        "flipped": sum(row["is_flipped"] for row in data.train),
        "held_out_pairs": len(data.held_out),
        "seconds": round(time.monotonic() - began, 1),
        "versions": versions(),
    }
    write_report(folder, summary)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")  # last: its presence means finished
    return summary


def _loop(backend: str) -> Any:
    """The training loop of a backend, imported first of all: no file is touched where it is not installed."""
    with named_extra(f"gapo train with backend {backend}", {"torch": "hf", "jax": "flax", "mlx": "mlx-lm"}[backend]):
        return importlib.import_module(f"gapo.experiments.train_{backend}")


def load_data(run: TrainConfig) -> RunData:
    """Read, hold out and flip: the training labels alone are flipped."""
    if run.pairs == "demo":
        pairs = Pairs(generate_pairs(run.demo_size, seed=run.seed), source="generated demonstration pairs")
        held_out = generate_pairs(max(200, run.demo_size // 10), seed=run.seed, split="test")
        held_out_from = "generated, from other fillings"
    else:
        pairs = read_pairs(run.pairs, split=run.split, strict=run.strict, limit=run.limit)
        if run.eval_pairs is not None:
            clean = read_pairs(run.eval_pairs, split=run.split, strict=run.strict)
            held_out, held_out_from = clean.rows, clean.summary()
        else:
            pairs, held_out = _hold_out(pairs, run)
            held_out_from = f"a random {run.eval_fraction:.0%} of the training file"
    if not held_out:
        raise ConfigError("no pair is held out to evaluate on: give eval_pairs, or a larger eval_fraction")
    rows = flip_pairs(pairs.rows, mode=run.flip_mode, rate=run.flip_rate, seed=run.flip_seed, favour=run.flip_favour)
    flipped = sum(row["is_flipped"] for row in rows)
    summary = (
        f"train: {pairs.summary()}\n"
        f"flipped: {flipped} of {len(rows)} training labels ({run.flip_mode}, rate {run.flip_rate})\n"
        f"held out: {len(held_out)} pairs, {held_out_from}"
    )
    return RunData(rows, held_out, summary)


def versions() -> dict[str, str]:
    """Versions of Python, of gapo and of what it ran on."""
    found = {"python": platform.python_version(), "gapo": gapo.__version__}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _hold_out(pairs: Pairs, run: TrainConfig) -> tuple[Pairs, list[dict[str, Any]]]:
    order = np.random.default_rng(run.seed).permutation(len(pairs.rows))
    count = round(run.eval_fraction * len(order))
    held_out = [pairs.rows[i] for i in sorted(order[:count])]
    rest = [pairs.rows[i] for i in sorted(order[count:])]
    return Pairs(rest, pairs.problems, pairs.source), held_out


def _prepare_folder(folder: Path, run: TrainConfig, step: GAPOConfig) -> None:
    if folder.is_file():
        raise ConfigError(f"output_dir {run.output_dir!r} is a file; give a folder")
    if (folder / "summary.json").exists() and not run.overwrite:
        raise ConfigError(f"{run.output_dir} holds a finished run: give another output_dir, or --overwrite true")
    if run.overwrite:
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
        return
    if (folder / "config.json").exists():
        old = json.loads((folder / "config.json").read_text())
        ignored = ("resume", "overwrite", "report_to", "logging_steps")
        new = as_dict(run, step)
        changed = [name for name in new if name not in ignored and old.get(name) != new[name]]
        if changed:
            changes = ", ".join(f"{name}: {old.get(name)!r} -> {new[name]!r}" for name in changed)
            raise ConfigError(
                f"{run.output_dir} holds an unfinished run with other settings ({changes}): give another "
                "output_dir, or --overwrite true"
            )
