"""What a language model's forward takes and gives, asked of the model inside its wrappers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Layers in which a token sees others by attention alone, and so none of the padding.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")


def innermost(model: Any) -> Any:
    """The model inside DDP, torch.compile and PEFT."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def forward_parameters(model: Any) -> set[str]:
    """Names that the forward of the innermost model accepts, and "task_ids" where its adapters take them."""
    names = set(inspect.signature(innermost(model).forward).parameters)
    peft = _peft(model)
    return names | {"task_ids"} if peft is not None and _type(peft) in ("MULTITASK_PROMPT_TUNING", "POLY") else names


def has_virtual_tokens(model: Any) -> bool:
    """Whether peft puts a learned prompt before each row: as tokens, which get logits of their own, or as a cache."""
    peft = _peft(model)
    return peft is not None and bool(peft.active_peft_config.is_prompt_learning)


def virtual_tokens(model: Any) -> int:
    """How many positions peft's learned prompt takes."""
    peft = _peft(model)
    return int(peft.active_peft_config.num_virtual_tokens) if peft is not None and has_virtual_tokens(model) else 0


def prefix_is_cached(model: Any) -> bool:
    """Whether the learned prompt is handed to the model as a cache of keys and values."""
    peft = _peft(model)
    return peft is not None and _type(peft) in ("PREFIX_TUNING", "CARTRIDGE")


def padding_may_stand_left(model: Any) -> bool:
    """Whether rows padded on the left give what they give without padding, if told their positions.

    Attention passes over padding wherever it stands. Recurrent layers and convolutions run through it, positions that
    a model counts by itself begin at it, and a learned prompt is parted from its row by it. True for what is known to
    be attention alone; rows of other models are padded on the right, where nothing that counts comes after.
    """
    inner = innermost(model)
    kind = next(c for c in type(inner).__mro__ if not c.__module__.startswith("torch.distributed."))  # FSDP2's own
    if not isinstance(inner, PreTrainedModel) or not kind.__module__.startswith("transformers."):
        return False
    if has_virtual_tokens(model) or "position_ids" not in forward_parameters(model):
        return False
    layers = getattr(text_config(model), "layer_types", None) or ()
    return set(layers) <= _ATTENTION and not any(
        getattr(module, "_is_stateful", False) or isinstance(module, nn.Conv1d) for module in inner.modules()
    )


def text_config(model: Any) -> Any:
    """The config of the language model, which one that sees keeps among others; None without one."""
    config: Any = getattr(innermost(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary(model: Any) -> int | None:
    """Tokens that the model's embedding knows; None if it does not say."""
    inner = innermost(model)
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    return getattr(embedding, "num_embeddings", None)


def placeholders(model: Any) -> list[int]:
    """Token ids in whose place the model puts what it sees or hears."""
    config = getattr(innermost(model), "config", None)
    found = [getattr(config, name, None) for name in _PLACEHOLDERS]
    return sorted({token for token in found if isinstance(token, int) and token >= 0})


def most_positions(model: Any) -> int | None:
    """Most tokens of a row, as the model's config has it; None if it does not say."""
    config = text_config(model)
    limit = next((n for name in _POSITIONS if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    return None if limit is None else limit - virtual_tokens(model)


def learned_positions(model: Any) -> bool:
    """Whether the model learned an embedding for each position, as GPT-2 does: it has none for a longer row."""
    inner, limit = innermost(model), most_positions(model)
    if limit is None or not hasattr(inner, "get_input_embeddings"):
        return False
    rows, tokens = limit + virtual_tokens(model), inner.get_input_embeddings()
    tables = [m for m in inner.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return any(rows <= table.num_embeddings <= rows + 8 for table in tables)  # some begin at an offset (OPT: 2)


def _peft(model: Any) -> Any:
    """The `PeftModel` in the wrappers of `model`; None without one."""
    while isinstance(model, nn.Module):
        if hasattr(model, "active_peft_config"):
            return model
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    return None


def _type(peft: Any) -> str:
    kind = peft.active_peft_config.peft_type
    return str(getattr(kind, "value", kind))
