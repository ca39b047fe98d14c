"""LD-DPO's sums and WPO's weights by loops over tokens in float64, and batches whose answers differ in length."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import token_pairs

ALPHA = 0.4
BETA = 0.3


def token_factors(labels: np.ndarray, alpha: float, vocab: int = token_pairs.VOCAB) -> np.ndarray:
    """(2N, seq, vocab): how much each log-probability at each position counts in its row's sum."""
    factors = np.zeros((*labels.shape, vocab))
    pairs = len(labels) // 2
    counts = [sum(label != -100 for label in row[1:]) for row in labels]
    for number, row in enumerate(labels):
        other = counts[(number + pairs) % (2 * pairs)]
        seen = 0
        for position, label in enumerate(row[1:]):
            if label != -100:
                factors[number, position, label] = 1.0 if seen < other else alpha
                seen += 1
    return factors


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def wpo(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """WPO's weight of each pair, equation 2 of its paper, without a cap."""
    logs, pairs = log_softmax(logits), len(labels) // 2
    means = []
    for number, row in enumerate(labels):
        aligned = [
            logs[number, position, label] - math.log(sum(math.exp(2 * x) for x in logs[number, position]))
            for position, label in enumerate(row[1:])
            if label != -100
        ]
        means.append(sum(aligned) / len(aligned))
    return [math.exp(means[i] + means[i + pairs]) for i in range(pairs)]


def lengths(labels: np.ndarray) -> np.ndarray:
    return np.array([sum(label != -100 for label in row[1:]) for row in labels])


def stacked(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels), each (2N, seq)."""
    ids, labels = (np.concatenate([batch[f"{side}_{part}"] for side in ("chosen", "rejected")]) for part in PARTS)
    return ids, labels


PARTS = ("input_ids", "labels")


def rows(count: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenised pairs whose answers have 2 to 7 tokens."""
    batch = token_pairs.arrays(count, seed)
    out = []
    for i in range(count):
        row = {}
        for side in ("chosen", "rejected"):
            size = int(batch[f"{side}_attention_mask"][i].sum())
            row |= {f"{side}_{part}": batch[f"{side}_{part}"][i, :size].tolist() for part in PARTS}
        out.append(row)
    return out
