"""How a Trainer accumulates gradients over micro-batches, as far as the loss of GAPO needs it another way."""

from __future__ import annotations

from accelerate.utils import DistributedType
from transformers import Trainer

# Whether the Trainer leaves it to the loss to be a mean over all micro-batches of a step.
_FLAGS = ("loss_is_scaled_for_ga", "model_accepts_loss_kwargs")


class Accumulation:
    """The settings of one trainer under which a loss that is a mean over its micro-batch is accumulated right."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._flags = {name: getattr(trainer, name) for name in _FLAGS if hasattr(trainer, name)}
        for name in self._flags:  # the Trainer is to divide the loss by the steps
            setattr(trainer, name, False)
        self._plugin = trainer.accelerator.gradient_state.plugin_kwargs
        # The probe of every micro-step needs reduced gradients. FSDP2 reduces them in a backward, and accelerate would
        # let it do so only in the last micro-step of an accumulation.
        self._set_sync = trainer.accelerator.is_fsdp2 and not self._plugin.get("sync_each_batch")
        if self._set_sync:
            self._plugin["sync_each_batch"] = True
        # The Trainer divides the loss by the steps. That of transformers 5.5 names them to accelerate too, which would
        # divide once more; later ones name 1. DeepSpeed is told not to by the Trainer itself.
        self._divided = self._plugin.get("num_steps", 1)
        if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
            self._plugin["num_steps"] = 1

    def undo(self) -> None:
        """Restore the trainer's own settings."""
        for name, value in self._flags.items():
            setattr(self._trainer, name, value)
        if self._set_sync:
            self._plugin["sync_each_batch"] = False
        self._plugin["num_steps"] = self._divided
