"""Kullback-Leibler divergence between two policies at each token, over the whole vocabulary, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo.backends.torch.token_logps import chunks


def token_kl(logits: Tensor, others: Tensor) -> Tensor:
    """(tokens,): `sum_v p_v (log p_v - log q_v)`, p and q the softmax of `logits` and `others`, nats.

    Both (tokens, vocab), of any floating dtype, normalised or not; reduced in float32 or wider, a chunk at a time. No
    gradient. Not clipped: where p equals q it is 0 up to rounding.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    kl = torch.empty(len(logits), dtype=wide, device=logits.device)
    with torch.no_grad():
        for _, chunk in chunks(logits[None]):
            p = logits[chunk].to(wide).log_softmax(-1)
            q = others[chunk].to(logits.device, wide).log_softmax(-1)
            share = p.exp()
            kl[chunk] = torch.where(share > 0, share * (p - q), 0).sum(-1)  # 0 log 0 is 0
    return kl
