"""Settings of every arm, chosen on validation pairs with the same number of tries for each.

The tries train on labels of which a share is flipped at random, and are judged on clean validation pairs: a kindness to
all arms alike, since who has noisy labels may have no clean ones to choose by. So they may also be judged on validation
pairs of which the same share is flipped. One setting then serves every noise. An
arm whose settings the user gives has no tries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gapo.study.arms import ARMS, Settings
from gapo.study.cells import Cell, settings_key
from gapo.study.grid import Grid
from gapo.study.study_config import TUNE_SEED, StudyConfig


def tune(config: StudyConfig, grid: Grid, labels: str = "clean") -> tuple[dict[str, Settings], list[dict[str, Any]]]:
    """Settings of each arm, given or the best by mean validation accuracy, and every try: "arm", settings, "accuracy".

    The accuracy is that by the true labels of the validation pairs, or with `labels` "noisy" by flipped ones.

    Raises:
        FloatingPointError: no try of an arm stayed finite.
    """
    rates = list(config.learning_rates)
    arms = {name: ARMS[name].scaled(config.rho_scale) for name in config.arm_names}
    fixed = {name: arms[name].given(settings) for name, settings in config.settings.items()}
    scores: dict[str, dict[Any, float]] = {name: {} for name in config.arm_names if name not in fixed}

    def attempt(wanted: dict[str, list[Settings]], title: str) -> None:
        if not wanted:
            return
        cells = {
            (name, settings_key(settings)): [_cell(config, name, settings, seed) for seed in range(config.tune_seeds)]
            for name, tries in wanted.items()
            for settings in tries
        }
        records = grid.run([cell for seeds in cells.values() for cell in seeds], title)
        for (name, key), seeds in cells.items():
            scores[name][key] = float(np.mean([_accuracy(records[cell], labels) for cell in seeds]))

    attempt({name: arms[name].first_tries(rates) for name in scores}, "choosing learning rates")
    if config.tune_rounds > 1:
        attempt(
            {name: arms[name].second_tries(_best(name, accuracies), rates) for name, accuracies in scores.items()},
            "choosing second settings",
        )
    if config.tune_rounds > 2:
        attempt(
            {name: arms[name].last_tries(_best(name, accuracies), rates) for name, accuracies in scores.items()},
            "choosing learning rates again",
        )
    best = {name: _best(name, accuracies) for name, accuracies in scores.items()}
    chosen = {name: fixed[name] if name in fixed else best[name] for name in config.arm_names}
    tries = [
        {"arm": name, **dict(key), "accuracy": accuracy, "chosen": dict(key) == chosen[name]}
        for name, accuracies in scores.items()
        for key, accuracy in accuracies.items()
    ]
    return chosen, tries


def _cell(config: StudyConfig, arm: str, settings: Settings, seed: int) -> Cell:
    return Cell(arm, settings_key(settings), "random", config.tune_flip_rate, TUNE_SEED + seed, "validation")


def _accuracy(record: dict[str, Any], labels: str) -> float:
    if "failed" in record:
        return -np.inf
    return record["evaluation"]["accuracy"] if labels == "clean" else record["noisy_accuracy"]


def _best(name: str, scores: dict[Any, float]) -> Settings:
    """The settings of the highest accuracy; of equal ones, those with the lower learning rate."""
    if not np.isfinite(max(scores.values())):
        raise FloatingPointError(f"no try of {name} stayed finite: lower learning_rates")
    return min((dict(key) for key in scores), key=lambda s: (-scores[settings_key(s)], s["learning_rate"]))
