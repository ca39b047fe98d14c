"""The training loop of `gapo train` where no library's own is at hand: JAX and MLX.

Pairs, their order, schedule, evaluation, logs and checkpoints stand here once; a framework brings a `Trainee`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm

from gapo.config import GAPOConfig
from gapo.data import batches
from gapo.data.collate import REFERENCE, collate_pairs
from gapo.files import JsonLines, read_lines, whole
from gapo.logps import response_lengths
from gapo.metrics import combine, reference_metrics, reward_metrics
from gapo.objectives import LogProbs, without_anchor
from gapo.runs.errors import ConfigError
from gapo.runs.models.pretrained import extent
from gapo.runs.output.tensors import open_tensors
from gapo.runs.ranks import require_one
from gapo.runs.reference_cache import with_kept_reference
from gapo.runs.train.run_data import RunData, step_line, tokenize_rows
from gapo.runs.train.schedule import SHAPES, learning_rate, steps_between_evaluations, total_steps
from gapo.runs.train.train_config import TrainConfig
from gapo.step import StepResult

_TORCH_ONLY = {"lora_r": 0, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "drift": False}


class Trainee(Protocol):
    """A model and its optimiser in some framework. One that has `vocabulary`, an int, gets no token id beyond it."""

    def train_step(
        self, batch: Mapping[str, np.ndarray], learning_rate: float
    ) -> tuple[Mapping[str, Any], StepResult | None]:
        """One micro-batch: metrics, and the step's result where there is an anchor."""

    def logps(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(chosen_logps, rejected_logps) of a batch, each (N,)."""

    def state(self) -> dict[str, np.ndarray]:
        """Weights and optimiser state by name."""

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Back to what `state` gave."""

    def save(self, folder: Path) -> None:
        """The model and its tokenizer, as `save_pretrained` would leave them."""


def require_supported(config: TrainConfig) -> None:
    """Raise ConfigError for settings that only `backend: torch` knows, and for several processes."""
    require_one(f"gapo train with backend {config.backend}")
    for name, default in _TORCH_ONLY.items():
        if getattr(config, name) != default:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} needs backend torch; backend {config.backend} knows {default!r}"
            )
    if config.backend == "mlx" and config.max_grad_norm == 0:
        raise ConfigError("max_grad_norm=0 clips every gradient to 0 with backend mlx: give a large number for none")
    if config.scheduler not in SHAPES:
        raise ConfigError(
            f"scheduler must be one of {', '.join(map(repr, SHAPES))} for backend {config.backend}, "
            f"got {config.scheduler!r}"
        )


def train(
    trainee: Trainee, config: TrainConfig, step: GAPOConfig, data: RunData, tokenizer: Any, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Train; the evaluation before the first step and after the last one. The model is saved in `folder`/model."""
    train_rows, held_out = tokenize_rows(config, data, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    _require_known(trainee, tokenizer, max(extent([*train_rows, *held_out])[0], pad))
    if without_anchor(config.loss, step, config.loss_settings)[0].needs_reference:
        train_rows, held_out = with_kept_reference(
            train_rows,
            held_out,
            lambda batch: _sums(trainee, batch),
            folder / "reference.safetensors",
            pad_token_id=pad,
            batch_size=4 * config.batch_size,
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

    def measure(at: int, bar: Any) -> None:
        row = {"step": at, **evaluate(trainee, held_out, config, step, pad)}
        metrics_log.write(row)
        evaluations.append(row)
        bar.write(
            f"step {at}: held-out reward accuracy {row['eval_rewards/accuracies']:.4f}, "
            f"margin {row['eval_rewards/margins']:.3f}, loss {row['eval_loss']:.4f}"
        )

    try:
        with tqdm(total=total, initial=done, desc=f"training on {config.backend}") as bar:
            if not done:
                measure(0, bar)
            for now in range(done + 1, total + 1):
                rate = learning_rate(config, now - 1, total)
                for _ in range(config.accumulation):
                    batch = next(stream)
                    metrics, result = trainee.train_step(batch, rate)
                    _require_finite(metrics, now, batch["index"], checkpoint)
                    for name, value in metrics.items():
                        window.setdefault(name, []).append((float(value), len(batch["index"])))
                    if result is not None:
                        flipped = [train_rows[i]["is_flipped"] for i in batch["index"]]
                        steps_log.write(step_line(now, result, flipped, batch["index"]))
                bar.update()
                if now % config.logging_steps == 0:
                    means = {name: combine(name, *zip(*values, strict=True)) for name, values in window.items()}
                    metrics_log.write({"step": now, "learning_rate": rate, **means})
                    window.clear()
                if now % every == 0 or now == total:
                    measure(now, bar)
                if now % (config.save_steps or every) == 0 or now == total:
                    _save(trainee, checkpoint, now)
    finally:
        metrics_log.close()
        steps_log.close()
    trainee.save(folder / "model")
    return evaluations[0], evaluations[-1]


def _require_known(trainee: Trainee, tokenizer: Any, highest: int) -> None:
    """Raise for token ids without an embedding: JAX and MLX would take another row, without a word."""
    known = getattr(trainee, "vocabulary", None)
    if known is not None and highest >= known:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} gives the id {highest}, and the model has embeddings of {known} "
            "tokens: use the model's own tokenizer"
        )


def _require_finite(metrics: Mapping[str, Any], step: int, index: np.ndarray, checkpoint: Path) -> None:
    """Raise before anything of this step is kept: a compiled step cannot raise, and has spoiled the weights."""
    for name, value in metrics.items():
        if not math.isfinite(float(value)):
            way = f"The same command goes on from {checkpoint}" if checkpoint.exists() else "No checkpoint was kept yet"
            raise FloatingPointError(
                f"{name} is {float(value)} in step {step}: look at training pairs {index.tolist()} (counted from 0), "
                f"at rho and at the learning rate. {way}"
            )


def evaluate(
    trainee: Trainee, rows: list[dict[str, Any]], config: TrainConfig, step: GAPOConfig, pad_token_id: int
) -> dict[str, float]:
    """The loss without an anchor and TRL's reward metrics of `rows` under "eval_" (method document, step 6).

    A loss that looks at its batch sees one of four times `batch_size`, as in PyTorch.
    """
    objective, settings = without_anchor(config.loss, step, config.loss_settings)
    size = 4 * config.batch_size
    found = []
    for i in range(0, len(rows), size):
        batch = collate_pairs(rows[i : i + size], pad_token_id=pad_token_id, pad_to_multiple_of=32)
        logps = _log_probs(trainee, batch)
        averages, margins = logps.per_token(), logps.log_ratio_margins()
        columns = [objective.losses(logps, **settings), averages.chosen, averages.rejected]
        found.append(np.stack(columns if margins is None else [*columns, margins]))
    losses, chosen, rejected, *log_ratio_margins = np.concatenate(found, axis=-1)
    metrics = {"loss": losses.mean(), **reward_metrics(chosen, rejected, step)}
    if log_ratio_margins:
        metrics |= reference_metrics(log_ratio_margins[0])
    return {f"eval_{name}": float(value) for name, value in metrics.items()}


def _log_probs(trainee: Trainee, batch: Mapping[str, np.ndarray]) -> LogProbs:
    lengths = response_lengths(np.concatenate([batch["chosen_labels"], batch["rejected_labels"]]))
    return LogProbs.from_averages(*trainee.logps(batch), lengths, *(batch.get(name) for name in REFERENCE))


def _sums(trainee: Trainee, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    logps = _log_probs(trainee, batch)
    return logps.chosen, logps.rejected


def _save(trainee: Trainee, path: Path, step: int) -> None:
    """Everything needed to go on, in one file, whole or not at all."""
    from safetensors.numpy import save_file

    with whole(path) as partial:
        save_file(trainee.state(), partial, metadata={"step": json.dumps(step)})


def _restore(trainee: Trainee, path: Path) -> int:
    """Put `trainee` back to the checkpoint, if there is one; the steps it had done."""
    if not path.exists():
        return 0
    with open_tensors(path) as file:
        trainee.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return int(json.loads(file.metadata()["step"]))


def named(prefix: str, leaves: Iterable[Any]) -> dict[str, np.ndarray]:
    """`leaves` as contiguous NumPy arrays under numbered names."""
    return {f"{prefix}.{i:05d}": np.ascontiguousarray(leaf) for i, leaf in enumerate(leaves)}
