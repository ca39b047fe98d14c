"""`gapo train`: pairs in, a tuned model, metrics and a report out."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

from gapo._extras import named_extra
from gapo.config import GAPOConfig
from gapo.data import warmup_text
from gapo.files import read_lines, write_text
from gapo.runs import ranks
from gapo.runs.config_bases import READING
from gapo.runs.errors import ConfigError, changes
from gapo.runs.held_out import Rows, fingerprint
from gapo.runs.models.tiny import answer_texts, tiny_model
from gapo.runs.train.loop import require_supported
from gapo.runs.train.loss_option import code_digest, loss_of, require_loss_settings
from gapo.runs.train.run_data import RunData, load_data
from gapo.runs.train.train_config import TrainConfig, as_dict
from gapo.runs.train.train_files import require_files
from gapo.runs.train.train_page import write_report
from gapo.runs.train.unmoved import unmoved
from gapo.runs.versions import versions

_FILES = (
    *("summary.json", "report.html", "metrics.jsonl", "steps.jsonl", "config.json", "reference.safetensors"),
    *("pairs.json", "data.txt"),
)
# Version of the drawing of held-out pairs and batches: a run of another version is not resumed.
_DRAWS = 2
# Settings that a resumed run may have anew.
_FREE = (
    *("resume", "overwrite", "report_to", "logging_steps", "num_processes"),
    *("run_name", "disable_tqdm", "log_level", "push_to_hub"),
    *("dataset_num_proc", "mixture", *READING),  # the pairs themselves are compared
)


def train(config: TrainConfig, step_config: GAPOConfig) -> dict[str, Any]:
    """Run one training; returns its summary, which is also `summary.json` in the output folder.

    In several processes (torchrun) the first one writes and prints.

    Raises:
        ConfigError: the output folder holds a finished run, or one of other settings or pairs; or a setting cannot be
            used.
        gapo.data.PairError: the pairs cannot be read.
        ModuleNotFoundError: the backend's libraries are not installed.
    """
    require_loss_settings(config.loss, step_config, config.loss_settings, config.logp_options)
    folder = Path(config.output_dir)
    require_files(config)  # before seconds of imports
    loop = _loop(config.backend)
    config = getattr(loop, "require", require_supported)(config, step_config)  # before minutes of reading
    _require_same_settings(folder, config, step_config)
    data = load_data(config)
    identity = _require_same_pairs(folder, config, data)
    ranks.meet()  # nobody writes before everybody has looked
    if ranks.is_first():
        print(data.summary, flush=True)
        _write_settings(folder, config, step_config, data, identity)
    with ranks.first_ahead():
        model = str(tiny_model(config, _warmup_answers(config, data.train))) if config.model == "tiny" else config.model
    began = time.monotonic()
    before, after = loop.run(config, step_config, data, model, folder)
    loss = loss_of(config.loss, step_config, config.loss_settings)
    summary = {
        "loss": config.loss,
        "needs_anchor": loss.needs_anchor,
        "unmoved": None,
        "weighs_by_gap": loss.objective.weighs_by_gap,
        "before": before,
        "after": after,
        "train_pairs": len(data.train),
        "flipped": sum(row["is_flipped"] for row in data.train),
        "held_out_pairs": len(data.held_out),
        "held_out_flipped": data.held_out_flipped,
        "held_out_in_training": data.in_both,
        "seconds": round(time.monotonic() - began, 1),
        "versions": versions(),
    }
    if ranks.is_first():
        summary["unmoved"] = unmoved(before, after, read_lines(folder / "steps.jsonl"), config, step_config)
        write_report(folder, summary)
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")  # last: its presence means finished
    return summary


def _warmup_answers(config: TrainConfig, rows: Rows) -> list[str]:
    if config.pairs == "demo" and not config.mixture:
        return warmup_text(2 * config.demo_size, seed=config.seed).split("\n")
    return answer_texts(rows)


def _loop(backend: str) -> Any:
    """The training loop of a backend. It is imported before any file is touched, since it may not be installed."""
    with named_extra(f"gapo train with backend {backend}", {"torch": "hf", "jax": "flax", "mlx": "mlx-lm"}[backend]):
        return importlib.import_module(f"gapo.runs.train.train_{backend}")


def _require_same_settings(folder: Path, config: TrainConfig, step_config: GAPOConfig) -> None:
    """Raise ConfigError for a folder that holds an unfinished run of other settings."""
    if config.overwrite or not (folder / "config.json").exists():
        return
    new = as_dict(config, step_config)
    old = as_dict(TrainConfig(), GAPOConfig()) | json.loads((folder / "config.json").read_text())
    if changed := changes([name for name in {**new, **old} if name not in _FREE], old, new):
        raise ConfigError(
            f"{config.output_dir} holds an unfinished run with other settings ({changed}): give another "
            "output_dir, or --overwrite true"
        )


def _require_same_pairs(folder: Path, config: TrainConfig, data: RunData) -> dict[str, Any]:
    """What identifies the run's pairs, draws and own loss. Raises where `folder` holds an unfinished run of others."""
    rows = {"train": fingerprint(data.train), "held_out": fingerprint(data.held_out)}
    code = {} if (digest := code_digest(config.loss)) is None else {"loss": digest}
    identity = {"draws": _DRAWS, "processes": ranks.count(), **rows, **code}
    if config.overwrite or not (folder / "config.json").exists():
        return identity
    path = folder / "pairs.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    remedy = "give another output_dir, or --overwrite true"
    if old.get("draws") != _DRAWS:
        raise ConfigError(
            f"{config.output_dir} holds an unfinished run of another version of gapo, which drew held-out pairs and "
            f"batches otherwise: {remedy}, or end it with that version"
        )
    if old.get("processes") != ranks.count():
        raise ConfigError(
            f"{config.output_dir} holds an unfinished run in {old.get('processes')} processes, and here are "
            f"{ranks.count()}, whose steps would be of other pairs: start as many, or {remedy}"
        )
    if old.get("loss") != identity.get("loss"):
        raise ConfigError(
            f"{config.output_dir} holds an unfinished run, and the code of its loss {config.loss!r} has changed since "
            f"it began: {remedy}, or restore that code"
        )
    if old != identity:
        which = " and ".join(name.replace("_", "-") for name in rows if old.get(name) != identity[name])
        raise ConfigError(
            f"{config.output_dir} holds an unfinished run of other {which} pairs: the data have changed since it "
            f"began; {remedy}"
        )
    return identity


def _write_settings(
    folder: Path, config: TrainConfig, step_config: GAPOConfig, data: RunData, identity: dict[str, Any]
) -> None:
    if config.overwrite:
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
    write_text(folder / "pairs.json", json.dumps(identity, indent=2) + "\n")
    write_text(folder / "config.json", json.dumps(as_dict(config, step_config), indent=2) + "\n")
    write_text(folder / "data.txt", data.summary + "\n")
