"""From what the policies said to one probability for each pair, and to the figures of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gapo.data.streams import stream
from gapo.runs.audit.folds import divided
from gapo.runs.audit.judging import Member
from gapo.runs.audit.noise_model import NoiseModel, fit, unit_size
from gapo.runs.output.noise import FIFTHS, auroc
from gapo.runs.output.tensors import Arrays

Row = dict[str, Any]
_PARTS = 5  # of the pairs, for the accuracy of the combination on pairs that it was not fitted to


@dataclass(frozen=True)
class Scores:
    """What the policies said of n pairs; none of them trained on a pair's prompt. Nats per token.

    Attributes:
        margins: (seeds, n) log-probability of the chosen answer minus that of the rejected one.
        gaps: (seeds, n) how far it falls towards the anchor of training pairs.
        start: (n,) the margin before any training.
    """

    margins: np.ndarray
    gaps: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, parts: Mapping[Member, Arrays], start: np.ndarray) -> Scores:
        """From the policies' measurements, and `start` (n, 2), the log-probabilities before any training."""
        seeds = 1 + max(member.seed for member in parts)
        margins, gaps = np.full((2, seeds, len(start)), np.nan)
        for member, arrays in parts.items():
            here, moved = (arrays[name][:, 0] - arrays[name][:, 1] for name in ("logps", "anchor_logps"))
            margins[member.seed, arrays["rows"]] = here
            gaps[member.seed, arrays["rows"]] = here - moved
        return cls(margins, gaps, start[:, 0] - start[:, 1])

    def features(self) -> np.ndarray:
        """(n, 3) scores of unit size that change sign with the label: margin, start margin, gap.

        A policy's margins count in units of their own size, so that one which went further does not outvote the others.
        """
        margin, gap = (unit_size(values.T).mean(1) for values in (self.margins, self.gaps))
        return unit_size(np.stack([margin, self.start, gap], 1))


@dataclass(frozen=True)
class Finding:
    """What the scores say.

    Attributes:
        p_wrong: (n,) probability that each label is wrong.
        accuracy: share of the labels that the combination predicts on pairs that neither it nor a policy was fitted
            to, and `low` and `high` of its 95 % interval over the prompts.
        model: the noise model.
    """

    p_wrong: np.ndarray
    accuracy: float
    low: float
    high: float
    model: NoiseModel

    @property
    def learned(self) -> bool:
        """Whether labels are predicted better than by chance. If not, `p_wrong` and the share mean nothing."""
        return self.low > 0.5


def combine(x: np.ndarray, groups: np.ndarray, seed: int) -> Finding:
    """The finding from features x (n, features); groups (n,) are the pairs' prompts.

    Raises:
        ConfigError: the pairs have fewer than two prompts.
    """
    parts = divided(groups, min(_PARTS, int(groups.max()) + 1), stream(seed, "audit combination"))
    odds = np.empty(len(x))
    for part in np.unique(parts):
        odds[parts == part] = fit(x[parts != part]).log_odds(x[parts == part])
    hits = (odds > 0) + 0.5 * (odds == 0)
    accuracy = float(hits.mean())
    error = float(np.sqrt(np.sum(np.bincount(groups, hits - accuracy) ** 2))) / len(x)
    model = fit(x, groups)
    return Finding(model.p_wrong(x), accuracy, accuracy - 1.96 * error, accuracy + 1.96 * error, model)


def detection(scores: Scores, p_wrong: np.ndarray, is_flipped: np.ndarray) -> Row:
    """How well the scores find labels that are known to be flipped: areas under the ROC curve, and shares of flips.

    "precision" is the share of flipped pairs among the most suspicious: a fifth of all pairs, and as many as are
    flipped. Empty where no pair, or every pair, is flipped.
    """
    if is_flipped.all() or not is_flipped.any():
        return {}
    margin, gap = scores.margins.mean(0), scores.gaps.mean(0)
    suspicions = {
        "p_wrong": p_wrong, "margin": -margin, "gap": -gap, "start margin": -scores.start,
        "margin gained": scores.start - margin,
    }  # fmt: skip
    order = np.argsort(-p_wrong, kind="stable")
    flipped = int(is_flipped.sum())
    return {
        "auroc": {name: round(auroc(values, is_flipped), 4) for name, values in suspicions.items()},
        "precision": {
            "fifth": float(is_flipped[order[: max(1, len(order) // FIFTHS)]].mean()),
            "as_many": float(is_flipped[order[:flipped]].mean()),
        },
        "flipped_share": float(is_flipped.mean()),
    }


def fifths_of_weight(weight: np.ndarray, p_wrong: np.ndarray) -> list[float]:
    """Expected share of wrong labels in each fifth of the weights, the lowest first."""
    order = np.argsort(weight, kind="stable")
    return [float(p_wrong[part].mean()) for part in np.array_split(order, FIFTHS) if len(part)]
