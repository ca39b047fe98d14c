"""What every adapter logs of a step, under TRL's keys where TRL has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import array_api_compat

from gapo._namespace import Array
from gapo.config import GAPOConfig
from gapo.objectives import LogProbs
from gapo.step import StepResult


def reward_metrics(chosen_logps: Array, rejected_logps: Array, config: GAPOConfig) -> dict[str, Array]:
    """TRL's metrics of a batch of pairs: the implicit rewards are beta times the length-normalised log-probabilities.

    Args:
        chosen_logps: (N,) nats per token.
        rejected_logps: (N,) likewise.
        config: its `beta`.

    Returns:
        Scalars: "rewards/chosen", "rewards/rejected", "rewards/accuracies" (share of pairs with a positive margin),
        "rewards/margins", "logps/chosen", "logps/rejected".
    """
    xp = array_api_compat.array_namespace(chosen_logps)
    chosen, rejected = xp.mean(chosen_logps), xp.mean(rejected_logps)
    right = xp.astype(chosen_logps > rejected_logps, chosen_logps.dtype)
    return {
        "rewards/chosen": config.beta * chosen,
        "rewards/rejected": config.beta * rejected,
        "rewards/accuracies": xp.mean(right),
        "rewards/margins": config.beta * (chosen - rejected),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }


def reference_metrics(log_ratio_margins: Array) -> dict[str, Array]:
    """What an objective with a reference is judged by besides: how far the policy departs from it, the right way.

    Args:
        log_ratio_margins: (N,) z, the policy's margin minus the reference's on summed log-probabilities, nats.

    Returns:
        Scalars: "reference/accuracies", the share of pairs with z > 0 (says nothing at the start, where the policy
        is the reference and z is rounding), and "reference/margins", the mean of z. DPO's reward margin is its beta
        times the latter.
    """
    xp = array_api_compat.array_namespace(log_ratio_margins)
    right = xp.astype(log_ratio_margins > 0, log_ratio_margins.dtype)
    return {"reference/accuracies": xp.mean(right), "reference/margins": xp.mean(log_ratio_margins)}


def pair_metrics(logps: LogProbs, config: GAPOConfig) -> dict[str, Array]:
    """`reward_metrics` of a batch, and `reference_metrics` where it has reference log-probabilities."""
    averages = logps.per_token()
    metrics = reward_metrics(averages.chosen, averages.rejected, config)
    margins = logps.log_ratio_margins()
    return metrics if margins is None else metrics | reference_metrics(margins)


def step_metrics(result: StepResult, config: GAPOConfig) -> dict[str, Array]:
    """Scalars of one step: `reward_metrics` where the log-probabilities are known, and GAPO's own under "gapo/"."""
    xp = array_api_compat.array_namespace(result.margins)
    metrics: dict[str, Array] = {}
    if result.chosen_logps is not None and result.rejected_logps is not None:
        metrics |= reward_metrics(result.chosen_logps, result.rejected_logps, config)
    metrics |= {
        "gapo/anchor_gap_mean": xp.mean(result.anchor_gaps),
        "gapo/anchor_gap_std": xp.std(result.anchor_gaps),
        "gapo/weight_mean": xp.mean(result.weights),
        "gapo/weight_min": xp.min(result.weights),
        "gapo/weight_max": xp.max(result.weights),
        "gapo/radius": result.radius,
        "gapo/changed_fraction": result.changed_fraction,
        "gapo/grad_norm": result.grad_norm,
    }
    if result.first_order_ratio is not None:
        metrics["gapo/first_order_ratio"] = result.first_order_ratio
    return metrics


def combine(name: str, values: Iterable[float], pairs: Iterable[float] | None = None) -> Any:
    """One value of the metric `name` for a window of steps: least of a "_min", greatest of a "_max", else the mean.

    Args:
        name: of the metric.
        values: one for each micro-batch.
        pairs: the number of pairs of each, so that the mean is one over pairs; None for micro-batches of one size.
    """
    values = list(values)
    if name.endswith("_min"):
        return min(values)
    if name.endswith("_max"):
        return max(values)
    counts = [1.0] * len(values) if pairs is None else list(pairs)
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
