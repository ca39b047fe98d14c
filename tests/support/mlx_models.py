"""Tiny models of mlx-lm with random weights, and a batch of pairs for them."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

VOCAB = 40
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
}
_OWN: dict[str, dict[str, Any]] = {
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 1.0},
    "llama4_text": {"intermediate_size_mlp": 24, "no_rope_layers": [1], "use_qk_norm": False},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "mamba": {
        "state_size": 4,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 2,
    },
}


def make(kind: str, tied: bool = False, **sizes: Any) -> Any:
    """A model of `mlx_lm.models.kind`, in training mode."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {**_SIZES, **_OWN.get(kind, {}), "model_type": kind, "tie_word_embeddings": tied, **sizes}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config)).train()
    model.update(tree_map(lambda x: x + 0.1 * mx.random.normal(x.shape), model.parameters()))  # some begin at zero
    mx.eval(model.parameters())
    return model


def batch(pairs: int = 2, seq: int = 6) -> tuple[mx.array, mx.array]:
    """(ids, labels), each (2 * pairs, seq), without padding."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (2 * pairs, seq))
    labels = ids.copy()
    labels[:, :3] = -100
    return mx.array(ids), mx.array(labels)
