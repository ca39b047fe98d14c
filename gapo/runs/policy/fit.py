"""The training of a policy over batches in a fixed order.

Schedule and order are these commands' own, not those of `gapo train`: the published numbers of a study depend on both,
bit for bit for a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gapo.runs.policy.pair_batches import Batch, Row
from gapo.runs.policy.policy import Policy

_BUCKET = 8  # batches that are sorted by length together: little padding, and still random batches


def bucketed(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches in random order, each of pairs of about equal length; the last, incomplete one is left out."""
    order = rng.permutation(len(lengths))
    groups = [order[i : i + _BUCKET * size] for i in range(0, len(order), _BUCKET * size)]
    in_order = [group[np.argsort(lengths[group], kind="stable")] for group in groups]
    batches = [group[i : i + size] for group in in_order for i in range(0, len(group), size)]
    whole = [batch for batch in batches if len(batch) == size] or batches
    return [whole[i] for i in rng.permutation(len(whole))]


def fit(
    policy: Policy,
    tokens: Sequence[Row],
    order: Sequence[np.ndarray],
    step: Callable[..., Any],
    *,
    learning_rate: float,
    warmup_ratio: float = 0.1,
    anchor_pairs: int = 0,
    seed: int = 0,
    on_batch: Callable[[float, Batch, Any], None] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train `policy` from its first weights with AdamW, a cosine schedule, and gradients clipped at 1.

    Args:
        policy: its model is the trained one afterwards.
        tokens: tokenised pairs.
        order: for each step the indices among them.
        step: of `gapo.value_and_grad` over `pair_logps` of this room, (model, batch, running=) to (result, grads).
        learning_rate: the peak.
        warmup_ratio: share of the steps in which the learning rate rises.
        anchor_pairs: pairs that share an anchor; 0 for the whole batch. A batch is then several micro-batches.
        seed: of the gaussian directions.
        on_batch: called with the share of the run, the batch and its result, before the weights move.
        after_step: called with the number of the step, from 1, after the weights have moved.
    """
    policy.reset()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0, fused=True)
    total = len(order)
    running = None  # statistics that an objective such as RE-PO keeps from batch to batch
    torch.manual_seed(seed)  # of the gaussian direction: intervals over seeds are to hold its chance too
    for number, index in enumerate(order):
        parts = np.array_split(index, len(index) // anchor_pairs) if anchor_pairs else [index]
        optimizer.zero_grad(set_to_none=True)
        for batch in policy.batches(tokens, len(index), parts):
            result, grads = step(policy.model, batch, running=running)
            running = result.running
            share = len(batch["index"]) / len(index)
            for name, p in trained.items():
                p.grad = grads[name] * share if p.grad is None else p.grad.add_(grads[name], alpha=share)
            if on_batch is not None:
                on_batch(number / total, batch, result)
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(number, total, warmup_ratio)
        optimizer.step()
        if after_step is not None:
            after_step(number + 1)


def _schedule(step: int, total: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate: a linear rise, then a cosine to 0."""
    warmup = warmup_ratio * total
    if step + 1 < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
