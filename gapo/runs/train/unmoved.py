"""Whether a training moved anything: held-out margins and accuracy, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gapo.config import GAPOConfig
from gapo.runs.train.train_config import TrainConfig

_ACCURACY = 0.02  # two points
_SHARE = 0.05  # of the spread of the margins


def unmoved(
    before: Mapping[str, float],
    after: Mapping[str, float],
    steps: Sequence[Mapping[str, Any]],
    config: TrainConfig,
    step_config: GAPOConfig,
) -> str | None:
    """One line for a run whose held-out accuracy and margins hardly moved, with what to try; None for any other.

    The mean margin's change is held against the spread of the margins over pairs: their standard deviation in the
    steps, nats per token.

    Args:
        before: evaluation before the first step.
        after: evaluation after the last one.
        steps: lines of steps.jsonl.
        config: of the run.
        step_config: its `beta` turns rewards into nats per token.
    """
    accuracies, margins = ([of[f"eval_rewards/{name}"] for of in (before, after)] for name in ("accuracies", "margins"))
    spread = float(np.std(np.concatenate([row["margins"] for row in steps]))) if steps else 0.0
    change = abs(margins[1] - margins[0]) / step_config.beta
    if not all(map(math.isfinite, [*accuracies, *margins, spread])) or spread == 0:
        return None
    if abs(accuracies[1] - accuracies[0]) >= _ACCURACY or change >= _SHARE * spread:
        return None
    advice = f"a higher learning_rate ({10 * config.learning_rate:g}), more steps"
    if step_config.moves and step_config.target_gap is None and any("anchor_gaps" in row for row in steps):
        advice += ", target_gap in place of rho"
    return (
        f"nothing was learnt: held-out accuracy {accuracies[0]:.3f} -> {accuracies[1]:.3f}, and the mean margin moved "
        f"by {change:.2g} nats per token, {change / spread:.1%} of the spread of margins. Try {advice}"
    )
