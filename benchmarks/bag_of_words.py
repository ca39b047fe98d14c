"""Accuracy of a linear bag of words on preference pairs: the baseline of docs/study.md.

Logistic regression on the difference of the two answers' word counts (words seen in two or more training answers),
with L2 regularisation chosen among five strengths on a tenth of the training pairs.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter

import numpy as np

from gapo.data import read_pairs
from gapo.data.messages import text_of

Row = dict[str, object]


def words(answer: object) -> list[str]:
    return re.findall(r"[a-z0-9']+", text_of(answer).lower())


def differences(rows: list[Row], vocabulary: dict[str, int]) -> np.ndarray:
    """(n, words) counts in the chosen answer minus counts in the rejected one."""
    out = np.zeros((len(rows), len(vocabulary)), dtype=np.float32)
    for line, row in zip(out, rows, strict=True):
        for side, sign in (("chosen", 1), ("rejected", -1)):
            for word in words(row[side]):
                if word in vocabulary:
                    line[vocabulary[word]] += sign
    return out


def fit(x: np.ndarray, strength: float, steps: int = 300) -> np.ndarray:
    """Weights that minimise mean log(1 + exp(-x w)) + strength / 2 |w|^2, by accelerated gradient descent."""
    w, velocity = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    # The loss has curvature of at most mean |x|^2 / 4, plus the strength.
    rate = 1 / (0.25 * float((x * x).sum(1).mean()) + strength)
    for _ in range(steps):
        ahead = w + 0.9 * velocity
        gradient = -(x.T @ (1 / (1 + np.exp(x @ ahead)))) / len(x) + strength * ahead
        velocity = 0.9 * velocity - rate * gradient
        w = w + velocity
    return w


def accuracy(rows: list[Row], test: list[Row]) -> float:
    """Share of test pairs whose chosen answer a bag of words fitted on `rows` scores higher."""
    counts = Counter(word for row in rows for side in ("chosen", "rejected") for word in set(words(row[side])))
    vocabulary = {word: i for i, word in enumerate(word for word, n in counts.items() if n > 1)}
    x, held_out = differences(rows, vocabulary), max(1, len(rows) // 10)  # the first tenth chooses the strength
    strengths = [1e-4, 1e-3, 1e-2, 3e-2, 1e-1]
    scores = [float(np.mean(x[:held_out] @ fit(x[held_out:], strength) > 0)) for strength in strengths]
    return float(np.mean(differences(test, vocabulary) @ fit(x, strengths[int(np.argmax(scores))]) > 0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pairs", help="training pairs: any file that gapo reads")
    parser.add_argument("test", help="clean test pairs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[960, 4000], help="numbers of training pairs")
    parser.add_argument("--seeds", type=int, default=5, help="number of draws of each size")
    options = parser.parse_args()
    rows, test = read_pairs(options.pairs).rows, read_pairs(options.test).rows
    for size in options.sizes:
        draws = [np.random.default_rng(seed).permutation(len(rows))[:size] for seed in range(options.seeds)]
        scores = [accuracy([rows[i] for i in drawn], test) for drawn in draws]
        print(f"{min(size, len(rows))} pairs: {np.mean(scores):.3f} (from {min(scores):.3f} to {max(scores):.3f})")


if __name__ == "__main__":
    main()
