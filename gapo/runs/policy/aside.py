"""What else a run is measured by: other pairs, plain text, the distance from the policy at the start.

Robustness that is bought with a broken policy is none. So a run reports accuracy on pairs of another kind, perplexity
of plain text, and the divergence from the policy before training.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from gapo.data.tokenize import IGNORE_INDEX
from gapo.runs.policy.frozen import resumed
from gapo.runs.policy.pair_batches import Row
from gapo.runs.policy.policy import Policy

SEQUENCE = 128  # tokens of a piece of plain text
_AT_ONCE = 16


def perplexity(policy: Policy, pieces: list[Row]) -> float:
    """exp of the mean negative log-probability of the tokens of `pieces` but the first of each, under the model now."""
    losses = []
    with torch.no_grad():
        for start in range(0, len(pieces), _AT_ONCE):
            part = pieces[start : start + _AT_ONCE]
            ids = torch.tensor([piece["ids"] for piece in part])
            states = torch.from_numpy(np.stack([piece["states"] for piece in part])) if "states" in part[0] else None
            with resumed(policy.model, states):
                logits = policy.model(input_ids=ids, use_cache=False).logits
            of_each = zip(logits, ids, strict=True)
            losses += [float(torch.nn.functional.cross_entropy(x[:-1], y[1:])) for x, y in of_each]
    return math.exp(float(np.mean(losses)))


def drift(policy: Policy, tokens: list[Row]) -> float:
    """KL(model now | model at the start), mean over the tokens of both answers of `tokens`, nats per token."""
    total = count = 0.0
    with torch.no_grad():
        for batch in policy.batches(tokens, _AT_ONCE):
            now = _answer_predictions(policy, batch)
            with policy.at_start():
                start = _answer_predictions(policy, batch)
            total += float(torch.nn.functional.kl_div(start, now, reduction="sum", log_target=True))
            count += len(now)
    return total / count


def _answer_predictions(policy: Policy, batch: dict[str, Any]) -> torch.Tensor:
    """(tokens, vocab): the log-probabilities of every token in the places of the answers'."""
    with resumed(policy.model, batch.get("states")):
        logits = policy.model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=batch["columns"]).logits
    return logits[:, :-1][batch["labels"][:, 1:] != IGNORE_INDEX].log_softmax(-1)
