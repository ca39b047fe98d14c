"""What adapters log."""

import numpy as np
import pytest

from gapo import GAPOConfig, value_and_grad
from gapo.metrics import combine, reward_metrics, step_metrics


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
