"""What adapters log."""

import numpy as np
import pytest

from gapo import GAPOConfig, value_and_grad
from gapo.metrics import (
    combine,
    evaluation_columns,
    evaluation_metrics,
    reference_metrics,
    reward_metrics,
    step_metrics,
)
from gapo.objectives import LogProbs, resolve


def test_reward_metrics_are_trls() -> None:
    chosen, rejected = np.array([-1.0, -2.0, -3.0, -1.0]), np.array([-2.0, -1.0, -4.0, -1.0])
    assert reward_metrics(chosen, rejected, GAPOConfig(beta=2.0)) == {
        "rewards/chosen": -3.5,
        "rewards/rejected": -4.0,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.5,
        "logps/chosen": -1.75,
        "logps/rejected": -2.0,
    }


def test_with_a_reference_the_log_ratios_are_measured_too() -> None:
    margins = np.array([0.5, -1.5, 0.0, 3.0])
    assert reference_metrics(margins) == {"reference/accuracies": 0.5, "reference/margins": 0.5}
    averages, lengths = (np.array([-1.0, -2.0]), np.array([-2.0, -1.0])), np.array([2, 3, 4, 5])
    plain = LogProbs.from_averages(*averages, lengths)
    assert plain.chosen.tolist() == [-2.0, -6.0]
    assert plain.rejected.tolist() == [-8.0, -5.0]
    assert plain.log_ratio_margins() is None
    config, loss = GAPOConfig(), resolve("simpo")
    rewards = reward_metrics(*averages, config)
    metrics = evaluation_metrics(evaluation_columns(loss, plain), config)
    assert metrics == {"loss": metrics["loss"], **rewards}
    compared = LogProbs.from_averages(*averages, lengths, np.array([-3.0, -6.0]), np.array([-8.0, -9.0]))
    assert evaluation_metrics(evaluation_columns(loss, compared), config) == {
        "loss": metrics["loss"],
        **rewards,
        "reference/accuracies": 0.5,  # z is 6 - 5 and -1 - 3
        "reference/margins": -1.5,
    }


def test_step_metrics_hold_what_the_step_measured() -> None:
    config = GAPOConfig(adaptive=False, rho=0.5)
    step = value_and_grad(lambda p, b: b @ p["w"], config, backend="numpy")
    result, _ = step({"w": np.ones(2)}, np.array([[1.0, 0.0], [1.0, 1.0]]))
    metrics = step_metrics(result, config)
    assert "rewards/chosen" not in metrics  # only margins are known
    assert metrics["gapo/anchor_gap_mean"] == pytest.approx(result.anchor_gaps.mean())
    assert metrics["gapo/anchor_gap_std"] == pytest.approx(result.anchor_gaps.std())
    assert metrics["gapo/weight_min"] == min(result.weights) < metrics["gapo/weight_max"] == max(result.weights)
    assert metrics["gapo/radius"] == pytest.approx(0.5)
    assert metrics["gapo/changed_fraction"] == 1
    assert metrics["gapo/first_order_ratio"] == pytest.approx(1)


def test_combine_over_a_window() -> None:
    assert combine("gapo/weight_min", [3.0, 1.0]) == 1
    assert combine("gapo/weight_max", [3.0, 1.0]) == 3
    assert combine("gapo/weight_mean", iter([3.0, 1.0])) == 2
