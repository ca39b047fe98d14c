"""Which parameters the anchor perturbs, by name (method document, step 3)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gapo.config import GAPOConfig
from gapo.mask import Mask

# The output head by name, for models that cannot be asked (NumPy dicts, plain modules, functions that do not tell).
# Names of the second row are common inside of layers too ("attention.output"): they count where only a model's own
# name stands before them.
_HEADS = "lm_head|embed_out|output_projection|unembed|logits_dense|to_logits"
_OUTERMOST_HEADS = "output|head|output_layer|final_proj|ff_out|logits"
_MODELS = "params|module|_orig_mod|_fsdp_wrapped_module|base_model|model|language_model|text_model|transformer|decoder"
_END, _BORDER = r"(?:$|[./\[\]'])", r"[./\[\]']"
HEAD_NAME = re.compile(
    rf"(?:^|{_BORDER})(?:{_HEADS}){_END}|^{_BORDER}*(?:(?:{_MODELS}){_BORDER}+)*(?:{_OUTERMOST_HEADS}){_END}"
)
NO_NUMBERS = "layers that share one array have no numbers; name what to perturb by a regular expression, perturb=..."
_LAYER_INDEX = re.compile(r"(?<=[./\[_])(\d+)(?=[./\]]|$)")


def select(names: Iterable[str], head: Iterable[str], config: GAPOConfig) -> list[str]:
    """Names of the parameters to perturb, in the order given.

    Args:
        names: names of the trainable parameters.
        head: those among them that belong to the output head.
        config: its `perturb` and `last_layers`.

    Raises:
        ValueError: no parameter is trainable, none is selected, or a mask is of none.
    """
    names = list(names)
    if not names:
        raise ValueError(
            "the model has no trainable parameter (all are frozen): unfreeze some, or add trainable adapters"
        )
    if isinstance(config.perturb, Mask):
        selected = list(config.perturb.keys_by_name(names))
    elif config.perturb == "backbone":
        heads = set(head)
        selected = [name for name in names if name not in heads]
    elif config.perturb == "all":
        selected = names
    else:
        selected = [name for name in names if re.search(str(config.perturb), name)]
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
    index = _LAYER_INDEX.search(name)
    return int(index.group()) if index else None


def _last_layers(names: list[str], k: int) -> set[int]:
    layers = sorted({index for name in names if (index := layer_index(name)) is not None})
    if k > len(layers):
        raise ValueError(
            f"last_layers={k} was asked, but the trainable parameters lie in {len(layers)} numbered layers"
            + ("" if layers else f" (such as {', '.join(names[:3])}): {NO_NUMBERS}")
        )
    return set(layers[-k:])
