"""The PyTorch loop of `gapo train`: a plain Hugging Face `Trainer` with `GAPOCallback`."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.integrations import get_available_reporting_integrations

from gapo.adapters.hf import DriftCallback, GAPOCallback, PreferenceCollator
from gapo.adapters.hf import GAPOConfig as GAPOArguments
from gapo.adapters.hf.checkpoints import last_whole_checkpoint
from gapo.adapters.hf.models.peft_models import with_adapters
from gapo.adapters.hf.reference_model import summed_logps
from gapo.config import GAPOConfig
from gapo.data.lazy_rows import WithColumns, mapped
from gapo.runs import ranks
from gapo.runs.errors import ConfigError
from gapo.runs.models.pretrained import extent, load_model, load_tokenizer, require_fit, require_model
from gapo.runs.policy.frozen import last_layers, train_last
from gapo.runs.policy.remembered import remembered_states
from gapo.runs.reference_cache import with_kept_reference
from gapo.runs.train.loss_option import loss_of, objective_of
from gapo.runs.train.model_options import loading_options, lora_config, names_in
from gapo.runs.train.recorder import Recorder
from gapo.runs.train.run_data import RunData, tokenize_rows
from gapo.runs.train.schedule import steps_per_epoch
from gapo.runs.train.torch_arguments import arguments_of, require_arguments
from gapo.runs.train.torch_trainer import Progress, TrainerWithFlips, errors_named
from gapo.runs.train.train_config import TrainConfig

logger = logging.getLogger(__name__)


def run(
    config: TrainConfig, step_config: GAPOConfig, data: RunData, model_name: str, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Train; the evaluation before the first step and after the last one. The model is saved in `folder`/model."""
    revision = config.model_revision
    tokenizer = load_tokenizer(config.tokenizer or model_name, None if config.tokenizer else revision)
    collator = PreferenceCollator(tokenizer, max_length=config.max_length)
    flipped = PreferenceCollator(tokenizer, max_length=config.max_length, keep=("is_flipped", "pair"))
    tokenised, held_out = tokenize_rows(config, data, tokenizer)
    train_rows = mapped(tokenised, WithColumns(("pair",), np.arange(len(tokenised))[:, None]))
    _require_pairs(config, train_rows)
    highest, longest = extent(tokenised, held_out)
    settings = require_model(model_name, tokenizer=config.tokenizer, revision=revision)
    require_fit(settings, model_name, highest=max(highest, tokenizer.pad_token_id or 0), longest=longest)
    checkpoints = folder / "checkpoints"
    arguments = arguments_of(config, step_config, checkpoints, len(train_rows))
    model, _ = _load_model(config, model_name, arguments)
    if loss_of(config.loss, step_config, config.loss_settings).needs_reference:
        with ranks.first_ahead():
            train_rows, held_out = with_kept_reference(
                train_rows,
                held_out,
                partial(summed_logps, model, options=config.logp_options),
                folder / "reference.safetensors",
                pad_token_id=0,  # padding never counts
                batch_size=4 * config.batch_size,
                ld_alpha=config.ld_alpha,
            )
    if config.overwrite and ranks.is_first():
        shutil.rmtree(checkpoints, ignore_errors=True)
    ranks.meet()
    last = last_whole_checkpoint(checkpoints) if config.resume else None
    drift = _drift(config)
    recorder = Recorder(
        folder,
        until_step=int(last.rsplit("-", 1)[1]) if last else -1,
        steps_per_epoch=steps_per_epoch(config, len(train_rows), ranks.count()),
    )
    callback = GAPOCallback(
        step_config,
        objective=objective_of(config.loss),
        objective_settings=config.loss_settings,
        disable_dropout=config.disable_dropout,
        on_step=recorder.on_step,
        ld_alpha=config.ld_alpha,
        use_weighting=config.use_weighting,
    )
    trainer = TrainerWithFlips(
        model,
        arguments,
        train_dataset=train_rows,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[callback, recorder, *drift],
        processing_class=tokenizer,
    )
    trainer.train_collator = flipped
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress())
    try:
        with _frozen_states(config, trainer, folder):
            if last is None and (ranks.count() > 1 or trainer.is_deepspeed_enabled):
                # An evaluation before it would mark the model as prepared, without DDP: each process would train alone.
                trainer.args.eval_on_start = True
            elif last is None:
                trainer.evaluate()
            if last is None or not _load_if_finished(trainer, last):
                trainer.train(resume_from_checkpoint=last)
            after = _rewards(_evaluation(trainer, recorder))
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{last} holds a file that is no checkpoint, and might have run code: remove that folder, and the same "
            f"command goes on from the checkpoint before it ({' '.join(str(error).split())[-200:]})"
        ) from error
    finally:
        recorder.close()
    with errors_named(folder / "model"):
        trainer.save_model(str(folder / "model"))
    return _rewards(recorder.first_evaluation), after


def _evaluation(trainer: Trainer, recorder: Recorder) -> dict[str, float]:
    """The evaluation of the trained weights: that of the last step where it is theirs, else a new one."""
    last = recorder.last_evaluation
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return last
    return trainer.evaluate()


def _frozen_states(config: TrainConfig, trainer: Trainer, folder: Path) -> AbstractContextManager[None]:
    """The states of frozen layers, saved for the training; not where the model is in parts, or draws dropout masks."""
    in_parts = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.args.torch_compile
    if config.train_layers is None or in_parts or not config.disable_dropout:
        return nullcontext()
    return remembered_states(trainer.model, folder)


def _load_if_finished(trainer: Trainer, checkpoint: str) -> bool:
    """Whether the training had come to its end at this checkpoint, whose weights and step `trainer` then has.

    `Trainer.train` would take one step more.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    if state.global_step < state.max_steps:
        return False
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or checkpoint)
    trainer.state.global_step, trainer.state.epoch = state.global_step, state.epoch
    return True


def _drift(config: TrainConfig) -> list[TrainerCallback]:
    if not config.drift:
        return []
    return [
        DriftCallback(
            pairs=config.drift_pairs,
            prompts=config.drift_prompts,
            max_new_tokens=config.drift_max_new_tokens,
            seed=config.seed,
        )
    ]


def _load_model(config: TrainConfig, name: str, arguments: GAPOArguments) -> tuple[Any, Any]:
    """The model to train and its tokenizer."""
    options = loading_options(config)
    model, tokenizer = load_model(name, tokenizer=config.tokenizer, dtype=config.dtype, options=options)
    if getattr(model, "is_quantized", False):
        _require_adapters(config)
    if arguments.checkpointing_by_default and not model.supports_gradient_checkpointing:
        arguments.turn_checkpointing_off()
    lora = lora_config(config)
    if config.train_layers is not None and lora is None:
        train_last(model, config.train_layers)
    elif config.train_layers is not None:
        lora.layers_to_transform = list(last_layers(model, config.train_layers))
    return model if lora is None else with_adapters(model, lora, arguments), tokenizer


def require(config: TrainConfig, step_config: GAPOConfig) -> TrainConfig:
    """The run with the settings that depend on the device, before pairs and weights are read.

    Raises:
        ConfigError: a setting, the environment or the model cannot be used here; names it.
        ModuleNotFoundError: a library that a setting needs is not installed.
    """
    trackers = get_available_reporting_integrations()
    for name in names_in(config.report_to) or []:
        if name not in ("none", "all", *trackers):
            listed = ", ".join(trackers)
            raise ConfigError(f"report_to={name!r} is no tracker of transformers that is installed: {listed}")
    arguments = require_arguments(config, step_config)
    if arguments.world_size != ranks.count():
        raise ConfigError(
            f"{ranks.count()} processes were started, which PyTorch makes no group of on {arguments.device}: start one"
        )
    own = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    if arguments.mixed_precision != own:
        raise ConfigError(
            f"accelerate's configuration has mixed_precision {arguments.mixed_precision!r}, and the run's own is "
            f"{own!r}: let them agree"
        )
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs are visible to one process, and nn.DataParallel is not supported: start it with "
            f"torchrun --nproc_per_node {arguments.n_gpu} -m gapo train ..., or show it one, CUDA_VISIBLE_DEVICES=0"
        )
    if config.lora_dropout and config.disable_dropout and ranks.is_first():
        logger.warning("lora_dropout has no effect while disable_dropout is true, the default as in TRL")
    lora_config(config)
    loading_options(config)
    if config.model != "tiny":
        settings = require_model(config.model, tokenizer=config.tokenizer, revision=config.model_revision)
        if getattr(settings, "quantization_config", None) is not None:
            _require_adapters(config)
    return _on_device(config, arguments)


def _on_device(config: TrainConfig, arguments: GAPOArguments) -> TrainConfig:
    """The run with what its device decides; checkpointing waits for the model, which may not support it."""
    checkpointing: Any = arguments.gradient_checkpointing
    if ranks.is_first() and config.bf16 is None and arguments.bf16:
        print("defaults on this GPU: bf16 true, and gradient_checkpointing true unless it is set", flush=True)
    waits = checkpointing and arguments.checkpointing_by_default
    return replace(config, bf16=bool(arguments.bf16), gradient_checkpointing=None if waits else bool(checkpointing))


def _require_adapters(config: TrainConfig) -> None:
    if not config.lora_r:
        raise ConfigError(
            f"model {config.model!r} is quantised, and such weights cannot be trained: train adapters, --lora_r 16"
        )


def _require_pairs(config: TrainConfig, rows: Sequence[Any]) -> None:
    """Raise where one step of several processes has not enough pairs: accelerate would give some of them twice."""
    together = config.batch_size * ranks.count()
    if ranks.count() > 1 and together > len(rows):
        raise ConfigError(
            f"batch_size={config.batch_size} in {ranks.count()} processes needs {together} pairs at a time, and "
            f"{len(rows)} are left to train on: lower batch_size"
        )


def _rewards(metrics: dict[str, float]) -> dict[str, float]:
    wanted = (
        "eval_loss",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
        "eval_reference/accuracies",
        "eval_reference/margins",
        "eval_logps/chosen",
        "eval_logps/rejected",
    )
    return {name: metrics[name] for name in wanted if name in metrics}
