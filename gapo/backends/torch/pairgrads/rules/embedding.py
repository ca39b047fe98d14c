"""Tables that are looked up by ids: `nn.Embedding`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gapo.backends.torch.pairgrads.parts import Lookup, Parts
from gapo.backends.torch.pairgrads.rules.registry import owns, register_rule


def embedding(module: Any, a: Tensor, g: Tensor) -> Parts:
    """`y = W[ids]`; the entry for padding gets no gradient."""
    if module.padding_idx is not None:
        g = g * (a != module.padding_idx)[..., None]
    yield "weight", Lookup(a, g, module.weight.shape)


def is_plain(layer: Any) -> bool:
    """Whether an embedding gives its table's rows as they are, and each use of a row the same gradient."""
    return owns(layer) == {"weight"} and not (layer.max_norm or layer.scale_grad_by_freq or layer.sparse)


register_rule(nn.Embedding, embedding, fits=is_plain)
