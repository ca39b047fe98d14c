"""What a `GAPOCallback` puts on a Trainer: its loss, its evaluation and its logs, as attributes of the instance."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from gapo.adapters.hf.batches import stack_pairs
from gapo.adapters.hf.causal import require_causal
from gapo.adapters.hf.checkpoints import last_whole_checkpoint
from gapo.adapters.hf.margins import log_probs, pair_logps
from gapo.adapters.hf.models import forward_parameters
from gapo.adapters.hf.prepared import PreparedModel, require_graph
from gapo.adapters.hf.supported import left_out, require_supported
from gapo.backends.base import by_pairs
from gapo.backends.torch import TorchBackend
from gapo.backends.torch.sharded import is_shard
from gapo.backends.torch.zero3 import Zero3Forward, is_zero3
from gapo.data.reference_columns import require_reference
from gapo.metrics import combine, pair_metrics, reference_metrics, reward_metrics, step_metrics
from gapo.objectives import LogProbs
from gapo.step import StepResult, run

if TYPE_CHECKING:
    from gapo.adapters.hf.callback import GAPOCallback

logger = logging.getLogger(__name__)

_PAIRS = "pairs"  # of a micro-batch, by which its metrics weigh in a window's mean

_REPLACED = ("compute_loss", "prediction_step", "evaluation_loop", "log", "train")


class Attachment:
    """The changes on one trainer instance, and how to undo them."""

    def __init__(self, trainer: Trainer, callback: GAPOCallback) -> None:
        self.trainer, self._callback, self._config = trainer, callback, callback.config
        # float16's gradient scaler must see the update's backward, which the one-pass step replaces.
        self._backend = TorchBackend(one_pass=trainer.accelerator.mixed_precision != "fp16")
        self._window: dict[str, list[Tensor]] = defaultdict(list)
        self._evaluated: list[Tensor] = []
        require_supported(trainer)
        self._prepared = PreparedModel(callback.disable_dropout)
        self._prepared.prepare(trainer.model)
        self._told: set[str] = set()
        self._tell_what_is_left_out()
        self._rounded = False  # by an evaluation in 16 bits
        self._asked: nn.Module | None = None  # the model that is known to be causal
        self._gave_loss = False
        self._flags = {
            name: getattr(trainer, name)
            for name in ("loss_is_scaled_for_ga", "model_accepts_loss_kwargs")
            if hasattr(trainer, name)
        }
        for name in self._flags:  # the loss is a mean over the micro-batch: the Trainer is to divide it by the steps
            setattr(trainer, name, False)
        if trainer.args.remove_unused_columns:
            logger.info("remove_unused_columns was True, which would drop the pairs' columns: set to False")
            trainer.args.remove_unused_columns = False
        # FSDP2's shards get their gradients in a backward that reduces, and the probe of every micro-step needs them.
        self._accumulation = trainer.accelerator.gradient_state.plugin_kwargs
        self._set_sync = trainer.accelerator.is_fsdp2 and not self._accumulation.get("sync_each_batch")
        if self._set_sync:
            self._accumulation["sync_each_batch"] = True
        self._own = {name: getattr(trainer, name) for name in _REPLACED}
        for name in _REPLACED:
            setattr(trainer, name, getattr(self, name))
        trainer._gapo_attachment = self

    @staticmethod
    def of(trainer: Trainer) -> Attachment | None:
        """The attachment on `trainer`, if there is one."""
        return getattr(trainer, "_gapo_attachment", None)

    def undo(self) -> None:
        """The trainer as it was; the model's dropout and kernels as they were."""
        for name in _REPLACED:
            delattr(self.trainer, name)
        for name, value in self._flags.items():
            setattr(self.trainer, name, value)
        self._prepared.undo()
        if self._set_sync:
            self._accumulation["sync_each_batch"] = False
        del self.trainer._gapo_attachment

    def begin(self) -> None:
        """Make the model ready that a training begins with: `model_init`, or a search, may have made another one."""
        if self._rounded and self.trainer.model_init is None:
            raise ValueError(
                "an evaluation with bf16_full_eval or fp16_full_eval has rounded the model's weights to 16 bits: load "
                "the model again, and train before you evaluate, or leave the option out"
            )
        require_supported(self.trainer)  # what was set after attaching
        self._window.clear()  # of a training that was interrupted, or begun again with smaller batches
        self._prepared.prepare(self.trainer.model)
        require_graph(self.trainer.model)
        self._tell_what_is_left_out()
        self._asked, self._gave_loss = None, False

    def require_a_loss(self) -> None:
        """Raise RuntimeError where the trainer made a step without the loss of GAPO."""
        if not self._gave_loss:
            raise RuntimeError(
                f"{type(self.trainer).__name__} made a step without calling compute_loss, so that it was none of "
                "GAPO's: GAPOCallback needs a Trainer whose training_step calls it"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own training, but that True stands for the last checkpoint that was written whole."""
        if resume_from_checkpoint is True:
            folder = self.trainer.args.output_dir
            resume_from_checkpoint = last_whole_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no whole checkpoint in {folder!r} to resume from: leave the argument out")
        return self._own["train"](resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The training loss of a micro-batch: its value, and through its backward the gradient of the step."""
        result, self._gave_loss = None, True
        if self._callback.objective != "gapo":
            logps, losses = self._losses(model, inputs)
            loss, metrics, pairs = losses.mean(), pair_metrics(logps, self._config), len(losses)
        else:
            loss, result = self._step(model, inputs)
            pairs = len(result.margins)
            metrics = step_metrics(result, self._config)
            metrics["gapo/anchor_pairs"] = torch.tensor(float(self._anchor_pairs(result)))
        self._require_causal(model, inputs)
        metrics[_PAIRS] = torch.tensor(float(pairs))
        for name, value in metrics.items():
            self._window[name].append(value.detach().float())
        if self._callback.on_step is not None:
            self._callback.on_step(result, inputs)
        return (loss, {}) if return_outputs else loss

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LogProbs, Tensor]:
        """Log-probabilities of a batch, and the loss without an anchor of each pair."""
        objective, settings = self._callback.losses_without_anchor
        if objective.needs_reference:
            require_reference(objective.name, inputs, "gapo.adapters.hf.with_reference_logps")
        logps = log_probs(model, inputs)
        return logps, objective.losses(logps, **settings)

    def _step(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, StepResult]:
        bare = self.trainer.accelerator.unwrap_model(model)

        @by_pairs
        def margin_fn(_: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            return pair_logps(self._through if torch.is_grad_enabled() else bare, batch)

        # The first clean forward goes through DDP, which prepares its reduction. The anchor's has no backward to
        # prepare, and a second clean one (see `TorchForward`) may run on some ranks only. DeepSpeed's engine would take
        # the probe's backward for the update's.
        self._through = bare if self.trainer.is_deepspeed_enabled else model
        forward: Any
        if is_zero3(bare):
            forward = Zero3Forward(pair_logps, model, inputs, self._config)
        else:
            forward = self._backend.forward(margin_fn, bare, inputs, self._config)
        self._through = bare
        result, cotangents = run(forward, self._config, self._backend)
        if float(result.radius) == 0 and self._config.rho > 0:
            self._tell(
                "the perturbation is 0: abs(theta) * g is 0 for every selected parameter. A fresh LoRA starts so (B is "
                "0); it ends with the first update. With adaptive=False it does not happen"
            )
        return forward.as_loss(result.loss, cotangents), result

    def _require_causal(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Ask the model once in a training, on its first batch, when the step has found nothing wrong with that."""
        bare = self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
        if self._asked is not bare:
            in_16_bits = self.trainer.accelerator.mixed_precision != "no"
            require_causal(bare, stack_pairs(inputs, forward_parameters(bare)), in_16_bits)
            self._asked = bare

    def _anchor_pairs(self, result: StepResult) -> int:
        """How many pairs share an anchor: those of the micro-batch, over all ranks."""
        pairs = int(result.margins.shape[0]) * self.trainer.accelerator.num_processes
        if pairs == 1:
            self._tell(
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
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            sums, losses = self._losses(model, inputs)
        self._require_causal(model, inputs)
        averages = sums.per_token()
        logps = torch.stack([averages.chosen, averages.rejected], dim=-1)
        margins = sums.log_ratio_margins()
        columns = torch.stack([losses.to(logps), *logps.unbind(-1), *([] if margins is None else [margins])], dim=-1)
        self._evaluated.append(self.trainer.accelerator.gather_for_metrics(columns))
        if prediction_loss_only:
            return losses.mean(), None, None
        return losses.mean(), logps, torch.ones_like(averages.chosen)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loop, with the reward metrics of all its pairs added."""
        self._evaluated = []
        wide = _has_wide_weights(self.trainer.model)
        output = self._own["evaluation_loop"](*args, **kwargs)
        self._rounded |= wide and not _has_wide_weights(self.trainer.model)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        if not self._evaluated:
            raise ValueError("the data set to evaluate on holds no pairs: give at least one, or set eval_strategy='no'")
        losses, chosen, rejected, *log_ratio_margins = torch.cat(self._evaluated).unbind(-1)
        # Of every pair: the trainer's own leaves out what is not finite, and counts the rows of a stacked batch.
        metrics = {"loss": losses.mean(), **reward_metrics(chosen, rejected, self._config)}
        if log_ratio_margins:
            metrics |= reference_metrics(log_ratio_margins[0])
        for name, value in metrics.items():
            output.metrics[f"{prefix}_{name}"] = float(value)
        self._evaluated = []
        return output

    def require_finite_gradients(self, model: nn.Module) -> None:
        """Raise FloatingPointError where a gradient is not finite, before the optimizer takes it.

        Not looked at: shards, and what float16's scaler may skip by itself.
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
            logs.update(self._close_window())
        self._own["log"](logs, *args, **kwargs)

    def _close_window(self) -> dict[str, float]:
        names = list(self._window)
        table = torch.stack([torch.stack([v.cpu() for v in self._window[name]]) for name in names], dim=-1)
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:
            table = accelerator.gather(table.to(accelerator.device)).cpu()
        self._window.clear()
        columns = {name: column.tolist() for name, column in zip(names, table.T, strict=True)}
        pairs = columns.pop(_PAIRS)
        return {name: combine(name, column, pairs) for name, column in columns.items()}

    def _tell_what_is_left_out(self) -> None:
        for line in left_out(self.trainer):
            self._tell(line)

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            logger.warning(message)


def _has_wide_weights(model: nn.Module) -> bool:
    return any(p.is_floating_point() and p.element_size() >= 4 for p in model.parameters())


__all__ = ["Attachment"]
