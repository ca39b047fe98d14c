"""`GAPOCallback`: turns the training of any `transformers.Trainer` into GAPO."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import FrameType
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from gapo.adapters.hf.attachment import Attachment, Settings
from gapo.config import GAPOConfig, step_settings
from gapo.objectives import without_anchor
from gapo.step import StepResult

logger = logging.getLogger(__name__)

# The key under which trainer_state.json keeps the settings. A Trainer restores callbacks by their class's name, and no
# callback has this one.
_STATE = "gapo"


class GAPOCallback(TrainerCallback):
    """Train with GAPO in a Trainer that exists already, nothing else changed.

    `Trainer(model, args, ..., data_collator=PreferenceCollator(tokenizer), callbacks=[GAPOCallback(config)])`. While
    attached, the trainer's `compute_loss` is the GAPO step, its evaluation gives the probe loss (`eval_loss`; another
    objective's own loss) and `eval_rewards/accuracies`, and its logs carry TRL's keys and GAPO's. The model itself is
    not touched: its `forward` and its weights between steps are its own. `detach()` undoes it all.

    Select models on `eval_loss` or `eval_rewards/accuracies`, never on the training loss: GAPO's stays flat while
    margins grow.

    Args:
        config: settings of the step; None for the defaults.
        objective: "gapo"; "simpo" for the control, the same training on the probe loss, without an anchor; or another
            name of `gapo.objectives.OBJECTIVES`. Those that compare with a reference need its log-probabilities in each
            batch: see `with_reference_logps`.
        objective_settings: settings of the other objectives, such as {"beta": 0.1}; None for their defaults. "gapo" and
            "simpo" take theirs from `config`.
        on_step: called as `on_step(result, batch)` after each training micro-batch, with the `gapo.StepResult` (None
            for other objectives) and the batch; on each rank, of its own pairs.
        disable_dropout: True sets all dropout to 0 while attached, as TRL does: a preference margin under dropout is
            noise.

    Raises:
        TypeError, ValueError: an argument is not accepted. On attaching, when a training begins, or on its first batch:
            what docs/trainer.md lists under "What is refused", from `nn.DataParallel` to a model that is not causal.
    """

    def __init__(
        self,
        config: GAPOConfig | None = None,
        *,
        objective: str = "gapo",
        objective_settings: Mapping[str, Any] | None = None,
        on_step: Callable[[StepResult | None, dict[str, Any]], None] | None = None,
        disable_dropout: bool = True,
    ) -> None:
        self.config = step_settings(config, objective, objective_settings)
        self.objective = objective
        self.losses_without_anchor = without_anchor(objective, self.config, objective_settings)
        self.on_step = on_step
        self.disable_dropout = disable_dropout
        self._attachment: Attachment | None = None
        self._left: weakref.ref[Trainer] | None = None  # the trainer that it was detached from

    def attach(self, trainer: Trainer) -> GAPOCallback:
        """Turn `trainer` into a GAPO trainer; harmless if it is already this callback's. Returns self."""
        if self._attachment is not None and self._attachment.trainer is trainer:
            return self
        if self._attachment is not None:
            raise ValueError(
                "this GAPOCallback is attached to another trainer: make a second one, or detach() it first"
            )
        if Attachment.of(trainer) is not None:
            raise ValueError("another GAPOCallback is attached to this trainer already: give it one only")
        settings = Settings(self.config, self.objective, self.losses_without_anchor, self._report, self.disable_dropout)
        self._attachment, self._left = Attachment(trainer, settings), None
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def detach(self) -> None:
        """Give the trainer its own methods and the model its dropout back, until `attach` is called again."""
        if self._attachment is not None:
            self._attachment.undo()
            self._left = weakref.ref(self._attachment.trainer)
            self._attachment = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attach_to_caller()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self._attach_to_caller()  # add_callback() after construction never fires on_init_end
        if self._attachment is not None:
            self._attachment.begin()
            self._compare_settings(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attachment is None and self._left is None:  # add_callback() while training fires neither
            self.on_train_begin(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attachment is not None:
            self._attachment.require_a_loss()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if self._attachment is not None and model is not None:
            self._attachment.require_finite_gradients(model)

    def _report(self, result: StepResult | None, batch: dict[str, Any]) -> None:
        if self.on_step is not None:
            self.on_step(result, batch)

    def _compare_settings(self, state: TrainerState) -> None:
        """Warn of settings that differ from the resumed checkpoint's; write the present ones to later checkpoints."""
        settings = {"objective": self.objective, **self.losses_without_anchor[1], **asdict(self.config)}
        old = state.stateful_callbacks.get(_STATE, {}).get("attributes", settings)
        changes = [f"{name}: {old.get(name)!r} -> {new!r}" for name, new in settings.items() if old.get(name) != new]
        if changes:
            logger.warning("the checkpoint was trained with other settings of GAPO: %s", ", ".join(changes))
        state.stateful_callbacks[_STATE] = {"args": {}, "attributes": settings}

    def _attach_to_caller(self) -> None:
        trainer = calling_trainer(self)
        if self._left is None or self._left() is not trainer:
            self.attach(trainer)


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The trainer that is calling `callback` now.

    A Trainer never hands itself to a callback. It calls the callback, though, so that one of the frames above is a
    method of the trainer.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    name = type(callback).__name__
    raise RuntimeError(f"no Trainer was found that calls this {name}: give it to one, as one of its callbacks")
