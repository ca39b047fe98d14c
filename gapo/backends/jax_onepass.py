"""The one pass on JAX: which rows of a batch make a pair, and what is said where pairs cannot be told apart."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

from gapo.backends.base import margins_of
from gapo.backends.jaxrows.group_gradients import GroupGradients
from gapo.backends.jaxrows.labels import Mixes

logger = logging.getLogger(__name__)


class PairGradients(NamedTuple):
    """The gradients of the margins M_i, or of both log-probabilities of each pair.

    Attributes:
        groups: the gradients.
        sides: 2 where the log-probabilities are groups of their own, chosen ones first; 1 where a margin is a group.
    """

    groups: GroupGradients
    sides: int

    def weighted(self, cotangents: Sequence[Array]) -> list[Array]:
        """Gradients of `sum_j <cotangents[j], outputs[j]>`. With one side, cotangents must be (w,) or (w, -w)."""
        return self.groups.weighted(jnp.concatenate(cotangents[: self.sides]))

    def along(self, direction: Sequence[Array]) -> Array:
        """Derivative of each margin along `direction`, (N,)."""
        along = self.groups.along(direction)
        return margins_of(tuple(along.reshape(self.sides, -1)))


def gradients_by_pair(pullback: ClosedJaxpr, outputs: Sequence[Array], by_side: bool) -> PairGradients | None:
    """The gradients of each pair by one evaluation of `pullback`; None, with one log line, where pairs mix.

    Args:
        pullback: from the cotangents of `outputs` to the gradients.
        outputs: (margins,), or (chosen_logps, rejected_logps), each (N,).
        by_side: whether cotangents other than (w, -w) will be asked for.
    """
    n = outputs[0].shape[0]
    sides = len(outputs) if by_side else 1
    signs = (1, 1) if sides == 2 else (1, -1)
    seeds = [jnp.full_like(output, sign) for output, sign in zip(outputs, signs, strict=False)]
    labels = [np.arange(n) + n * (side % sides) for side in range(len(outputs))]
    try:
        return PairGradients(GroupGradients(pullback, seeds, labels), sides)
    except Mixes as why:
        _tell(str(why))
        return None


@cache
def _tell(why: str) -> None:
    logger.warning(
        "the one-pass step does not apply to this function (%s): the slower step is used, which propagates twice", why
    )
