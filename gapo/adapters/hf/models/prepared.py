"""A model made ready to be trained on margins: no dropout, no kernel without a backward; and how to undo it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from gapo.adapters.hf.models.architecture import prefix_is_cached
from gapo.adapters.hf.models.causal import require_decoder
from gapo.adapters.hf.models.quantised import stay_differentiable

# What transformers' models call the probability of a dropout or of a skipped layer that is no `nn.Dropout`.
_CHANCES = ("dropout", "dropout_p", "dropout_prob", "dropout_rate", "pdrop", "layerdrop")


class PreparedModel:
    """The changes on a model, for as long as it is trained."""

    def __init__(self, disable_dropout: bool) -> None:
        self._disable_dropout = disable_dropout
        self._model: nn.Module | None = None
        self._changed: list[tuple[Any, str, Any]] = []

    def prepare(self, model: nn.Module) -> None:
        """Change what has not been changed yet; give an earlier model, which the trainer has replaced, its own back.

        Raises:
            ValueError: the model is an encoder-decoder, or its 4-bit weights were packed.
        """
        if model is not self._model:
            self.undo()
            require_decoder(model)
        self._model = model
        self._changed += stay_differentiable(model)
        self._changed += without_dropout(model) if self._disable_dropout else []

    def undo(self) -> None:
        """The model's dropout and kernels as they were."""
        for module, attribute, value in reversed(self._changed):
            setattr(module, attribute, value)
        self._model, self._changed = None, []


def without_dropout(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Set every dropout probability of `model` to 0; what it was, to undo it.

    Besides `nn.Dropout`, models keep the probability of functional dropout in attributes such as `attention_dropout`,
    and that of passing over a layer in `layerdrop`. What is 0 already is left out: another trainer of this model may
    have set it, and is the one to undo it.
    """
    changed = []
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        names += [name for name, value in vars(module).items() if name.endswith(_CHANCES) and isinstance(value, float)]
        for name in names:
            if getattr(module, name) != 0:
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, 0.0)
    return changed


def require_graph(model: nn.Module) -> None:
    """Raise ValueError where the model's own checkpointing takes from the step what it needs.

    Asked when a training begins: a Trainer may have enabled another checkpointing than was there when it was made.
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
    """Whether a checkpointing function is torch's and re-entrant, which is torch's default."""
    options = getattr(function, "keywords", {})
    if function is checkpoint or getattr(function, "func", None) is checkpoint:
        return bool(options.get("use_reentrant", True))
    return bool(options.get("use_reentrant", False))


REENTRANT = (
    "re-entrant gradient checkpointing frees the graph that the step uses twice: set "
    'gradient_checkpointing_kwargs={"use_reentrant": False}'
)
