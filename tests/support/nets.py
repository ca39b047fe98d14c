"""A causal model made of the layers that have rules for gradients of single pairs."""

from __future__ import annotations

from typing import Any

import hf_models
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCAB = hf_models.VOCAB


class OneMoreRMSNorm(nn.RMSNorm):
    """Gemma's: the weight is what is added to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight)


class Net(nn.Module):
    """A causal model of the layers that have rules, arranged as the options say."""

    def __init__(
        self, *, depth: int = 1, width: int = 8, tied: bool = False, bias: bool = True, norm: str = "rms"
    ) -> None:
        super().__init__()
        make_norm = {
            "gemma": OneMoreRMSNorm,
            "rms": nn.RMSNorm,
            "layer": nn.LayerNorm,
            "layer-plain": lambda w: nn.LayerNorm(w, bias=False),
        }[norm]
        self.embed = nn.Embedding(VOCAB, width, padding_idx=0)
        self.norms = nn.ModuleList(make_norm(width) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(width, 3 * width, bias=bias) for _ in range(depth))
        self.downs = nn.ModuleList(Conv1D(width, 3 * width) for _ in range(depth))
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
            x = x + down(torch.tanh(up(norm(x))))
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return Output(self.lm_head(self.hidden(input_ids)))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
