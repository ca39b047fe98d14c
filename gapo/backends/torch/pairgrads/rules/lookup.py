"""Tables that are looked up in a way of their own: scaled word embeddings, and positions counted from a mask.

Gemma and the family of BART multiply what they look up by a constant. OPT and BioGPT are called with the attention
mask, count the positions from it, and look them up behind an offset.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.torch.pairgrads.parts import Parts
from gapo.backends.torch.pairgrads.rules.embedding import embedding, is_plain
from gapo.backends.torch.pairgrads.rules.library import from_transformers
from gapo.backends.torch.pairgrads.rules.registry import Rule, register_family, register_rule


def scaled(layer: Any, ids: Tensor, g: Tensor) -> Parts:
    """`y = scale * W[ids]`; the entry for padding gets no gradient."""
    return embedding(layer, ids, g * _scale(layer))


def _scale(layer: Any) -> Any:
    scale = layer.embed_scale
    return scale.to(layer.weight.dtype) if isinstance(scale, Tensor) else scale


def _is_scaled(layer: Any, ids: Tensor, output: Tensor) -> bool:
    """Whether the layer gave this, and propagates it: asked of a table of two entries, of which the first is padding's
    if one is.
    """
    if not torch.allclose(output, nn.functional.embedding(ids, layer.weight.detach()) * _scale(layer)):
        return False
    twin = copy.copy(layer)
    weight = torch.ones_like(layer.weight[:2], requires_grad=True)
    twin.__dict__ |= {"_parameters": {"weight": weight}, "num_embeddings": 2}
    twin.padding_idx = None if layer.padding_idx is None else 0
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(type(layer).forward(twin, torch.arange(2)[None].to(ids)).sum(), weight)
    expected = torch.ones_like(weight) * _scale(layer)
    if twin.padding_idx == 0:
        expected[0] = 0
    return torch.allclose(gradient, expected)


def _has_scale(layer: Any) -> bool:
    named = type(layer).__name__.endswith("ScaledWordEmbedding") and isinstance(layer, nn.Embedding)
    scale = getattr(layer, "embed_scale", None)
    number = isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.ndim == 0)
    return named and number and from_transformers(layer) and is_plain(layer)


def positions(layer: Any, ids: Tensor, g: Tensor) -> Parts:
    """`y = W[ids]` of the ids that `_positions` counts."""
    return embedding(layer, ids.reshape(g.shape[:-1]), g)


def _positions(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _counted(layer, *args, **kwargs)


def _counted(layer: Any, attention_mask: Any, past_key_values_length: int = 0, position_ids: Any = None) -> Tensor:
    if position_ids is None:
        position_ids = (attention_mask.cumsum(1) * attention_mask - 1).long()[:, past_key_values_length:]
    ids: Tensor = position_ids + layer.offset
    return ids


def _are_positions(layer: Any, ids: Tensor, output: Tensor) -> bool:
    looked = nn.functional.embedding(ids, layer.weight.detach())
    return output.shape == looked.shape and torch.equal(output, looked)


register_family(_has_scale, Rule(scaled, confirms=_is_scaled))
for name in ("opt.modeling_opt.OPT", "biogpt.modeling_biogpt.BioGpt"):
    kind = f"transformers.models.{name}LearnedPositionalEmbedding"
    register_rule(kind, positions, fits=is_plain, reads=_positions, confirms=_are_positions)
