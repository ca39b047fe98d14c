"""Which of a module's parameters are the output head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from gapo.selection import HEAD_NAME


def head_parameters(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Names among `names` that belong to the output head, found by what it is: `get_output_embeddings()`.

    Wrappers (DDP, torch.compile, PEFT) are looked through. A head tied to the input embedding is the head all the same.
    For a module that cannot be asked, the names that heads commonly have decide: all names of a parameter that has two.
    """
    owner: Any = next((m for m in module.modules() if hasattr(m, "get_output_embeddings")), None)
    head = owner.get_output_embeddings() if owner is not None else None
    named = dict(module.named_parameters(remove_duplicate=False))
    if head is None:
        ids = {id(p) for name, p in named.items() if HEAD_NAME.search(name)}
    else:
        ids = {id(p) for p in head.parameters()}
    return [name for name in names if id(named[name]) in ids]
