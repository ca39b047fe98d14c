"""Responses of a causal language model: what `generate` needs, for prompts of unequal lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig


def generation_config(
    *, max_new_tokens: int, temperature: float, ends: Sequence[int], top_p: float = 1.0
) -> GenerationConfig:
    """Greedy at temperature 0, else samples from the whole distribution, or its share `top_p`."""
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        **(sampled if temperature else {"do_sample": False}),
    )


def left_padded(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), each (N, seq), of prompts (seq,) that all end in the last column."""
    reversed_ = torch.nn.utils.rnn.pad_sequence([ids.flip(0) for ids in prompts], batch_first=True, padding_value=-1)
    ids = reversed_.flip(1).to(device)
    return ids.clamp(min=0), (ids >= 0).long()
