"""What every adapter logs of a step, under TRL's keys where TRL has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import array_api_compat

from gapo._namespace import Array
from gapo.config import GAPOConfig
from gapo.objectives import Loss
from gapo.pairs import LogProbs
from gapo.result import StepResult

RUNNING = "gapo/running/"  # before the name of each running statistic


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
        Scalars: "reference/accuracies", the share of pairs with z > 0, and "reference/margins", the mean of z. The
        first says nothing at the start, where the policy is the reference and z is rounding. DPO's reward margin is
        its beta times the second.
    """
    xp = array_api_compat.array_namespace(log_ratio_margins)
    right = xp.astype(log_ratio_margins > 0, log_ratio_margins.dtype)
    return {"reference/accuracies": xp.mean(right), "reference/margins": xp.mean(log_ratio_margins)}


def step_metrics(result: StepResult, config: GAPOConfig) -> dict[str, Array]:
    """Scalars of one step of any objective.

    The weights and the anchor's figures stand under "gapo/"; the latter only where the objective has an anchor. Running
    statistics stand under `RUNNING`, as they are after the step. `reward_metrics` needs a `margin_fn` that returns
    log-probabilities, `reference_metrics` a reference in the batch.
    """
    xp = array_api_compat.array_namespace(result.margins)
    metrics: dict[str, Array] = {}
    if result.chosen_logps is not None and result.rejected_logps is not None:
        metrics |= reward_metrics(result.chosen_logps, result.rejected_logps, config)
    if result.log_ratio_margins is not None:
        metrics |= reference_metrics(result.log_ratio_margins)
    metrics |= {
        "gapo/weight_mean": xp.mean(result.weights),
        "gapo/weight_min": xp.min(result.weights),
        "gapo/weight_max": xp.max(result.weights),
    }
    if result.anchor_gaps is not None:
        metrics |= {
            "gapo/anchor_gap_mean": xp.mean(result.anchor_gaps),
            "gapo/anchor_gap_std": xp.std(result.anchor_gaps),
        }
    for name in ("rho", "radius", "changed_fraction", "grad_norm", "first_order_ratio"):
        if (value := getattr(result, name)) is not None:
            metrics[f"gapo/{name}"] = value
    return metrics | {f"{RUNNING}{name}": value for name, value in (result.running or {}).items()}


def evaluation_columns(loss: Loss, logps: LogProbs, pair_weights: Array | None = None) -> dict[str, Array]:
    """What an evaluation keeps of each pair of a batch, (N,) each: `evaluation_metrics` takes them of all batches.

    Args:
        loss: of the training; it is evaluated without an anchor (method document, step 6).
        logps: of the batch, with its reference where `loss` needs one.
        pair_weights: (N,) factor of each pair's loss; None for 1.

    Returns:
        "loss", "chosen" and "rejected" (nats per token), and "z" where the batch has a reference.
    """
    averages = logps.per_token()
    losses = loss.evaluated.losses(logps)
    losses = losses if pair_weights is None else pair_weights * losses
    columns = {"loss": losses, "chosen": averages.chosen, "rejected": averages.rejected}
    return columns if (z := logps.log_ratio_margins()) is None else {**columns, "z": z}


def evaluation_metrics(columns: Mapping[str, Array], config: GAPOConfig) -> dict[str, Array]:
    """Means over pairs: "loss", `reward_metrics`, and `reference_metrics` where there is a reference.

    Args:
        columns: of `evaluation_columns`, those of several batches one behind the other.
        config: its `beta`.
    """
    xp = array_api_compat.array_namespace(columns["loss"])
    metrics = {"loss": xp.mean(columns["loss"]), **reward_metrics(columns["chosen"], columns["rejected"], config)}
    return metrics | reference_metrics(columns["z"]) if "z" in columns else metrics


def combine(name: str, values: Iterable[float], pairs: Iterable[float] | None = None) -> Any:
    """One value of the metric `name` for a window of steps: the mean; least of a "_min", greatest of a "_max".

    A running statistic stands as the last step left it.

    Args:
        name: of the metric.
        values: one for each micro-batch.
        pairs: the number of pairs of each, so that the mean is one over pairs; None for micro-batches of one size.
    """
    values = list(values)
    if name.startswith(RUNNING):
        return values[-1]
    if name.endswith("_min"):
        return min(values)
    if name.endswith("_max"):
        return max(values)
    counts = [1.0] * len(values) if pairs is None else list(pairs)
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
