"""The `gapo train` run that a model comes from: its folder, its model, and its settings for a score."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gapo.config import OF_THE_UPDATE, GAPOConfig
from gapo.runs.errors import ConfigError
from gapo.runs.score.score_config import ScoreConfig

_ADOPTED = (*(f.name for f in fields(GAPOConfig) if f.name not in OF_THE_UPDATE), "max_length", "batch_size")
_OF_PAIRS = ("columns", "preference", "encoding")  # where the pairs that are scored are those of the run
_OTHER = {"rho": "target_gap", "target_gap": "rho"}  # one of them sets the radius


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run of `gapo train`."""
    return (folder / "pairs.json").is_file() and "rho" in _settings_in(folder)


def run_of(name: str) -> Path | None:
    """The run that a folder is, or is in: as its model, its checkpoints or one of these. None for any other name."""
    path = Path(os.path.abspath(name))
    return next((folder for folder in (path, *path.parents[:2]) if is_run(folder)), None) if path.is_dir() else None


def model_folder(name: str) -> str:
    """`name`, or the folder of the trained model where it is a run's.

    Raises:
        ConfigError: the run has not come to its end, and has no model yet.
    """
    if not is_run(Path(name)):
        return name
    model = Path(name, "model")
    if not model.is_dir():
        raise ConfigError(
            f"{name!r} is a run of gapo train that has not ended, and has no model yet: end it with the same command, "
            f"or score what it has with --checkpoints {name}"
        )
    return str(model)


def settings_of_runs(names: Sequence[str], pairs: str, own: Collection[str]) -> tuple[dict[str, Any], str]:
    """What a score takes from the runs that its models come from, and one line that states it.

    In a run of several processes, pairs share an anchor over all of them: its batch is theirs together.

    Args:
        names: folders of models, of checkpoints or of runs, or names on the Hub.
        pairs: the pairs that are scored.
        own: settings that the user has made; those of the runs give way.

    Raises:
        ConfigError: the runs differ in a setting.
    """
    runs = list(dict.fromkeys(run for name in names if (run := run_of(name)) is not None))
    adopted: dict[str, Any] = {}
    for run in runs:
        settings = _settings_in(run)
        processes = json.loads((run / "pairs.json").read_text(encoding="utf-8")).get("processes", 1)
        settings["batch_size"] = settings.get("batch_size", 16) * processes
        wanted = (*_ADOPTED, *(_OF_PAIRS if _same_file(pairs, settings.get("pairs")) else ()))
        for name in wanted:
            if name not in settings or name in own or _OTHER.get(name) in own:
                continue
            if name in adopted and adopted[name] != settings[name]:
                raise ConfigError(
                    f"the models come from runs with different settings, {name} {adopted[name]!r} and "
                    f"{settings[name]!r} in {run.name}: give --{name}"
                )
            adopted[name] = settings[name]
    if not adopted:
        return {}, ""
    plain = {f.name: f.default for f in (*fields(GAPOConfig), *fields(ScoreConfig))}
    shown = [name for name, value in adopted.items() if name in ("rho", "batch_size") or value != plain.get(name)]
    listed = ", ".join(f"{name} {adopted[name]}" for name in shown)
    return adopted, f"settings of {', '.join(map(str, runs))}: {listed or 'the defaults'}"


def _settings_in(folder: Path) -> dict[str, Any]:
    try:
        settings: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _same_file(a: str, b: Any) -> bool:
    return isinstance(b, str) and os.path.realpath(a) == os.path.realpath(b)
