"""Pairs divided by prompt, so that no policy judges a prompt that it trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from gapo.runs.errors import ConfigError


def prompt_groups(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """(n,) the number of each pair's prompt, from 0 in the order of the rows. Pairs without a prompt are alone."""
    numbers: dict[str, int] = {}
    groups = np.empty(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        prompt = json.dumps(row["prompt"]) if row["prompt"] else f"pair {i}"  # JSON of a text begins with a quote
        groups[i] = numbers.setdefault(prompt, len(numbers))
    return groups


def divided(groups: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) the fold of each pair, from 0: groups stay whole, and folds get about equally many pairs.

    Groups are dealt in random order, the large ones first, each to the fold that has the fewest pairs.

    Raises:
        ConfigError: there are fewer groups than folds.
    """
    sizes = np.bincount(groups)
    if len(sizes) < folds:
        have, fewer = f"{len(sizes)} different prompts", "fewer folds, or "
        if len(sizes) == 1:
            have, fewer = "one prompt only", ""
        raise ConfigError(
            f"the pairs have {have}, and folds={folds} needs as many at least, since no policy judges a prompt that it "
            f"trained on: give {fewer}pairs of more prompts"
        )
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of_group, counts = np.empty(len(sizes), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for group in order:
        smallest = int(np.argmin(counts))
        fold_of_group[group] = smallest
        counts[smallest] += sizes[group]
    folds_of_pairs: np.ndarray = fold_of_group[groups]
    return folds_of_pairs
