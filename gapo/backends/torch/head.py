"""Which of a module's parameters are the output head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from gapo.selection import HEAD_NAME


def head_parameters(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Names among `names` that belong to the output head, found by what it is: `get_output_embeddings()`.

    Wrappers (DDP, torch.compile, PEFT) are looked through. A head tied to the input embedding is the head all the same.
    For a module that cannot be asked, the names that heads commonly have decide.
    """
    owner: Any = next((m for m in module.modules() if hasattr(m, "get_output_embeddings")), None)
    head = owner.get_output_embeddings() if owner is not None else None
    if head is None:
        return [name for name in names if HEAD_NAME.search(name)]
    ids = {id(p) for p in head.parameters()}
    named = dict(module.named_parameters())
    return [name for name in names if id(named[name]) in ids]
