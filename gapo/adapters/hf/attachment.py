"""What a `GAPOCallback` puts on a Trainer: its loss, its evaluation and its logs, as attributes of the instance.

The life of one batch of training:

1. `Trainer.training_step` moves the collator's batch to the device and calls `compute_loss(model, batch)`. `model` is
   what accelerate made of it: bare, in DDP, in DeepSpeed's engine, or sharded by FSDP2.
2. `stack_pairs` puts the rejected rows below the chosen ones, so that one forward serves both.
3. `TorchBackend.forward` runs the clean forward (`rows_logps`) in the way that fits the model and the objective.
4. `gapo.step.run` takes the step. Where the objective needs an anchor: the probe's backward, the perturbation, and the
   anchor's forward, after which the weights are restored bit for bit. Then, for every objective, the losses and their
   derivative by each log-probability.
5. `forward.as_loss` makes a scalar whose value is the loss, and whose backward gives the gradient of the step. The
   Trainer divides it by the number of accumulated batches, propagates it, and clips, steps and zeroes as always.
6. Running statistics of the objective go on to the next batch, and the batch's metrics join a window. When the Trainer
   logs, `log` closes the window: one value of each metric over its batches and all ranks joins the Trainer's own
   figures.

An evaluation takes no anchor: `prediction_step` gives the loss and the log-probabilities of a batch, and
`evaluation_loop` the metrics over all pairs.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from gapo.adapters.hf.accumulation import Accumulation
from gapo.adapters.hf.batches import stack_pairs
from gapo.adapters.hf.checkpoints import last_whole_checkpoint
from gapo.adapters.hf.margins import constants_of, rows_logps
from gapo.adapters.hf.models import PreparedModel, forward_parameters, has_wide_weights, require_causal, require_graph
from gapo.adapters.hf.supported import (
    as_trls,
    left_out,
    require_joined,
    require_supported,
    require_update,
    with_trls_alpha,
)
from gapo.adapters.hf.window import MetricsWindow
from gapo.backends.torch import TorchBackend
from gapo.backends.torch.sharded import is_shard
from gapo.config import GAPOConfig
from gapo.logp_options import LogpOptions
from gapo.metrics import evaluation_columns, evaluation_metrics, step_metrics
from gapo.objectives import Loss
from gapo.pairs import BatchConstants, LogProbs, require_reference
from gapo.reweighting import Watch
from gapo.step import Running, StepResult, run

logger = logging.getLogger(__name__)

# The trainer's methods that an attachment replaces, each by its own method of the same name.
_REPLACED = ("compute_loss", "prediction_step", "evaluation_loop", "log", "train")


@dataclass(frozen=True)
class Settings:
    """What an attachment needs of its callback.

    Attributes:
        config: of the step.
        loss: what the training minimises.
        on_step: called with the result and the batch after each training micro-batch.
        disable_dropout: whether dropout is 0 while attached.
        options: how log-probabilities are measured, and pairs weighted.
    """

    config: GAPOConfig
    loss: Loss
    on_step: Callable[[StepResult, dict[str, Any]], None]
    disable_dropout: bool
    options: LogpOptions


class Attachment:
    """The changes on one trainer instance, and how to undo them."""

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self.trainer, self._settings, self._config = trainer, settings, settings.config
        # float16's gradient scaler must see the update's backward, which the one-pass step replaces.
        self._backend = TorchBackend(one_pass=trainer.accelerator.mixed_precision != "fp16")
        self._window = MetricsWindow()
        self._evaluated: dict[str, list[Tensor]] = defaultdict(list)
        require_supported(trainer, settings.options)
        require_update(trainer, settings.config)
        self._logps = rows_logps(settings.options)  # one for all steps: what is proved of the model is kept for it
        self._prepared = PreparedModel(settings.disable_dropout)
        self._prepared.prepare(trainer.model)
        self._warnings: set[str] = set()
        self._warn_of_what_is_left_out()
        self._watch = Watch(settings.config, settings.loss, self._warn)
        self._rounded = False  # whether an evaluation in 16 bits has rounded the weights
        self._causal: nn.Module | None = None  # the model that has shown that it is causal
        self._gave_loss = False
        self.running: Running = {}  # statistics of the objective, as they stand after the last micro-batch
        self._accumulation = Accumulation(trainer)
        if trainer.args.remove_unused_columns:
            logger.info("remove_unused_columns was True, which would drop the pairs' columns: set to False")
            trainer.args.remove_unused_columns = False
        self._replaced = {name: getattr(trainer, name) for name in _REPLACED}
        for name in _REPLACED:
            setattr(trainer, name, getattr(self, name))
        trainer._gapo_attachment = self

    @staticmethod
    def of(trainer: Trainer) -> Attachment | None:
        """The attachment on `trainer`, if there is one."""
        return getattr(trainer, "_gapo_attachment", None)

    def undo(self) -> None:
        """Restore the trainer, and the model's dropout and kernels."""
        for name in _REPLACED:
            delattr(self.trainer, name)
        self._accumulation.undo()
        self._prepared.undo()
        del self.trainer._gapo_attachment

    def begin(self) -> None:
        """Prepare the model that a training begins with: `model_init` or a search may have made another one."""
        if self._rounded and self.trainer.model_init is None:
            raise ValueError(
                "an evaluation with bf16_full_eval or fp16_full_eval has rounded the model's weights to 16 bits: load "
                "the model again, and train before you evaluate, or leave the option out"
            )
        require_supported(self.trainer, self._settings.options)  # arguments may have changed since attaching
        self._window.clear()  # of a training that was interrupted, or begun again with smaller batches
        self._prepared.prepare(self.trainer.model)
        require_graph(self.trainer.model)
        self._warn_of_what_is_left_out()
        self._causal, self._gave_loss = None, False

    def require_a_loss(self) -> None:
        """Raise RuntimeError where the trainer made a step without calling `compute_loss`."""
        if not self._gave_loss:
            raise RuntimeError(
                f"{type(self.trainer).__name__} made a step without calling compute_loss, so that it was none of "
                "GAPO's: GAPOCallback needs a Trainer whose training_step calls it"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own training, except that True stands for the last checkpoint that was written whole."""
        if resume_from_checkpoint is True:
            folder = self.trainer.args.output_dir
            resume_from_checkpoint = last_whole_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no whole checkpoint in {folder!r} to resume from: leave the argument out")
        return self._replaced["train"](resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The training loss of a micro-batch: its value, and through its backward the gradient of the step."""
        self._gave_loss = True
        loss, config = self._settings.loss, self._config
        if loss.needs_reference:
            require_reference(loss.name, inputs, "gapo.adapters.hf.with_reference_logps")
        takes_anchor = loss.needs_anchor or config.updates_at_anchor
        require_joined(self.trainer, model)
        bare = self.trainer.accelerator.unwrap_model(model)
        rows = stack_pairs(as_trls(inputs, self.trainer), forward_parameters(bare))
        self._logps.await_batch(rows)
        forward = self._backend.forward(
            self._logps, bare, rows, config, anchor=takes_anchor, by_side=loss.by_side, wrapper=model
        )
        constants = self._constants(inputs, rows)
        result, update = run(forward, config, self._backend, loss=loss, constants=constants, running=self.running)
        scalar = forward.as_loss(result.loss, update)
        self._require_causal(model, rows)
        self.running = result.running or {}
        metrics = step_metrics(result, config)
        if result.radius is not None:
            metrics["gapo/anchor_pairs"] = torch.tensor(float(self._anchor_pairs(result)))
            self._warn_of_no_perturbation(result.radius)
        self._window.add(metrics, len(result.margins))
        self._settings.on_step(result, inputs)
        return (scalar, {}) if return_outputs else scalar

    def _constants(self, inputs: dict[str, Any], rows: dict[str, Tensor]) -> BatchConstants:
        """What the batch tells besides the log-probabilities, once the clean forward has run."""
        checked = self._settings.options.checked(with_trls_alpha(inputs, self.trainer))
        return replace(constants_of(checked, rows), pair_weights=self._logps.pair_weights())

    def _warn_of_no_perturbation(self, radius: torch.Tensor) -> None:
        if float(radius) == 0 and self._config.moves:
            self._warn(
                "the perturbation is 0: abs(theta) * g is 0 for every selected parameter. A fresh LoRA starts so (B is "
                "0); it ends with the first update. With adaptive=False it does not happen"
            )

    def _require_causal(self, model: nn.Module, rows: dict[str, Tensor]) -> None:
        """Ask the model once in a training, on its first batch.

        It is asked after the step, which has clearer messages for what is wrong with the batch.
        """
        bare = self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
        if self._causal is not bare:
            in_16_bits = self.trainer.accelerator.mixed_precision != "no"
            require_causal(bare, rows, in_16_bits)
            self._causal = bare

    def _anchor_pairs(self, result: StepResult) -> int:
        """How many pairs share an anchor: those of the micro-batch, over all ranks."""
        pairs = int(result.margins.shape[0]) * self.trainer.accelerator.num_processes
        if pairs == 1:
            self._warn(
                "one pair shares each anchor, so its gap is its own sensitivity only (to first order never negative). "
                "Raise per_device_train_batch_size: gradient accumulation does not widen the anchor's batch"
            )
        return pairs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss of a batch without an anchor, its log-probabilities (N, 2) as predictions, and labels of 1."""
        inputs = self.trainer._prepare_inputs(inputs)
        loss = self._settings.loss
        if loss.evaluated.needs_reference:
            require_reference(loss.name, inputs, "gapo.adapters.hf.with_reference_logps")
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            rows = stack_pairs(as_trls(inputs, self.trainer), forward_parameters(model))
            self._logps.await_batch(rows)
            outputs = self._logps(model, rows)
            constants = self._constants(inputs, rows)
            columns = evaluation_columns(loss, LogProbs.of_step(outputs, constants), constants.pair_weights)
        self._require_causal(model, rows)
        gathered = self.trainer.accelerator.gather_for_metrics(torch.stack(list(columns.values()), dim=-1))
        for name, column in zip(columns, gathered.unbind(-1), strict=True):
            self._evaluated[name].append(column)
        if prediction_loss_only:
            return columns["loss"].mean(), None, None
        predictions = torch.stack([columns["chosen"], columns["rejected"]], dim=-1)
        return columns["loss"].mean(), predictions, torch.ones_like(columns["chosen"])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loop, with the reward metrics of all its pairs added."""
        self._evaluated.clear()
        wide = has_wide_weights(self.trainer.model)
        output = self._replaced["evaluation_loop"](*args, **kwargs)
        self._rounded |= wide and not has_wide_weights(self.trainer.model)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        if not self._evaluated:
            raise ValueError("the data set to evaluate on holds no pairs: give at least one, or set eval_strategy='no'")
        columns = {name: torch.cat(parts) for name, parts in self._evaluated.items()}
        # Over every pair. The trainer's own metrics leave out what is not finite, and count a stacked batch's rows.
        for name, value in evaluation_metrics(columns, self._config).items():
            output.metrics[f"{prefix}_{name}"] = float(value)
        self._evaluated.clear()
        return output

    def require_finite_gradients(self, model: nn.Module) -> None:
        """Raise FloatingPointError where a gradient is not finite, before the optimizer takes it.

        Not looked at: shards, and gradients that float16's scaler may skip by itself.
        """
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if not grads or self.trainer.accelerator.scaler is not None or any(map(is_shard, grads.values())):
            return
        if not bool(torch.isfinite(torch.nn.utils.get_total_norm(list(grads.values()), float("inf")))):
            bad = [name for name, g in grads.items() if not bool(torch.isfinite(g).all())]
            whose = repr(bad[0]) if len(bad) < len(grads) else "all parameters (clipping has spread a NaN)"
            raise FloatingPointError(
                f"the gradient of {whose} is not finite; no weight was changed. Look for overflow in the backward, or "
                "use a wider dtype"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own log, with the metrics of the training window added where it reports one."""
        if self._window and "loss" in logs:
            metrics = self._window.close(self.trainer.accelerator)
            self._watch.see(metrics)
            logs.update(metrics)
        self._replaced["log"](logs, *args, **kwargs)

    def _warn_of_what_is_left_out(self) -> None:
        for line in left_out(self.trainer):
            self._warn(line)

    def _warn(self, message: str) -> None:
        """Log a warning, each message once."""
        if message not in self._warnings:
            self._warnings.add(message)
            logger.warning(message)


__all__ = ["Attachment", "Settings"]
