"""Log-softmax at the target tokens, in chunks: no second float32 copy of (batch, seq, vocab) logits is ever held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gapo.logps import KERNELS

# Numbers in a chunk: few enough for a CPU's cache, many enough to fill a GPU.
_CHUNK = {"cpu": 2**18, "cuda": 2**26}


class _TokenLogps(torch.autograd.Function):
    """(batch, seq) from logits (batch, seq, vocab) and targets (batch, seq); computed in float32 or wider."""

    rows_first = True  # what it returns has the rows of the batch, where `pairgrads` asks whose they are

    @staticmethod
    def forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        normalizer = torch.empty(targets.shape, dtype=wide, device=logits.device)
        for chunk in chunks(logits):
            normalizer[chunk] = torch.logsumexp(logits[chunk].to(wide), -1)
        picked = logits.gather(-1, targets[..., None])[..., 0].to(wide)
        return picked - normalizer, normalizer

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        logits, targets, normalizer = ctx.saved_tensors
        out = torch.empty_like(logits)
        for chunk in chunks(logits):  # (one-hot - softmax) times the gradient
            part = (logits[chunk].to(normalizer.dtype) - normalizer[chunk][..., None]).exp_()
            part.mul_(-grad[chunk][..., None])
            part.scatter_add_(-1, targets[chunk][..., None], grad[chunk][..., None])
            out[chunk] = part
        return out, None


def chunks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Indices of the parts of `logits` (batch, seq, vocab) that are small enough to be held in float32."""
    batch, seq, vocab = logits.shape
    tokens = max(1, _CHUNK.get(logits.device.type, _CHUNK["cuda"]) // vocab)
    for row in range(batch):
        for start in range(0, seq, tokens):
            yield row, slice(start, start + tokens)


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """(batch, seq): log-softmax of `logits` (batch, seq, vocab) at `targets` (batch, seq), float32 or wider."""
    logps: Tensor = _TokenLogps.apply(logits, targets)[0]
    return logps


KERNELS["torch"] = token_logps
