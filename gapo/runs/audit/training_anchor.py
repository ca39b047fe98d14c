"""An anchor that training pairs form, at which pairs that have no share in it are measured.

In a training step a pair helps to make the direction along which its own gap is measured. Here the direction is that of
other pairs. So the gap is odd, as the margin is: it changes its sign when the pair's answers are swapped, and nothing
else. That holds for the exact gap too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from gapo.anchor import probe_pull
from gapo.backends import get_backend
from gapo.backends.base import AnchorForward, margins_of, on_outputs
from gapo.config import GAPOConfig
from gapo.perturbation import Perturbation
from gapo.runs.policy.pair_batches import Row, pair_logps
from gapo.runs.policy.policy import Policy
from gapo.selection import select

_AT_ONCE = 16


@contextmanager
def training_anchor(policy: Policy, tokens: Sequence[Row], config: GAPOConfig) -> Iterator[None]:
    """The policy at the anchor of these pairs for the length of the block; then its weights as before, bit for bit.

    Args:
        policy: its trainable weights are moved, but for the output head.
        tokens: the tokenised pairs that form the anchor: their probe gradient, averaged over all of them.
        config: radius, probe and geometry.

    Raises:
        FloatingPointError: the gradient is not finite.
    """
    backend = get_backend("torch", one_pass=False)
    total: dict[str, Tensor] = {}
    for batch in policy.batches(tokens, _AT_ONCE):
        forward = cast(AnchorForward, backend.forward(pair_logps, policy.model, batch, config))
        names = select(forward.parameters, forward.head, config)
        pull, factor = probe_pull(margins_of(forward.outputs).detach(), config.gamma, config, backend)
        share = float(factor) * len(batch["index"]) / len(tokens)
        for name, x in forward.pullback(on_outputs(-pull, forward.outputs, backend.xp), names).items():
            total[name] = share * x if name not in total else total[name].add_(x, alpha=share)
    perturbation = Perturbation(forward, total, config, backend)
    if not bool(torch.isfinite(perturbation.scaled_norm)):
        raise FloatingPointError("the probe gradient of the training pairs is not finite")
    moved = {name: p for name, p in policy.model.named_parameters() if name in total}
    before = {name: p.detach().clone() for name, p in moved.items()}
    try:
        with torch.no_grad():
            for name, p in moved.items():
                p.copy_(perturbation.move(name, before[name]))
        yield
    finally:
        with torch.no_grad():
            for name, p in moved.items():
                p.copy_(before[name])
