"""The PyTorch loop of `gapo train`: a plain Hugging Face `Trainer` with `GAPOCallback`."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations

from gapo._extras import named_extra
from gapo.adapters.hf import DriftCallback, GAPOCallback, PreferenceCollator
from gapo.adapters.hf.checkpoints import last_whole_checkpoint
from gapo.adapters.hf.reference_model import summed_logps
from gapo.config import GAPOConfig
from gapo.data.lazy_rows import WithColumns, joined, mapped
from gapo.runs import ranks
from gapo.runs.errors import ConfigError
from gapo.runs.models.pretrained import extent, load_model, load_tokenizer, require_fit, require_model
from gapo.runs.reference_cache import with_kept_reference
from gapo.runs.train.loss_option import loss_of, objective_of
from gapo.runs.train.recorder import Recorder
from gapo.runs.train.run_data import RunData, tokenize_rows
from gapo.runs.train.schedule import steps_between_evaluations, steps_per_epoch, total_steps
from gapo.runs.train.torch_trainer import Progress, TrainerWithFlips, errors_named
from gapo.runs.train.train_config import TrainConfig


def run(
    config: TrainConfig, step_config: GAPOConfig, data: RunData, model_name: str, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Train; the evaluation before the first step and after the last one. The model is saved in `folder`/model."""
    tokenizer = load_tokenizer(config.tokenizer or model_name)
    collator = PreferenceCollator(tokenizer, max_length=config.max_length)
    flipped = PreferenceCollator(tokenizer, max_length=config.max_length, keep=("is_flipped", "pair"))
    train_rows, held_out = tokenize_rows(config, data, tokenizer)
    train_rows = mapped(train_rows, WithColumns(("pair",), np.arange(len(train_rows))[:, None]))
    _require_pairs(config, train_rows)
    highest, longest = extent(joined(train_rows, held_out))
    settings = require_model(model_name, tokenizer=config.tokenizer)
    require_fit(settings, model_name, highest=max(highest, tokenizer.pad_token_id or 0), longest=longest)
    model, _ = _load_model(config, model_name)
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
    checkpoints = folder / "checkpoints"
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
        on_step=recorder.on_step,
        ld_alpha=config.ld_alpha,
        use_weighting=config.use_weighting,
    )
    trainer = TrainerWithFlips(
        model,
        _arguments(config, checkpoints, len(train_rows)),
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
        if last is None:
            trainer.evaluate()
        if last is None or not _load_if_finished(trainer, last):
            trainer.train(resume_from_checkpoint=last)
        after = _rewards(trainer.evaluate())
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


def _load_if_finished(trainer: Trainer, checkpoint: str) -> bool:
    """Whether the training had come to its end at this checkpoint, whose weights and step `trainer` then has.

    `Trainer.train` would take one step more.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(checkpoint)
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


def _load_model(config: TrainConfig, name: str) -> tuple[Any, Any]:
    """The model to train and its tokenizer; in float32, since 16-bit weights round the anchor away."""
    model, tokenizer = load_model(name, tokenizer=config.tokenizer, dtype="float32")
    if getattr(model, "is_quantized", False):
        _require_adapters(config)
    if config.lora_r:
        from peft import LoraConfig, get_peft_model

        targets = [part.strip() for part in config.lora_targets.split(",")] if config.lora_targets else None
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=targets,
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    return model, tokenizer


def _arguments(config: TrainConfig, checkpoints: Path, pairs: int) -> TrainingArguments:
    steps = total_steps(config, pairs, ranks.count())
    eval_steps = steps_between_evaluations(config, steps)
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=4 * config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=round(config.warmup_ratio * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_steps=config.save_steps or eval_steps,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        report_to=_trackers(config),
        use_cpu=ranks.count() > 1 and not torch.accelerator.is_available(),  # without it, each would train alone
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def require(config: TrainConfig) -> None:
    """Raise for settings, an environment or a model that cannot be used, before pairs and weights are read.

    Raises:
        ConfigError: a setting cannot be used here; names it.
        ModuleNotFoundError: a library that a setting needs is not installed.
    """
    trackers = get_available_reporting_integrations()
    for name in _trackers(config):
        if name not in ("none", "all", *trackers):
            listed = ", ".join(trackers)
            raise ConfigError(f"report_to={name!r} is no tracker of transformers that is installed: {listed}")
    try:
        arguments = _arguments(config, Path(config.output_dir, "checkpoints"), 1)
        arguments.device  # noqa: B018  # set up now, with the processes
        weight = torch.zeros(1, requires_grad=True)
        get_scheduler(config.scheduler, torch.optim.SGD([weight]), num_warmup_steps=1, num_training_steps=2)
    except (ValueError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if arguments.world_size != ranks.count():
        raise ConfigError(
            f"{ranks.count()} processes were started, which PyTorch makes no group of on {arguments.device}: start one"
        )
    precision = "bf16" if config.bf16 else "no"
    if arguments.mixed_precision != precision:
        raise ConfigError(
            f"accelerate's configuration has mixed_precision {arguments.mixed_precision!r}, and bf16={config.bf16} is "
            f"{precision!r}: let them agree"
        )
    if arguments.n_gpu > 1:
        raise ConfigError(
            f"{arguments.n_gpu} GPUs are visible to one process, and nn.DataParallel is not supported: start it with "
            f"torchrun --nproc_per_node {arguments.n_gpu} -m gapo train ..., or show it one, CUDA_VISIBLE_DEVICES=0"
        )
    if config.lora_r:
        with named_extra("gapo train with lora_r", "hf"):
            import peft  # noqa: F401
    if config.model != "tiny":
        settings = require_model(config.model, tokenizer=config.tokenizer)
        if getattr(settings, "quantization_config", None) is not None:
            _require_adapters(config)


def _trackers(config: TrainConfig) -> list[str]:
    return [name.strip() for name in config.report_to.split(",")]


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
