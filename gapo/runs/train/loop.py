"""The training loop of `gapo train` on JAX and MLX, which have no Trainer of their own.

Order of the pairs, schedule, evaluation, logs and checkpoints are written here once. A framework adds a `Trainee`: a
model, its optimiser, and one micro-batch. A checkpoint is one file that replaces the one before; after an interruption
the logs are cut back to it, and the stream of batches, which is seeded, skips those that it has seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from gapo.config import GAPOConfig
from gapo.data import batches
from gapo.data.collate import collate_pairs, padding_multiple
from gapo.files import JsonLines, read_lines, whole
from gapo.logp_options import LogpOptions
from gapo.metrics import combine, evaluation_columns, evaluation_metrics
from gapo.objectives import LogProbs, Loss
from gapo.objectives.loss import warn_of_scale
from gapo.pairs import BatchConstants
from gapo.runs.errors import ConfigError
from gapo.runs.held_out import Rows
from gapo.runs.models.pretrained import extent
from gapo.runs.output.tensors import open_tensors
from gapo.runs.ranks import require_one
from gapo.runs.reference_cache import with_kept_reference
from gapo.runs.train.loss_option import loss_of
from gapo.runs.train.model_options import ModelOptions
from gapo.runs.train.run_data import RunData, step_line, tokenize_rows
from gapo.runs.train.schedule import SHAPES, learning_rate, steps_between_evaluations, total_steps
from gapo.runs.train.train_config import TrainConfig
from gapo.step import StepResult

_TORCH_ONLY = (
    *(f.name for f in fields(ModelOptions) if f.name not in ("model", "tokenizer")),
    *("bf16", "gradient_checkpointing", "report_to", "drift"),
)
_RUNNING = "running statistic "  # before its name in a checkpoint; no array of a trainee is called so


class Trainee(Protocol):
    """A model and its optimiser in some framework. Its attribute `vocabulary`, if any, is its number of embeddings."""

    def train_step(self, batch: Mapping[str, np.ndarray], learning_rate: float) -> tuple[Mapping[str, Any], StepResult]:
        """One micro-batch: metrics, and the step's result, whose running statistics the next one goes on from."""

    def measured(self, batch: Mapping[str, np.ndarray]) -> tuple[tuple[Any, Any], Any]:
        """((chosen_logps, rejected_logps), weights of the pairs or None) of a batch, by the run's `logp_options`.

        Arrays (N,) of the framework, nats per token.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Weights and optimiser state by name."""

    def restore(self, arrays: dict[str, np.ndarray], running: Mapping[str, np.ndarray]) -> None:
        """Set weights and optimiser state to those of an earlier `state`, and the objective's running statistics."""

    def save(self, folder: Path) -> None:
        """The model and its tokenizer, as `save_pretrained` would leave them."""


def require_supported(config: TrainConfig, step_config: GAPOConfig) -> TrainConfig:
    """The run with 16-bit compute and checkpointing off, which this loop does not have.

    Raises:
        ConfigError: a setting that only `backend: torch` has is set, or there are several processes.
    """
    require_one(f"gapo train with backend {config.backend}")
    torch_only = {name: getattr(config, name) for name in _TORCH_ONLY} | config.training_arguments
    defaults = {f.name: f.default for f in fields(config)}
    for name, value in torch_only.items():
        unset = name in defaults and (value == defaults[name] or (value is False and defaults[name] is None))
        if not unset:
            raise ConfigError(f"{name}={value!r} needs backend torch: leave it out with backend {config.backend}")
    if config.backend == "mlx" and config.max_grad_norm == 0:
        raise ConfigError("max_grad_norm=0 clips every gradient to 0 with backend mlx: give a large number for none")
    if config.scheduler not in SHAPES:
        raise ConfigError(
            f"scheduler must be one of {', '.join(map(repr, SHAPES))} for backend {config.backend}, "
            f"got {config.scheduler!r}"
        )
    warn_of_scale(loss_of(config.loss, step_config, config.loss_settings))
    return replace(config, bf16=False, gradient_checkpointing=False)


def train(
    trainee: Trainee, config: TrainConfig, step_config: GAPOConfig, data: RunData, tokenizer: Any, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Train; the evaluation before the first step and after the last one. The model is saved in `folder`/model."""
    train_rows, held_out = tokenize_rows(config, data, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    _require_known(trainee, tokenizer, max(extent(train_rows, held_out)[0], pad))
    loss = loss_of(config.loss, step_config, config.loss_settings)
    if loss.needs_reference:
        train_rows, held_out = with_kept_reference(
            train_rows,
            held_out,
            lambda batch: _sums(trainee, batch, config.logp_options),
            folder / "reference.safetensors",
            pad_token_id=pad,
            batch_size=4 * config.batch_size,
            ld_alpha=config.ld_alpha,
        )
    total = total_steps(config, len(train_rows))
    every = steps_between_evaluations(config, total)
    checkpoint = folder / "checkpoints" / "state.safetensors"
    if config.overwrite:
        checkpoint.unlink(missing_ok=True)
    done = _restore(trainee, checkpoint) if config.resume else 0
    metrics_log, steps_log = (
        JsonLines(folder / name, until_step=done or -1) for name in ("metrics.jsonl", "steps.jsonl")
    )
    stream = batches(
        train_rows, config.batch_size, pad_token_id=pad, seed=config.seed, epochs=None, skip=done * config.accumulation
    )
    evaluations = [row for row in read_lines(folder / "metrics.jsonl") if "eval_loss" in row]
    window: dict[str, list[tuple[float, int]]] = {}  # of each metric: its value in a micro-batch of so many pairs

    def measure(number: int, bar: Any) -> None:
        row = {"step": number, **evaluate(trainee, held_out, config, step_config, loss, pad)}
        metrics_log.write(row)
        evaluations.append(row)
        bar.write(
            f"step {number}: held-out reward accuracy {row['eval_rewards/accuracies']:.4f}, "
            f"margin {row['eval_rewards/margins']:.3f}, loss {row['eval_loss']:.4f}"
        )

    try:
        with tqdm(total=total, initial=done, desc=f"training on {config.backend}") as bar:
            if not done:
                measure(0, bar)
            for number in range(done + 1, total + 1):
                rate = learning_rate(config, number - 1, total)
                for _ in range(config.accumulation):
                    batch = next(stream)
                    metrics, result = trainee.train_step(batch, rate)
                    _require_finite(metrics, number, batch["index"], checkpoint)
                    for name, value in metrics.items():
                        window.setdefault(name, []).append((float(value), len(batch["index"])))
                    flipped = [train_rows[i]["is_flipped"] for i in batch["index"]]
                    steps_log.write(step_line(number, result, flipped, batch["index"]))
                bar.update()
                if number % config.logging_steps == 0:
                    means = {name: combine(name, *zip(*values, strict=True)) for name, values in window.items()}
                    metrics_log.write({"step": number, "learning_rate": rate, **means})
                    window.clear()
                if number % every == 0 or number == total:
                    measure(number, bar)
                if number % (config.save_steps or every) == 0 or number == total:
                    _save(trainee, checkpoint, number, result)
    finally:
        metrics_log.close()
        steps_log.close()
    trainee.save(folder / "model")
    return evaluations[0], evaluations[-1]


def _require_known(trainee: Trainee, tokenizer: Any, highest: int) -> None:
    """Raise for token ids without an embedding: JAX and MLX would silently take another row."""
    vocabulary = getattr(trainee, "vocabulary", None)
    if vocabulary is not None and highest >= vocabulary:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} gives the id {highest}, and the model has embeddings of {vocabulary}"
            " tokens: use the model's own tokenizer"
        )


def _require_finite(metrics: Mapping[str, Any], step: int, index: np.ndarray, checkpoint: Path) -> None:
    """Raise before anything of this step is saved: a compiled step cannot raise, and has spoiled the weights."""
    for name, value in metrics.items():
        if not math.isfinite(float(value)):
            way = (
                f"The same command goes on from {checkpoint}" if checkpoint.exists() else "No checkpoint was saved yet"
            )
            raise FloatingPointError(
                f"{name} is {float(value)} in step {step}: look at training pairs {index.tolist()} (counted from 0), "
                f"at rho and at the learning rate. {way}"
            )


def evaluate(
    trainee: Trainee, rows: Rows, config: TrainConfig, step_config: GAPOConfig, loss: Loss, pad_token_id: int
) -> dict[str, float]:
    """The loss without an anchor and TRL's reward metrics of `rows` under "eval_" (method document, step 6).

    A loss that looks at its batch sees one of four times `batch_size`, as in PyTorch.
    """
    size, multiple = 4 * config.batch_size, padding_multiple(rows)
    parts = []
    for i in range(0, len(rows), size):
        batch = collate_pairs(rows[i : i + size], pad_token_id=pad_token_id, pad_to_multiple_of=multiple)
        columns = evaluation_columns(loss, *_log_probs(trainee, batch, config.logp_options))
        parts.append({name: np.asarray(column) for name, column in columns.items()})
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {f"eval_{name}": float(value) for name, value in evaluation_metrics(every, step_config).items()}


def _log_probs(trainee: Trainee, batch: Mapping[str, np.ndarray], options: LogpOptions) -> tuple[LogProbs, Any]:
    """The batch's log-probabilities, and the weights of its pairs or None."""
    constants = BatchConstants.of(options.checked(batch))
    logps, weights = trainee.measured(batch)
    return LogProbs.of_step(logps, constants), weights


def _sums(trainee: Trainee, batch: Mapping[str, np.ndarray], options: LogpOptions) -> tuple[np.ndarray, np.ndarray]:
    logps, _ = _log_probs(trainee, batch, options)
    return np.asarray(logps.chosen), np.asarray(logps.rejected)


def _save(trainee: Trainee, path: Path, step: int, result: StepResult) -> None:
    """Everything that a resumed run needs, in one file, atomically."""
    from safetensors.numpy import save_file

    running = {f"{_RUNNING}{name}": np.array(value) for name, value in (result.running or {}).items()}
    with whole(path) as partial:
        save_file(trainee.state() | running, partial, metadata={"step": json.dumps(step)})


def _restore(trainee: Trainee, path: Path) -> int:
    """Restore `trainee` from the checkpoint, if there is one; returns the number of steps that it had taken."""
    if not path.exists():
        return 0
    with open_tensors(path) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = [name for name in arrays if name.startswith(_RUNNING)]
        running = {name.removeprefix(_RUNNING): arrays.pop(name) for name in names}
        trainee.restore(arrays, running)
        return int(json.loads(file.metadata()["step"]))


def named(prefix: str, leaves: Iterable[Any]) -> dict[str, np.ndarray]:
    """`leaves` as contiguous NumPy arrays under numbered names."""
    return {f"{prefix}.{i:05d}": np.ascontiguousarray(leaf) for i, leaf in enumerate(leaves)}
