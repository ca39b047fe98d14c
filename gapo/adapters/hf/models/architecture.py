"""What a language model's forward takes and returns, asked of the model inside its wrappers.

The output head is asked for in `gapo.backends.torch.head`, since the step needs it of every `nn.Module`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gapo.adapters.hf.models.peft_models import has_virtual_tokens, takes_task_ids, virtual_tokens

# Layers in which a token sees other tokens through attention alone, and therefore no padding.
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
    return names | {"task_ids"} if takes_task_ids(model) else names


def require_decoder(model: nn.Module) -> None:
    """Raise ValueError for an encoder-decoder, whose decoder reads another row than its encoder."""
    inner = innermost(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(inner).__name__} is an encoder-decoder: GAPO needs a causal (decoder-only) language model, which "
            "AutoModelForCausalLM loads"
        )


def padding_may_stand_left(model: Any) -> bool:
    """Whether a row with padding on its left gets the logits that it gets without padding, given its positions.

    True for transformers' models that are known to mix tokens by attention alone, which passes over padding anywhere.
    All other rows are padded on the right, where nothing that counts comes after the padding. On the left, recurrent
    layers and convolutions read the padding, models that count positions themselves start counting at it, and it stands
    between a learned prompt and its row.
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
    """The config of the language model, which a multimodal model keeps among others; None without one."""
    config: Any = getattr(innermost(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary(model: Any) -> int | None:
    """Number of rows of the model's token embedding; None if the model does not say."""
    inner = innermost(model)
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    return getattr(embedding, "num_embeddings", None)


def placeholders(model: Any) -> list[int]:
    """Ids of the tokens that the model replaces by what it sees or hears."""
    config = getattr(innermost(model), "config", None)
    tokens = [getattr(config, name, None) for name in _PLACEHOLDERS]
    return sorted({token for token in tokens if isinstance(token, int) and token >= 0})


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that close a response, by the model's generation settings and the tokenizer."""
    tokens: set[int] = set()
    for ids in (model.generation_config.eos_token_id, getattr(tokenizer, "eos_token_id", None)):
        tokens |= {*ids} if isinstance(ids, list) else set() if ids is None else {ids}
    return sorted(tokens)


def most_positions(model: Any) -> int | None:
    """Most tokens of a row, by the model's config; None if the config does not say."""
    config = text_config(model)
    limit = next((n for name in _POSITIONS if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    return None if limit is None else limit - virtual_tokens(model)


def learned_positions(model: Any) -> bool:
    """Whether the model learned an embedding for each position, as GPT-2 does, and has none for a longer row."""
    inner, limit = innermost(model), most_positions(model)
    if limit is None or not hasattr(inner, "get_input_embeddings"):
        return False
    rows, tokens = limit + virtual_tokens(model), inner.get_input_embeddings()
    tables = [m for m in inner.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return any(rows <= table.num_embeddings <= rows + 8 for table in tables)  # some begin at an offset (OPT: 2)
