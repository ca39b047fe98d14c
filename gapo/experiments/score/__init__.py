"""`gapo score`: the margin, the anchor margin, the gap and the weight of each pair, under one model or several."""

from gapo.experiments.score.config import ScoreConfig
from gapo.experiments.score.flow import score

__all__ = ["ScoreConfig", "score"]
