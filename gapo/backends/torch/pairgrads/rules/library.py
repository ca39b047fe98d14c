"""What rules of other libraries' layers ask: where the class comes from, and whether it gives what it should."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gapo.backends.torch.pairgrads.agreement import coarse_arithmetic


def from_transformers(layer: Any) -> bool:
    """Whether `layer` is of a class of transformers' models whose forward nobody replaced."""
    kind = type(layer)
    return kind.__module__.startswith("transformers.models.") and kind.forward.__module__ == kind.__module__


def agrees(expected: Tensor, output: Tensor, scale: Tensor) -> bool:
    """Whether `output` is what a rule's formula gives, up to the rounding of the sums that it is made of."""
    share = 3e-2 if coarse_arithmetic((output,), output.device.type) else 1e-4
    error = (expected.to(output.dtype) - output).norm()
    return bool((error <= share * scale).logical_and(scale.isfinite()))
