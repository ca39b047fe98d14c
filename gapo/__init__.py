"""GAPO: Geometric Anchor Preference Optimization (arXiv 2602.04909), on any array library.

`loss`, `anchor_gap`, `weights` and `sequence_logps` take Array-API arrays. `value_and_grad` is the whole training step
over a backend (PyTorch, JAX, MLX, NumPy), which is imported when it is first used.
"""

from gapo.auditing import audit
from gapo.config import GAPOConfig
from gapo.logps import sequence_logps
from gapo.objective import anchor_gap, loss, weights
from gapo.step import StepResult, value_and_grad

__version__ = "0.2.0"

__all__ = ["GAPOConfig", "StepResult", "anchor_gap", "audit", "loss", "sequence_logps", "value_and_grad", "weights"]
