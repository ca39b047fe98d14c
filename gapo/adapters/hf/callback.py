"""`GAPOCallback`: turns the training of any `transformers.Trainer` into GAPO."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import FrameType
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from gapo.adapters.hf.attachment import Attachment, Settings
from gapo.config import GAPOConfig, plain, step_settings
from gapo.logp_options import LogpOptions
from gapo.objectives import Objective, resolve
from gapo.objectives.loss import warn_of_scale
from gapo.step import Running, StepResult

logger = logging.getLogger(__name__)

# The key under which trainer_state.json keeps the settings. A Trainer restores callbacks by their class's name, and no
# callback has this one.
_STATE = "gapo"


class GAPOCallback(TrainerCallback):
    """Train with GAPO in a Trainer that exists already, nothing else changed.

    `Trainer(model, args, ..., data_collator=PreferenceCollator(tokenizer), callbacks=[GAPOCallback(config)])`. While
    attached, the trainer's `compute_loss` is the step of GAPO or of another objective. Its evaluation gives
    `eval_rewards/accuracies` and `eval_loss`, GAPO's probe loss or the other objective's own loss. Its logs carry TRL's
    keys and GAPO's. Running statistics of an objective go from micro-batch to micro-batch, are in each checkpoint, and
    begin anew with a training that does not resume one. The model's `forward` and its weights between steps are not
    touched. `detach()` undoes everything.

    Select models on `eval_loss` or `eval_rewards/accuracies`, never on the training loss: GAPO's stays flat while
    margins grow.

    Args:
        config: settings of the step; None for the defaults.
        objective: "gapo"; "simpo" for the control, the same training on the probe loss, without an anchor; another name
            of `gapo.objectives.OBJECTIVES`; a `gapo.objectives.Objective`; or any function of a
            `gapo.objectives.LogProbs` that returns the loss of each pair, (N,). Objectives that compare with a
            reference need its log-probabilities in each batch: see `with_reference_logps`.
        objective_settings: settings of the objective, such as {"beta": 0.1}; None for its defaults. "gapo" and "simpo"
            take theirs from `config`.
        on_step: called as `on_step(result, batch)` after each training micro-batch, with its `gapo.StepResult` and the
            batch; on each rank, of its own pairs. The fields of the anchor are None for objectives without one.
        disable_dropout: True sets all dropout to 0 while attached, as TRL does: a preference margin under dropout is
            noise.
        ld_alpha: LD-DPO's alpha in [0, 1]: how much the tail of a pair's longer answer counts in its log-probability,
            in training and evaluation; None for 1. Measure the reference with the same,
            `with_reference_logps(..., ld_alpha=...)`; another one is refused.
        use_weighting: True multiplies each pair's loss by WPO's weight, how likely the policy is to have written both
            answers, as TRL's `use_weighting` does. The weight carries no gradient.

    Raises:
        TypeError, ValueError: an argument is not accepted. On attaching, when a training begins, or on its first batch:
            what docs/trainer.md lists under "What is refused", from `nn.DataParallel` to a model that is not causal.
    """

    def __init__(
        self,
        config: GAPOConfig | None = None,
        *,
        objective: str | Objective | Callable[..., Tensor] = "gapo",
        objective_settings: Mapping[str, Any] | None = None,
        on_step: Callable[[StepResult, dict[str, Any]], None] | None = None,
        disable_dropout: bool = True,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
    ) -> None:
        name = objective.name if isinstance(objective, Objective) else objective
        self.options = LogpOptions(ld_alpha, use_weighting)
        self.config = step_settings(config, name, objective_settings, **asdict(self.options))
        self.loss = resolve(objective, self.config, objective_settings)
        warn_of_scale(self.loss)
        self.options.require_weightable(self.loss.name, self.loss.objective.coupled)
        self.objective = self.loss.name
        self.on_step = on_step
        self.disable_dropout = disable_dropout
        self._attachment: Attachment | None = None
        self._left: weakref.ref[Trainer] | None = None  # the trainer that it was detached from
        self._running_left: Running = {}  # the running statistics as they stood then
        self._began_at = 0  # the step that the training began after

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
        settings = Settings(self.config, self.loss, self._report, self.disable_dropout, self.options)
        self._attachment = Attachment(trainer, settings)
        if self._left is not None and self._left() is trainer:  # within a training they go on; a new one begins anew
            self._attachment.running = self._running_left
        self._left = None
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def detach(self) -> None:
        """Give the trainer its own methods and the model its dropout back, until `attach` is called again.

        Running statistics of the objective stand still meanwhile, and go on when the callback is attached again.
        """
        if self._attachment is not None:
            self._attachment.undo()
            self._left, self._running_left = weakref.ref(self._attachment.trainer), self._attachment.running
            self._attachment = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attach_to_caller()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self._attach_to_caller()  # add_callback() after construction never fires on_init_end
        if self._attachment is not None:
            self._attachment.begin()
            self._take_up(self._attachment, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attachment is None and self._left is None:  # add_callback() while training fires neither
            self.on_train_begin(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._attachment is not None:
            self._attachment.require_a_loss()
            self._keep_running(self._attachment, state)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        if self._attachment is not None and model is not None:
            self._attachment.require_finite_gradients(model)

    def _report(self, result: StepResult, batch: dict[str, Any]) -> None:
        if self.on_step is not None:
            self.on_step(result, batch)

    def _take_up(self, attachment: Attachment, state: TrainerState) -> None:
        """Take the running statistics of the resumed checkpoint, if there is one, and warn of settings that differ.

        The present settings go into later checkpoints. Another objective's statistics are not taken.
        """
        settings = self._settings()
        entry = state.stateful_callbacks.get(_STATE, {})
        old = {**plain(GAPOConfig()), **asdict(LogpOptions()), **entry.get("attributes", settings)}
        changes = [f"{name}: {old.get(name)!r} -> {new!r}" for name, new in settings.items() if old.get(name) != new]
        if changes:
            logger.warning("the checkpoint was trained with other settings of GAPO: %s", ", ".join(changes))
        same = old.get("objective") == self.objective
        attachment.running, self._began_at = entry.get("running", {}) if same else {}, state.global_step
        state.stateful_callbacks[_STATE] = {"args": {}, "attributes": settings, "running": attachment.running}

    def _keep_running(self, attachment: Attachment, state: TrainerState) -> None:
        """Put the running statistics where the step's checkpoint takes them: as floats, which JSON keeps exactly."""
        entry = state.stateful_callbacks.setdefault(_STATE, {"args": {}, "attributes": self._settings()})
        new = sorted(attachment.running.keys() - entry.get("running", {}).keys())
        if new and 0 < self._began_at == state.global_step - 1:
            logger.warning(
                "the training goes on after step %d, from where nothing is known of the running statistics %s: they "
                "begin anew. Resume from a checkpoint that was saved with the same objective",
                self._began_at,
                ", ".join(map(repr, new)),
            )
        entry["running"] = {name: float(value) for name, value in attachment.running.items()}

    def _settings(self) -> dict[str, Any]:
        of_objective = {name: _plain(value) for name, value in self.loss.settings.items()}
        return {"objective": self.objective, **of_objective, **plain(self.config), **asdict(self.options)}

    def _attach_to_caller(self) -> None:
        trainer = calling_trainer(self)
        if self._left is None or self._left() is not trainer:
            self.attach(trainer)


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


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
