"""Error of the first-order gap against the exact one as rho grows, pair by pair, on a trained model.

Prints a table; with --plot, also draws it. The relative error of a batch is ||gap_1 - gap|| / ||gap|| over its pairs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import shared
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gapo
from gapo.adapters.hf import PreferenceCollator
from gapo.adapters.hf.margins import pair_logps
from gapo.data import generate_pairs, read_pairs
from gapo.runs.output import plots

RADII = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]


def measure(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], adaptive: bool) -> list[dict[str, float]]:
    """For each rho the median over batches of mean gap, error in size, and correlation of the two gaps."""
    rows = []
    for rho in RADII:
        figures: list[tuple[float, float, float]] = []
        for batch in batches:
            exact, first = (
                gapo.value_and_grad(
                    pair_logps, gapo.GAPOConfig(rho=rho, adaptive=adaptive, anchor=anchor), backend="torch"
                )(model, batch)[0].anchor_gaps
                for anchor in ("exact", "first_order")
            )
            correlation = float(torch.corrcoef(torch.stack([exact, first]))[0, 1])
            figures.append((float(exact.mean()), float((first - exact).norm() / exact.norm()), correlation))
        gap, error, correlation = (median(column) for column in zip(*figures, strict=True))
        rows.append({"rho": rho, "gap": gap, "error": error, "correlation": correlation})
    return rows


def draw(tables: dict[str, list[dict[str, float]]], path: Path) -> None:
    def lines(axes: Any) -> None:
        for (name, rows), colour in zip(tables.items(), (plots.BLUE, plots.ORANGE), strict=True):
            points = [(row["rho"], row["error"]) for row in rows]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=name)
        axes.set(xscale="log", yscale="log")

    shared.write_picture(path, plots.figure("Error of the first-order gap", "rho", "relative error", lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="runs/demo/model", help="folder saved by save_pretrained")
    parser.add_argument("--pairs", help="file of pairs; generated pairs if left out")
    parser.add_argument("--batches", type=int, default=8, help="number of batches, of 16 pairs each")
    parser.add_argument("--plot", type=Path, help="SVG file for a picture of the errors")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    collator = PreferenceCollator(tokenizer, max_length=256)
    count = 16 * options.batches
    rows = read_pairs(options.pairs, limit=count).rows if options.pairs else generate_pairs(count, seed=7)
    batches = [collator(rows[i : i + 16]) for i in range(0, count, 16)]
    tables = {}
    for name, adaptive in (("adaptive", True), ("L2", False)):
        tables[name] = measure(model, batches, adaptive)
        print(f"{name}\n{'rho':>8} {'mean gap':>10} {'error':>8} {'correlation':>12}")
        for row in tables[name]:
            print(f"{row['rho']:>8} {row['gap']:>10.5f} {row['error']:>8.4f} {row['correlation']:>12.4f}")
    if options.plot is not None:
        draw(tables, options.plot)


if __name__ == "__main__":
    main()
