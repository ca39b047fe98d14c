"""Folds: whole prompts, about equal sizes, another division for every draw."""

import numpy as np
import pytest

from gapo.runs.audit.folds import divided, prompt_groups
from gapo.runs.errors import ConfigError


def test_pairs_of_a_prompt_share_a_group_and_those_without_one_are_alone() -> None:
    prompts = ["a", "b", "a", "", "", [{"role": "user", "content": "a"}], [{"role": "user", "content": "a"}], "pair 3"]
    assert prompt_groups([{"prompt": prompt} for prompt in prompts]).tolist() == [0, 1, 0, 2, 3, 4, 4, 5]


def test_folds_hold_whole_groups_and_about_as_many_pairs() -> None:
    groups = np.random.default_rng(0).integers(60, size=500)
    groups[:90] = 7  # one prompt of many pairs
    _, groups = np.unique(groups, return_inverse=True)
    folds = divided(groups, 5, np.random.default_rng(1))
    for group in range(groups.max() + 1):
        assert len(set(folds[groups == group])) == 1
    sizes = np.bincount(folds)
    assert len(sizes) == 5
    assert sizes.max() - sizes.min() <= 10
    assert (divided(groups, 5, np.random.default_rng(2)) != folds).any()


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="have 2 different prompts, and folds=3 needs as many"):
        divided(np.array([0, 1, 1, 0]), 3, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"have one prompt only, and folds=2 .*: give pairs of more prompts"):
        divided(np.zeros(4, dtype=int), 2, np.random.default_rng(0))
