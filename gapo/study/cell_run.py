"""One run of a study: a policy trained on noisy pairs with one objective, and its measurements.

The order of batches (pairs of like length together) and the schedule are the study's own, not those of `gapo train`:
the published numbers depend on both, bit for bit for a seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import gapo
from gapo.data import flip_pairs
from gapo.objectives import OBJECTIVES, Objective
from gapo.study.arms import ARMS
from gapo.study.cells import Cell
from gapo.study.policy import Material, flipped, length, pair_logps
from gapo.study.study_config import StudyConfig
from gapo.study.weight_log import WeightLog

_BUCKET = 8  # batches that are sorted by length together: little padding, and still random batches
_TRUE_LABELS = 250  # training pairs on whose true labels the trained policy is judged


@dataclass(frozen=True)
class Draw:
    """What a seed draws, the same for every arm: training pairs, their flips, and the batches in their order.

    Attributes:
        rows: (n,) indices into the pool.
        is_flipped: (n,) bool.
        order: for each step the indices among the n, in the order of training.
        seed: what drew them, and draws the gaussian directions.
    """

    rows: np.ndarray
    is_flipped: np.ndarray
    order: list[np.ndarray]
    seed: int


def draw(material: Material, config: StudyConfig, mode: str, rate: float, seed: int) -> Draw:
    """Training pairs, flips and order of `seed`. The pairs do not depend on mode and rate.

    Raises:
        ValueError: more flips are asked for than the mode can give.
    """
    rng = np.random.default_rng([seed, 1])
    rows = rng.permutation(len(material.split.pool))[: config.train_pairs]
    noisy = flip_pairs([material.split.pool[i] for i in rows], mode=mode, rate=rate, seed=seed)
    lengths = np.array([length(material.tokens["pool"][i]) for i in rows])
    order = [batch for _ in range(config.epochs) for batch in bucketed(lengths, config.batch_size, rng)]
    return Draw(rows, np.array([row["is_flipped"] for row in noisy]), order, seed)


def bucketed(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches in random order, each of pairs of about equal length; the last, incomplete one is left out."""
    order = rng.permutation(len(lengths))
    groups = [order[i : i + _BUCKET * size] for i in range(0, len(order), _BUCKET * size)]
    in_order = [group[np.argsort(lengths[group], kind="stable")] for group in groups]
    batches = [group[i : i + size] for group in in_order for i in range(0, len(group), size)]
    whole = [batch for batch in batches if len(batch) == size] or batches
    return [whole[i] for i in rng.permutation(len(whole))]


def train(
    material: Material, config: StudyConfig, arm: str, settings: Mapping[str, Any], drawn: Draw, anchor_pairs: int = 0
) -> WeightLog:
    """Train the policy from its first weights; `material.model` is the trained one afterwards.

    Args:
        material: the policy and the pairs.
        config: epochs, batch size, schedule.
        arm: name of the arm.
        settings: the learning rate, and settings of the objective.
        drawn: pairs, flips and order.
        anchor_pairs: pairs that share an anchor; 0 for the whole batch. A batch is then several micro-batches.
    """
    material.reset()
    model = material.model
    objective, step = _step(arm, settings)
    tokens = [
        flipped(material.tokens["pool"][row]) if swap else material.tokens["pool"][row]
        for row, swap in zip(drawn.rows, drawn.is_flipped, strict=True)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    log = WeightLog(drawn.is_flipped)
    total = len(drawn.order)
    torch.manual_seed(drawn.seed)  # of the gaussian direction: intervals over seeds are to hold its chance too
    for number, index in enumerate(drawn.order):
        parts = np.array_split(index, len(index) // anchor_pairs) if anchor_pairs else [index]
        optimizer.zero_grad(set_to_none=True)
        for batch in material.batches(tokens, len(index), parts):
            result, grads = step(model, batch)
            share = len(batch["index"]) / len(index)
            for name, p in model.named_parameters():
                p.grad = grads[name] * share if p.grad is None else p.grad.add_(grads[name], alpha=share)
            # How hard the objective pulls at what it compares: at a margin per token, or at a log-ratio of sums.
            weights = result.weights if objective.average else result.weights / batch["rejected_lengths"]
            gaps = None if result.anchor_gaps is None else result.anchor_gaps.numpy()
            log.add(number / total, batch["index"], result.margins.numpy(), weights.numpy(), gaps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * _schedule(number, total, config.warmup_ratio)
        optimizer.step()
    return log


def _step(arm: str, settings: Mapping[str, Any]) -> tuple[Objective, Callable[..., Any]]:
    """The objective of an arm and its training step."""
    objective = OBJECTIVES[ARMS[arm].objective]
    config, own = ARMS[arm].divided(settings)
    return objective, gapo.value_and_grad(pair_logps, config, objective, backend="torch", objective_settings=own)


def _schedule(step: int, total: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine to 0."""
    warmup = warmup_ratio * total
    if step + 1 < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def evaluate(material: Material, tokens: list[dict[str, Any]]) -> dict[str, float]:
    """Reward accuracy, mean margin and mean log-probabilities of `tokens` under the model now, nats per token.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    logps = material.logps(tokens)
    if not np.isfinite(logps).all():
        raise FloatingPointError("log-probabilities after the training are not finite")
    return rewards(logps)


def rewards(logps: np.ndarray) -> dict[str, float]:
    """The same from (n, 2) log-probabilities per token."""
    chosen, rejected = logps.T
    return {
        "accuracy": float((chosen > rejected).mean()),
        "margin": float((chosen - rejected).mean()),
        "chosen_logp": float(chosen.mean()),
        "rejected_logp": float(rejected.mean()),
    }


def before(material: Material, part: str) -> dict[str, float]:
    """`evaluate` of the policy before any training, from its cached log-probabilities."""
    return rewards(material.start[part])


def measure(material: Material, config: StudyConfig, cell: Cell) -> dict[str, Any]:
    """Run one cell: its record, or {"failed": why} where log-probabilities stop being finite."""
    try:
        return _value(material, config, cell) if cell.valuation else _measure(material, config, cell)
    except FloatingPointError as error:
        return {"failed": str(error)}


def _measure(material: Material, config: StudyConfig, cell: Cell) -> dict[str, Any]:
    drawn = draw(material, config, cell.mode, cell.rate, cell.seed)
    began = time.process_time()  # of one thread: what else runs on the machine hardly counts
    log = train(material, config, cell.arm, dict(cell.settings), drawn, cell.anchor_pairs)
    record = {
        "steps": len(drawn.order),
        "flipped": int(drawn.is_flipped.sum()),
        "cpu_seconds": round(time.process_time() - began, 3),
        "evaluation": evaluate(material, material.tokens[cell.judged_on]),
        **log.summary(),
    }
    if cell.judged_on == "test":
        truth = [material.tokens["pool"][i] for i in drawn.rows[:_TRUE_LABELS]]
        record["train_true"] = evaluate(material, truth)
    return record


def _value(material: Material, config: StudyConfig, cell: Cell) -> dict[str, Any]:
    """Data valuation: SimPO on the pairs with the lowest, the highest and random anchor gaps of this cell's run."""
    drawn = draw(material, config, cell.mode, cell.rate, cell.seed)
    gaps = train(material, config, cell.arm, dict(cell.settings), drawn).last("gap")
    seen = np.flatnonzero(np.isfinite(gaps))
    ranked = seen[np.argsort(gaps[seen], kind="stable")]
    count = round(config.valuation_share * len(ranked))
    shuffled = np.random.default_rng([cell.seed, 2]).permutation(seen)
    parts = {"lowest": ranked[:count], "random": shuffled[:count], "highest": ranked[-count:]}
    record: dict[str, Any] = {"pairs": count}
    for name, rows in parts.items():
        rng = np.random.default_rng([cell.seed, 3])
        lengths = np.array([length(material.tokens["pool"][i]) for i in drawn.rows[rows]])
        order = [rows[batch] for _ in range(config.epochs) for batch in bucketed(lengths, config.batch_size, rng)]
        train(material, config, "simpo", dict(cell.valuation), replace(drawn, order=order))
        record[name] = {
            **evaluate(material, material.tokens[cell.judged_on]),
            "flipped_share": float(drawn.is_flipped[rows].mean()),
        }
    return record
