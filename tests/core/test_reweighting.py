"""What is said of weights that are all equal or all 0: against GAPO's own weights, and once for each cause."""

from __future__ import annotations

import numpy as np
import pytest

import gapo
from gapo.objectives import resolve
from gapo.reweighting import Watch, verdict

EQUAL, NOTHING = "the weights of the pairs are all equal", "the weights of nearly all pairs are 0"


@pytest.mark.parametrize(
    ("mean", "spread", "said"),
    [(0.003, 0.002, EQUAL), (0.3, 0.15, None), (0.3, 0.03, None), (0.0, 0.3, None), (3.0, 0.3, NOTHING)],
)
def test_the_verdict_is_that_of_the_weights(mean: float, spread: float, said: str | None) -> None:
    config = gapo.GAPOConfig(rho=0.5)
    text = verdict(mean, spread, config)
    assert (text or "").startswith(said or "")
    assert (text is None) == (said is None)
    gaps = np.random.default_rng(0).normal(mean, spread, 4000)
    weights = config.beta / (1 + np.exp(config.beta * gaps - config.gamma))
    assert (said == EQUAL) == (weights.std() / weights.mean() < 0.03)
    assert (said == NOTHING) == (np.quantile(weights, 0.95) < 0.02 * config.beta)


def test_it_says_what_to_do() -> None:
    assert "set target_gap=0.3" in str(verdict(0.001, 0.001, gapo.GAPOConfig()))
    assert "raise target_gap=0.001" in str(verdict(0.001, 0.001, gapo.GAPOConfig(target_gap=0.001)))
    assert "target_gap or beta is too large" in str(verdict(5.0, 0.5, gapo.GAPOConfig(target_gap=0.5)))


@pytest.mark.parametrize("config", [gapo.GAPOConfig(rho=0.0), gapo.GAPOConfig(loss_type="hinge")])
def test_it_is_silent_where_that_was_asked_for(config: gapo.GAPOConfig) -> None:
    assert verdict(0.0, 0.0, config) is None
    assert verdict(float("nan"), 0.1, gapo.GAPOConfig()) is None


def test_a_watch_speaks_once_and_of_weights_by_the_gap_alone() -> None:
    config, said = gapo.GAPOConfig(), []
    metrics = {"gapo/anchor_gap_mean": 0.001, "gapo/anchor_gap_std": 0.001, "gapo/radius": 0.025}
    watch = Watch(config, resolve("gapo", config), said.append)
    watch.see(metrics | {"gapo/radius": 0.0})  # a fresh LoRA's first step
    watch.see({"gapo/weight_mean": 1.4})
    assert said == []
    for _ in range(3):
        watch.see(metrics)
    assert len(said) == 1
    Watch(config, resolve("gapo+dpo", config), said.append).see(metrics)
    assert len(said) == 2
    for other in ("simpo", "gapo-drop+dpo", "gapo_target"):  # without an anchor; by rank, whatever the gaps' size
        Watch(config, resolve(other, config), said.append).see(metrics)
    assert len(said) == 2
