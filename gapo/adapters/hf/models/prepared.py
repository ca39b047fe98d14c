"""A model made ready for a training on margins, and put back afterwards.

A margin under dropout is noise, and some kernels and checkpoints lose the gradients that the step needs.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from gapo.adapters.hf.models.architecture import require_decoder
from gapo.adapters.hf.models.peft_models import prefix_is_cached

# Attributes in which transformers' models keep the probability of a dropout, or of skipping a layer, that is no
# `nn.Dropout`; also as endings, such as `attention_dropout`.
_CHANCES = ("dropout", "dropout_p", "dropout_prob", "dropout_rate", "pdrop", "layerdrop")

Change = tuple[Any, str, Any]  # (module, attribute, old value)

REENTRANT = (
    "re-entrant gradient checkpointing frees the graph that the step uses twice: set "
    'gradient_checkpointing_kwargs={"use_reentrant": False}'
)


class PreparedModel:
    """The changes on a model, for as long as it is trained."""

    def __init__(self, disable_dropout: bool) -> None:
        self._disable_dropout = disable_dropout
        self._model: nn.Module | None = None
        self._changes: list[Change] = []

    def prepare(self, model: nn.Module) -> None:
        """Change what has not been changed yet. An earlier model, which the trainer has replaced, is put back.

        Raises:
            ValueError: the model is an encoder-decoder, or its 4-bit weights were packed.
        """
        if model is not self._model:
            self.undo()
            require_decoder(model)
        self._model = model
        self._changes += stay_differentiable(model)
        self._changes += without_dropout(model) if self._disable_dropout else []

    def undo(self) -> None:
        """Restore the model's dropout and kernels."""
        undo(self._changes)
        self._model, self._changes = None, []


def undo(changes: list[Change]) -> None:
    """Restore the attributes that `changes` names, the last one first."""
    for module, attribute, value in reversed(changes):
        setattr(module, attribute, value)


def without_dropout(model: nn.Module) -> list[Change]:
    """Set every dropout probability of `model` to 0; returns the changes.

    A probability that is 0 already is left out: another trainer of this model may have set it, and will restore it.
    """
    changes = []
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        names += [name for name, value in vars(module).items() if name.endswith(_CHANCES) and isinstance(value, float)]
        for name in names:
            if getattr(module, name) != 0:
                changes.append((module, name, getattr(module, name)))
                setattr(module, name, 0.0)
    return changes


def stay_differentiable(model: nn.Module) -> list[Change]:
    """Keep bitsandbytes from packing 4-bit weights on a CPU; returns the changes.

    On processors with AVX512-BF16 the first forward in evaluation mode packs the weights for a kernel that has no
    backward. Every later training step would get gradients of 0 from the layers below, with no more than a warning.

    Raises:
        ValueError: such a forward has run already. Unpacking would not help, since packing rounds.
    """
    changes: list[Change] = []
    for name, module in model.named_modules():
        flag = "support_avx512bf16_for_cpu"
        if not getattr(module, flag, False) or module.weight.device.type != "cpu":
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weights of {name} were packed for inference, by a forward in evaluation mode on the CPU, "
                "and give no gradients any more: load the model again, and make the trainer before its first use"
            )
        changes.append((module, flag, True))
        setattr(module, flag, False)
    return changes


def has_wide_weights(model: nn.Module) -> bool:
    """Whether some weight is float32 or wider."""
    return any(p.is_floating_point() and p.element_size() >= 4 for p in model.parameters())


def require_graph(model: nn.Module) -> None:
    """Raise ValueError where the model's gradient checkpointing drops what the step needs.

    Asked when a training begins, since a Trainer may enable checkpointing after it was made.
    """
    checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if any(_is_reentrant(getattr(module, "_gradient_checkpointing_func", None)) for module in checkpointing):
        raise ValueError(REENTRANT)
    if checkpointing and prefix_is_cached(model):
        raise ValueError(
            "gradient checkpointing drops the cache in which prefix tuning keeps its prompt: set "
            "gradient_checkpointing=False"
        )


def _is_reentrant(function: Any) -> bool:
    """Whether a checkpointing function is torch's, and re-entrant, which is torch's default."""
    options = getattr(function, "keywords", {})
    if function is checkpoint or getattr(function, "func", None) is checkpoint:
        return bool(options.get("use_reentrant", True))
    return bool(options.get("use_reentrant", False))
