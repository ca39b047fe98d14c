"""The PyTorch loop of `gapo train`: a plain Hugging Face `Trainer` with `GAPOCallback`."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from gapo.adapters.hf import DriftCallback, GAPOCallback, PreferenceCollator
from gapo.adapters.hf.checkpoints import last_whole_checkpoint
from gapo.adapters.hf.reference import summed_logps
from gapo.config import GAPOConfig
from gapo.data.writing import cannot_write, write_errors
from gapo.experiments.config import ConfigError, TrainConfig
from gapo.experiments.files import JsonLines, read_lines
from gapo.experiments.pretrained import load_model
from gapo.experiments.records import RunData, step_row, tokenize_rows
from gapo.experiments.reference import with_kept_reference
from gapo.objectives import without_anchor
from gapo.step import StepResult


def run(
    config: TrainConfig, step: GAPOConfig, data: RunData, model_name: str, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Train; the evaluation before the first step and after the last one. The model is saved in `folder`/model."""
    model, tokenizer = _load_model(config, model_name)
    collator = PreferenceCollator(tokenizer, max_length=config.max_length)
    flipped = PreferenceCollator(tokenizer, max_length=config.max_length, keep=("is_flipped",))
    train_rows, held_out = tokenize_rows(config, data, tokenizer)
    if without_anchor(config.loss, step, config.loss_settings)[0].needs_reference:
        train_rows, held_out = with_kept_reference(
            train_rows,
            held_out,
            partial(summed_logps, model),
            folder / "reference.safetensors",
            pad_token_id=0,  # padding never counts
            batch_size=4 * config.batch_size,
        )
    checkpoints = folder / "checkpoints"
    if config.overwrite:
        shutil.rmtree(checkpoints, ignore_errors=True)
    last = last_whole_checkpoint(checkpoints) if config.resume else None
    drift = _drift(config)
    recorder = _Recorder(folder, until_step=int(last.rsplit("-", 1)[1]) if last else -1)
    callback = GAPOCallback(
        step, objective=config.loss, objective_settings=config.loss_settings, on_step=recorder.on_step
    )
    trainer = _TrainerWithFlips(
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
    trainer.add_callback(_Progress())
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
    with _told(folder / "model"):
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
    if getattr(model, "is_quantized", False) and not config.lora_r:
        raise ConfigError(
            f"model {name!r} is quantised, and such weights cannot be trained: train adapters, --lora_r 16"
        )
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
    steps = config.max_steps
    if steps < 0:
        steps = max(1, int(config.epochs * -(-pairs // (config.batch_size * config.accumulation))))
    eval_steps = config.eval_steps or max(1, steps // 10)
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
        report_to=config.report_to.split(","),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
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


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of writing as one that names `path`. Those of PyTorch are RuntimeErrors."""
    errors: tuple[type[Exception], ...] = (*write_errors(), RuntimeError)
    try:
        yield
    except errors as error:
        raise cannot_write(path, error) from error


class _TrainerWithFlips(Trainer):
    """A plain Trainer, but that its training batches also carry "is_flipped", and no half checkpoint is left."""

    data_collator: Any
    train_collator: Any = None

    def get_train_dataloader(self) -> Any:
        plain, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        try:
            with _told(folder):
                super()._save_checkpoint(*args, **kwargs)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


class _Progress(ProgressCallback):
    """The Trainer's progress bars, with one line for each evaluation instead of every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "eval_loss" in logs:
            text = f"step {state.global_step}: held-out reward accuracy {logs['eval_rewards/accuracies']:.4f}"
            line = f"{text}, margin {logs['eval_rewards/margins']:.3f}, loss {logs['eval_loss']:.4f}"
            if self.training_bar is not None:
                self.training_bar.write(line)
            else:
                print(line, flush=True)


class _Recorder(TrainerCallback):
    """Writes metrics.jsonl (each log) and steps.jsonl (each micro-batch's gaps and weights) while the run goes on."""

    def __init__(self, folder: Path, until_step: int) -> None:
        self._metrics = JsonLines(folder / "metrics.jsonl", until_step)
        self._steps = JsonLines(folder / "steps.jsonl", until_step)
        self._step = 0
        evaluations = [row for row in read_lines(folder / "metrics.jsonl") if "eval_loss" in row]
        self.first_evaluation: dict[str, float] = evaluations[0] if evaluations else {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step + 1

    def on_step(self, result: StepResult | None, batch: dict[str, Any]) -> None:
        """One line for a micro-batch, in the order of its pairs."""
        if result is not None:
            self._steps.write(step_row(self._step, result, batch["is_flipped"].tolist()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        row = {"step": state.global_step, **(logs or {})}
        if "eval_loss" in row and not self.first_evaluation:
            self.first_evaluation = row
        self._metrics.write(row)

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._steps.close()
