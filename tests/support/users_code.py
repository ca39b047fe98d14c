"""A user's code, which a strict type checker reads and nothing runs.

It must refuse each line with the mark of an error, and no other.
"""

from dataclasses import dataclass
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch

import gapo

Floats = npt.NDArray[np.float64]


@dataclass
class Batch:
    chosen: torch.Tensor
    rejected: torch.Tensor


def margins(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    margin: torch.Tensor = model(batch.chosen) - model(batch.rejected)
    return margin


def sides(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    chosen: torch.Tensor = model(batch.chosen)
    rejected: torch.Tensor = model(batch.rejected)
    return chosen, rejected


def train(model: torch.nn.Module, batch: Batch) -> float:
    step = gapo.value_and_grad(margins, gapo.GAPOConfig(rho=0.05, probe="loss"), backend="torch")
    result, grads = step(model, batch, gamma=torch.zeros(2))
    assert_type(result.loss, torch.Tensor)
    assert_type(result.anchor_gaps, torch.Tensor | None)
    assert_type(grads, dict[str, torch.Tensor])
    result.anchor_gaps.mean()  # error: None for an objective without an anchor
    by_side, _ = gapo.value_and_grad(sides, objective="dpo", backend="torch")(model, batch)
    assert_type(by_side.chosen_logps, torch.Tensor | None)
    return float(result.loss)


def slow_train(params: dict[str, Floats], batch: Floats) -> dict[str, Floats]:
    def drop(params: dict[str, Floats], batch: Floats) -> Floats:
        return batch * params["w"]

    result, grads = gapo.value_and_grad(drop, backend="numpy")(params, batch)
    assert_type(result.weights, Floats)
    trees: tuple[gapo.StepResult[Floats], Any] = gapo.value_and_grad(drop, backend="jax")(params, batch)
    assert_type(trees[0].margins, Floats)
    return grads


def objective(logps: Floats) -> Floats:
    gap = gapo.anchor_gap(logps, logps - 1, logps, logps - 1)
    assert_type(gap, Floats)
    loss = gapo.loss(logps, logps, logps, logps, reduction="none", loss_type="hinge", backend="numpy")
    assert_type(loss, Floats)
    return gapo.weights(gap, gamma=gap)


def tensors(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logps = gapo.sequence_logps(logits, labels, average=False)
    assert_type(logps, torch.Tensor)
    return gapo.loss(logps, logps, logps, logps)


def refused(x: Floats) -> None:
    gapo.loss(x, x, x, x, reduction="avg")  # error: no such reduction
    gapo.loss(x, x, x, x, loss_type="hing")  # error: no such loss
    gapo.weights(x, backend="tf")  # error: no such library
    gapo.weights([0.1])  # error: a list is no array
    gapo.GAPOConfig(roh=0.1)  # error: no such setting
