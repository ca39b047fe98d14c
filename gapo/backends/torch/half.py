"""Whether a forward computed with less than float32's precision, read off the autograd graph that it left.

The graph tells what was done, wherever it was asked for: autocast around the model or within its `forward` (as
accelerate puts it), casts in a layer, FSDP2's mixed precision, quantised layers, compiled modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.torch.pairgrads.agreement import coarse_products
from gapo.backends.torch.pairgrads.graph import walk


def rounds(outputs: Iterable[Tensor]) -> bool:
    """Whether anything between the parameters and `outputs` was computed in fewer than 32 bits, or by TF32 products.

    A forward in float32 is walked through whole, about 3 microseconds for each operation; else up to the first find.
    Not seen: what a custom autograd function does inside, if it neither returns nor saves 16-bit tensors.
    """
    outputs = list(outputs)
    if coarse_products(outputs[0].device.type) and any(output.dtype == torch.float32 for output in outputs):
        return True
    return any(
        any(_is_half(output.dtype) for output in node._input_metadata) or _saves_half(node) for node in walk(outputs)
    )


def quantises(module: nn.Module) -> bool:
    """Whether layers of LLM.int8 round their inputs to 8 bits, as bitsandbytes does on accelerators."""
    return any(p.dtype == torch.int8 and p.device.type != "cpu" for p in module.parameters())


def _saves_half(node: Any) -> bool:
    """Of a function in Python (custom, or torch.compile's), which may compute in another dtype than it returns."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    try:  # as saved: to unpack is to recompute where a layer is checkpointed
        saved = [x.data for x in node._raw_saved_tensors]
    except RuntimeError:  # freed by a backward
        return False
    return any(isinstance(x, Tensor) and _is_half(x.dtype) for x in saved)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4
