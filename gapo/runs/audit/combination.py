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
    """What the policies said of n pairs; none of them trained on a pair's prompt.

    Attributes:
        margins: (seeds, epochs, n) log-probability of the chosen answer minus that of the rejected one, nats per token.
        rewards: (seeds, epochs, n) how far the training has raised the chosen answer's log-probability over the
            rejected one's, nats: DPO's implicit reward, over beta.
        gaps: (seeds, n) how far the last margin falls towards the anchor of training pairs, nats per token.
        start: (n,) the margin before any training.
        counts: (n, 2) tokens of the chosen and of the rejected answer.
    """

    margins: np.ndarray
    rewards: np.ndarray
    gaps: np.ndarray
    start: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, parts: Mapping[Member, Arrays], start: np.ndarray, counts: np.ndarray) -> Scores:
        """From the policies' measurements (`Judges.measure`), and (n, 2) log-probabilities and numbers of tokens."""
        seeds = 1 + max(member.seed for member in parts)
        epochs = len(next(iter(parts.values()))["logps"])
        margins, rewards = np.full((2, seeds, epochs, len(start)), np.nan)
        gaps = np.full((seeds, len(start)), np.nan)
        for member, arrays in parts.items():
            rows, logps = arrays["rows"], arrays["logps"]
            margins[member.seed][:, rows] = _difference(logps)
            rewards[member.seed][:, rows] = _difference((logps - start[rows]) * counts[rows])
            gaps[member.seed, rows] = _difference(logps[-1] - arrays["anchor_logps"])
        return cls(margins, rewards, gaps, _difference(start), counts)

    @property
    def margin(self) -> np.ndarray:
        """(n,) the margin, a mean over epochs and seeds, nats per token."""
        return _mean(self.margins)

    def chosen_longer(self) -> dict[str, Any]:
        """Among pairs whose answers differ in length: "share" in which the chosen one has more tokens, and "pairs"."""
        longer = _difference(self.counts)
        differ = longer[longer != 0]
        return {"share": float((differ > 0).mean()) if len(differ) else None, "pairs": len(differ)}

    def features(self) -> np.ndarray:
        """(n, 4) scores of unit size that change sign with the label: margin, reward, margin before training, gap.

        A policy counts in units of its own scores' size, so that one which went further does not outvote the others.
        """
        margin, reward, gap = (_mean(_units(values)) for values in (self.margins, self.rewards, self.gaps))
        return unit_size(np.stack([margin, reward, self.start, gap], 1))


def _difference(sides: np.ndarray) -> np.ndarray:
    """Chosen minus rejected, from (..., 2)."""
    return sides[..., 0] - sides[..., 1]


def _units(values: np.ndarray) -> np.ndarray:
    """(..., n) each row in units of its own size."""
    return unit_size(np.moveaxis(values, -1, 0)).transpose(*range(1, values.ndim), 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """(n,) the mean of (..., n) over all else."""
    mean: np.ndarray = values.reshape(-1, values.shape[-1]).mean(0)
    return mean


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
    suspicions = {
        "p_wrong": p_wrong,
        "margin": -scores.margin,
        "margin at the end": -scores.margins[:, -1].mean(0),
        "reward": -_mean(scores.rewards),
        "gap": scores.gaps.mean(0),
        "margin before training": -scores.start,
    }
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
