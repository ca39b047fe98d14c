"""Whether a forward computed with less than float32's precision, read from the autograd graph behind its outputs.

The graph shows what was computed, whatever caused it: autocast around the model or within its `forward` (where
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

    The walk takes about 3 microseconds for each operation, and ends at the first operation in 16 bits. It cannot see
    what a custom autograd function computes inside, if it neither returns nor saves 16-bit tensors.
    """
    outputs = list(outputs)
    if coarse_products(outputs[0].device.type) and any(output.dtype == torch.float32 for output in outputs):
        return True
    return any(
        any(_is_half(result.dtype) for result in node._input_metadata) or _saves_half(node) for node in walk(outputs)
    )


def quantises(module: nn.Module) -> bool:
    """Whether layers of LLM.int8 round their inputs to 8 bits, as bitsandbytes does on accelerators."""
    return any(p.dtype == torch.int8 and p.device.type != "cpu" for p in module.parameters())


def _saves_half(node: Any) -> bool:
    """Whether a function in Python, custom or torch.compile's, saves 16-bit tensors: it may return another dtype."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    try:  # the raw ones, since to unpack a saved tensor of a checkpointed layer runs the layer again
        saved = [x.data for x in node._raw_saved_tensors]
    except RuntimeError:  # freed by a backward
        return False
    return any(isinstance(x, Tensor) and _is_half(x.dtype) for x in saved)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4
