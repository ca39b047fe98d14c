"""Draws that share a seed: whatever is drawn besides the flips meets flipped pairs as often as chance would have it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gapo
from gapo import data
from gapo.data.streams import stream
from gapo.runs.score.score_table import plan
from gapo.runs.train.run_data import load_data
from gapo.runs.train.train_config import TrainConfig
from gapo.study.material import load_split
from gapo.study.study_config import StudyConfig

PAIRS, SHARE, SEEDS = 200, 0.2, 12


def rows() -> list[dict[str, Any]]:
    return [{"id": i, "prompt": f"{i}? ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(PAIRS)]


def held_out(path: Path, seed: int) -> list[int]:
    run = TrainConfig(pairs=str(path), eval_fraction=SHARE, seed=seed)
    return [row["id"] for row in load_data(run).held_out]


def first_batches(path: Path, seed: int) -> list[int]:
    tokens = {name: [1, 2] for name in data.collate.TOKENIZED}
    made = data.batches([tokens] * PAIRS, 8, pad_token_id=0, seed=seed)
    return [i for batch in made for i in batch["index"]][: round(SHARE * PAIRS)]


def first_scores(path: Path, seed: int) -> list[int]:
    return [i for _, _, index in plan(PAIRS, 8, 1, seed) for i in index][: round(SHARE * PAIRS)]


def study(path: Path, seed: int) -> list[list[int]]:
    count = round(SHARE * PAIRS)
    sizes = {"train_pairs": 10, "validation_pairs": count, "test_pairs": count}
    split = load_split(StudyConfig(pairs=str(path), seed=seed, **sizes))
    return [[row["id"] for row in part] for part in (split.validation, split.test)]


@pytest.mark.parametrize(
    "drawn",
    [held_out, first_batches, first_scores, lambda *at: study(*at)[0], lambda *at: study(*at)[1]],
    ids=["held-out pairs", "batches", "scores", "validation pairs of a study", "test pairs of a study"],
)
@pytest.mark.parametrize("later", [0, 1], ids=["flipped by the same seed", "flipped by the next seed"])
def test_flips_are_drawn_as_often_as_chance_has_it(
    tmp_path: Path, drawn: Callable[[Path, int], list[int]], later: int
) -> None:
    path, count = tmp_path / "noisy.jsonl", round(SHARE * PAIRS)
    found = []
    for seed in range(SEEDS):
        noisy = data.flip_pairs(rows(), rate=SHARE, seed=seed + later)
        data.write_rows(path, noisy)
        flipped = {row["id"] for row in noisy if row["is_flipped"]}
        chosen = drawn(path, seed)
        assert len(chosen) == count
        found.append(len(flipped & set(chosen)))
    mean = count * SHARE  # of the hypergeometric distribution, and its variance
    spread = np.sqrt(count * SHARE * (1 - SHARE) * (PAIRS - count) / (PAIRS - 1))
    assert np.abs(np.array(found) - mean).max() < 5 * spread
    assert abs(np.mean(found) - mean) < 4 * spread / np.sqrt(SEEDS)


def test_no_two_draws_of_a_seed_go_together() -> None:
    sources = [path.read_text() for path in Path(gapo.__file__).parent.rglob("*.py")]
    named = {name for text in sources for name in re.findall(r'stream\([^"()]*"([^"]+)"', text)}
    assert {"hold-out", "batches", "score batches", "study validation", "study test"} <= named
    n = 1000
    for seed in (0, 1, 17):
        drawn = [stream(seed, name, 1) for name in named]
        drawn += [np.random.default_rng(entropy) for entropy in (seed, [seed, 1], [seed, 2], [seed, 3])]
        orders = [np.argsort(generator.permutation(n)) for generator in drawn]
        together = np.corrcoef(orders)[np.triu_indices(len(orders), 1)]
        assert np.abs(together).max() < 5 / np.sqrt(n)


def test_flips_are_what_they_were() -> None:
    """Who flipped a file with an earlier version gets the same flips."""
    noisy = data.flip_pairs(rows(), rate=0.05, seed=0)
    expected = sorted(np.random.default_rng(0).permutation(PAIRS)[:10].tolist())
    assert [row["id"] for row in noisy if row["is_flipped"]] == expected
