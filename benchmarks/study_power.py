"""How small a difference between two objectives can a noise study see? To simulate before seeds and pairs are chosen.

    python benchmarks/study_power.py --disagree 0.15 --spread 0.012

A seed trains both objectives on the same pairs and flips. On a test pair they disagree with probability `disagree`. The
true difference of their accuracies varies from seed to seed with standard deviation `spread`. A paired t test at 95 %
over the seeds decides. Each cell is the true difference, in points, that four of five such studies find. Test pairs are
drawn anew for each seed here; a study that has the same ones for all seeds says less about other pairs than this.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy import stats

STUDIES = 4000


def power(true: float, seeds: int, pairs: int, disagree: float, spread: float, rng: np.random.Generator) -> float:
    """Share of simulated studies that find a difference of `true` to be above 0."""
    of_seed = np.clip(rng.normal(true, spread, (STUDIES, seeds)), -disagree, disagree)
    apart = rng.binomial(pairs, disagree, (STUDIES, seeds))
    ahead = rng.binomial(apart, (1 + of_seed / disagree) / 2)
    differences = (2 * ahead - apart) / pairs
    errors = differences.std(1, ddof=1) / np.sqrt(seeds)
    t = differences.mean(1) / np.maximum(errors, 1e-12)
    return float((t > stats.t.ppf(0.975, seeds - 1)).mean())


def smallest(seeds: int, pairs: int, disagree: float, spread: float, wanted: float = 0.8) -> float:
    """The true difference that is found with the power `wanted`, by bisection; infinite where none is."""
    low, high = 0.0, disagree
    if power(high, seeds, pairs, disagree, spread, np.random.default_rng(0)) < wanted:
        return float("inf")
    for _ in range(12):
        middle = (low + high) / 2
        is_found = power(middle, seeds, pairs, disagree, spread, np.random.default_rng(0)) >= wanted
        low, high = (low, middle) if is_found else (middle, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disagree", type=float, default=0.15, help="share of test pairs on which the two disagree")
    parser.add_argument("--spread", type=float, default=0.012, help="deviation of the true difference over seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 8, 12, 20])
    parser.add_argument("--pairs", type=int, nargs="+", default=[400, 600, 1000, 2000], help="test pairs")
    options = parser.parse_args()
    print("| seeds | " + " | ".join(f"{pairs} test pairs" for pairs in options.pairs) + " |")
    print("|---" * (1 + len(options.pairs)) + "|")
    for seeds in options.seeds:
        cells = [100 * smallest(seeds, pairs, options.disagree, options.spread) for pairs in options.pairs]
        print(f"| {seeds} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
