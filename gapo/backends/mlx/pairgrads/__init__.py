"""The gradient of every output by every parameter of an MLX module, from one backward.

A batch has rows, and row r belongs to group r mod N. `Recorder(module, parameters).run(...)` runs the module once and
propagates once, and gives the gradients of each group for any weighted sum and any inner product. PyTorch's engine of
the same name has a page on the idea.

What a rule says, and that rows do not mix, is for the caller to prove: `stand_ins` puts float32 arrays of the same
shapes into the module, on which any two ways to its gradients can be compared, `disagreement` says where they differ.
"""

from gapo.backends.mlx.pairgrads.standins import disagreement, stand_in_batch, stand_ins
from gapo.backends.mlx.pairgrads.taps import GroupGradients, Recorder, Refused

__all__ = ["GroupGradients", "Recorder", "Refused", "disagreement", "stand_in_batch", "stand_ins"]
