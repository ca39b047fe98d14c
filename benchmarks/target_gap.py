"""Accuracy and the finding of flipped pairs against `target_gap` and against a fixed `rho`, on policies of two sizes.

Every run of a size and seed has the same pairs, flips and order. Prints one table in Markdown: means over the seeds.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import torch

import gapo
from gapo.runs.policy.pair_batches import pair_logps
from gapo.runs.versions import versions
from gapo.study.cell_run import draw, evaluate, train
from gapo.study.material import Material, load_split
from gapo.study.study_config import StudyConfig

SIZES = ((32, 2), (128, 4))
SETTINGS = (
    *({"target_gap": target} for target in (0.03, 0.1, 0.2, 0.3, 0.6)),
    *({"rho": rho} for rho in (0.0, 0.025, 0.1, 0.25, 0.5, 1.0)),
)


def first_rho(material: Material, settings: dict[str, Any], pairs: int) -> float:
    """The radius of a first step, on the first pairs of the pool."""
    material.reset()
    batch = material.batches(material.tokens["pool"][:pairs], pairs)[0]
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(**settings), backend="torch")
    return float(step(material.model, batch)[0].rho)


def rows_of(config: StudyConfig, learning_rate: float, rate: float) -> list[list[str]]:
    """The table's rows on one size."""
    material = Material(config, load_split(config))
    rows = []
    for settings in SETTINGS:
        figures = []
        for seed in range(config.seeds):
            drawn = draw(material, config, "random", rate, seed)
            log = train(material, config, "gapo", {**settings, "learning_rate": learning_rate}, drawn).summary()
            accuracy = evaluate(material, material.tokens["test"])["accuracy"]
            figures.append((100 * accuracy, log["auroc_weight"], 100 * log["fifths"][0], log["mean_gap_late"]))
        accuracy, auroc, lowest, gap = np.mean(figures, axis=0)
        error = np.std([f[0] for f in figures], ddof=1) / len(figures) ** 0.5 if len(figures) > 1 else 0.0
        name, value = next(iter(settings.items()))
        rho = first_rho(material, settings, config.batch_size)
        size = f"{config.tiny_hidden_size} x {config.tiny_layers}"
        rows.append([size, f"`{name}={value:g}`", f"{rho:.3g}", f"{accuracy:.1f} ± {error:.1f}", f"{auroc:.3f}"])
        rows[-1] += [f"{lowest:.1f} %", f"{gap:.2f}"]
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", default="demo", help='a file of pairs, or "demo" for generated ones')
    parser.add_argument("--eval_pairs", help="pairs to test on; a share of the pairs without")
    parser.add_argument("--limit", type=int, help="use only so many of the pairs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train_pairs", type=int, default=640)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--flip_rate", type=float, default=0.3, help="share of the training labels flipped at random")
    parser.add_argument("--cache_dir", default=StudyConfig.cache_dir, help="where warmed-up policies are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = StudyConfig(
        pairs=options.pairs,
        limit=options.limit,
        eval_pairs=options.eval_pairs,
        seeds=options.seeds,
        train_pairs=options.train_pairs,
        test_pairs=400,
        validation_pairs=100,
        cache_dir=options.cache_dir,
    )
    print(f"{date.today()}, {platform.machine()}, {platform.system()}, {versions()}\n")
    print("| policy | setting | rho at the first step | accuracy | AUROC | flips in the lowest fifth | late gap |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for width, layers in SIZES:
        rows_of(replace(base, tiny_hidden_size=width, tiny_layers=layers), options.learning_rate, options.flip_rate)


if __name__ == "__main__":
    main()
