"""How often the audit's interval for the share of wrong labels covers the truth, on simulated scores.

    python benchmarks/audit_coverage.py --pairs 2000 --draws 40

Two normal scores predict the better answer by a logistic of slope 2 and 1 (about 80 % right). A share of the
predictions are turned over whatever their size (the policies' own lapses), and a share of the labels are wrong.
"""

from __future__ import annotations

import argparse

import numpy as np

from gapo.runs.audit.noise_model import fit, unit_size


def draw(pairs: int, share: float, lapses: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Odd scores (pairs, 2) of labels as stated, and which of the labels are wrong."""
    x = rng.normal(size=(pairs, 2))
    first = rng.random(pairs) < 1 / (1 + np.exp(-x @ [2.0, 1.0]))
    x[first == (rng.random(pairs) < lapses)] *= -1
    wrong = rng.random(pairs) < share
    x[wrong] *= -1
    return unit_size(x), wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[2000])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.2, 0.4])
    parser.add_argument("--lapses", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2])
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args()
    print("| pairs | lapses | share | mean estimate | mean interval | covers | Brier, and of the true share alone |")
    print("|---|---|---|---|---|---|---|")
    for pairs in options.pairs:
        for lapses in options.lapses:
            for share in options.shares:
                rng = np.random.default_rng([pairs, round(1000 * share), round(1000 * lapses)])
                rows = []
                for _ in range(options.draws):
                    x, wrong = draw(pairs, share, lapses, rng)
                    model = fit(x)
                    low, high = model.share_interval()
                    brier = np.mean((model.p_wrong(x) - wrong) ** 2), np.mean((share - wrong) ** 2)
                    rows.append([model.share, low, high, low <= share <= high, *brier])
                mean = np.mean(rows, 0)
                print(
                    f"| {pairs} | {lapses:g} | {share:g} | {mean[0]:.3f} | {mean[1]:.3f} to {mean[2]:.3f} | "
                    f"{100 * mean[3]:.0f} % | {mean[4]:.3f}, {mean[5]:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
