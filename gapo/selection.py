"""Which parameters the anchor perturbs, by name (method document, step 3)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gapo.config import GAPOConfig

# The output head by name, for models that cannot be asked (JAX pytrees, NumPy dicts, plain modules).
HEAD_NAME = re.compile(r"(^|[./\[\]'])(lm_head|embed_out|output_projection|unembed)($|[./\[\]'])")
_LAYER_INDEX = re.compile(r"(?<=[./\[_])(\d+)(?=[./\]]|$)")


def select(names: Iterable[str], head: Iterable[str], config: GAPOConfig) -> list[str]:
    """Names of the parameters to perturb, in the order given.

    Args:
        names: names of the trainable parameters.
        head: those among them that belong to the output head.
        config: its `perturb` and `last_layers`.

    Raises:
        ValueError: no parameter is trainable, or none is selected.
    """
    names = list(names)
    if not names:
        raise ValueError(
            "the model has no trainable parameter (all are frozen): unfreeze some, or add trainable adapters"
        )
    if config.perturb == "backbone":
        heads = set(head)
        selected = [name for name in names if name not in heads]
    elif config.perturb == "all":
        selected = names
    else:
        selected = [name for name in names if re.search(config.perturb, name)]
    if config.last_layers is not None:
        last = _last_layers(names, config.last_layers)
        selected = [name for name in selected if layer_index(name) in last]
    if not selected:
        raise ValueError(
            f"perturb={config.perturb!r} with last_layers={config.last_layers} selects none of the {len(names)} "
            f"trainable parameters (such as {', '.join(names[:3])}): give 'all' or another regular expression"
        )
    return selected


def layer_index(name: str) -> int | None:
    """Index of the layer of a parameter: the first whole number among the parts of its name, None without one."""
    found = _LAYER_INDEX.search(name)
    return int(found.group()) if found else None


def _last_layers(names: list[str], k: int) -> set[int]:
    layers = sorted({index for name in names if (index := layer_index(name)) is not None})
    if k > len(layers):
        raise ValueError(
            f"last_layers={k} was asked, but the trainable parameters lie in {len(layers)} numbered layers"
        )
    return set(layers[-k:])
