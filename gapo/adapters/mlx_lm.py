"""GAPO in MLX-LM: a loss and batches for `mlx_lm.tuner.trainer.train`, unchanged, full or LoRA.

`train(model, optimizer, pairs, valid, args, loss=make_loss(config), iterate_batches=iterate_batches)`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gapo
from gapo._extras import missing

try:
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tuner.callbacks import TrainingCallback
except ModuleNotFoundError as error:
    raise missing("gapo.adapters.mlx_lm", "mlx-lm", error) from error

from gapo.backends.mlx import MlxBackend, MlxForward
from gapo.config import GAPOConfig, step_settings
from gapo.data import batches, read_pairs, tokenize_pair
from gapo.data.collate import REFERENCE, TOKENIZED
from gapo.data.reference import require_reference
from gapo.logps import response_lengths
from gapo.metrics import pair_metrics, step_metrics
from gapo.objectives import LogProbs, without_anchor
from gapo.rounding import LEAST, MOST, far_from_linear
from gapo.step import StepResult, run

# Metrics stand in the module, whose state mlx-lm's compiled step hands out; "_" keeps them from the parameters.
# Training and evaluation have a place each, since the compiled step writes its outputs back by position.
_TRAIN, _VALID = "_gapo_train", "_gapo_valid"
_PAD_TO = 32


def make_loss(
    config: GAPOConfig | None = None,
    *,
    objective: str = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
    on_step: Callable[[StepResult], None] | None = None,
) -> Callable[..., tuple[mx.array, mx.array]]:
    """A loss for `mlx_lm.tuner.trainer.train` and `evaluate`: `loss(model, *batch) -> (scalar, count)`.

    In training (`model.training`) it is the GAPO step of the batch, and the count its answers' tokens. In evaluation it
    is the probe loss, or another objective's own, without an anchor, and the count its pairs, over which mlx-lm
    averages.

    Args:
        config: settings of the step; None for the defaults.
        objective: "gapo"; "simpo" for the control on the probe loss; or another name of `gapo.objectives.OBJECTIVES`.
            Those that compare with a reference need its log-probabilities, which `iterate_batches` hands over where the
            rows have them (`gapo.data.with_reference_logps`).
        objective_settings: settings of the other objectives, such as {"beta": 0.1}; None for their defaults. "gapo" and
            "simpo" take theirs from `config`.
        on_step: called with each step's result; not under `mx.compile`, which would call it once.

    Raises:
        ValueError: an unknown objective, or settings that are not its own. From the loss: no reference where one is
            needed; dropout together with mlx-lm's `grad_checkpoint`, whose
            gradients are wrong for any loss, since the recomputed forward draws other masks.

    Source: method document, "The step".
    """
    config = step_settings(config, objective, objective_settings)
    backend = MlxBackend()
    other, settings = without_anchor(objective, config, objective_settings)

    def loss(
        model: nn.Module, ids: mx.array, labels: mx.array, reference: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        if not model.training or objective != "gapo":
            if other.needs_reference:
                require_reference(other.name, () if reference is None else REFERENCE)
            logps = LogProbs.from_averages(
                *pair_logps(model, (ids, labels)), response_lengths(labels), *(() if reference is None else reference)
            )
            metrics = pair_metrics(logps, config)
            model[_TRAIN if model.training else _VALID] = {k: mx.stop_gradient(v) for k, v in metrics.items()}
            count = mx.sum(labels != -100) if model.training else mx.array(len(logps.chosen))
            return mx.mean(other.losses(logps, **settings)), count
        _refuse_checkpointed_dropout(model)
        # `trainable_parameters` are the tracers of the caller's gradient here: the clean forward is the one it goes
        # back through, and the step's cotangents, constants to it, make the loss's gradient the step's.
        forward = MlxForward(pair_logps, model, (ids, labels))
        result, cotangents = run(forward, config, backend)
        pulls = [mx.sum(mx.stop_gradient(c) * y) for c, y in zip(cotangents, forward.outputs, strict=True)]
        pull = pulls[0] + pulls[1]
        model[_TRAIN] = {name: mx.stop_gradient(value) for name, value in step_metrics(result, config).items()}
        if on_step is not None:
            on_step(result)
        value = mx.stop_gradient(result.loss) + (pull - mx.stop_gradient(pull))
        return value, mx.sum(labels != -100)

    return loss


loss = make_loss()


def pair_logps(model: nn.Module, batch: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """(chosen_logps, rejected_logps), each (N,), of (ids, labels), each (2N, seq): chosen rows, then rejected ones."""
    ids, labels = batch
    logps = gapo.sequence_logps(model(ids), labels)
    half = logps.shape[0] // 2
    return logps[:half], logps[half:]


def load_pairs(
    folder: str | Path, tokenizer: Any, *, max_length: int = 2048, strict: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tokenised pairs of a folder in mlx-lm's convention, `train.jsonl` and `valid.jsonl` (none: an empty list).

    Args:
        folder: where the files lie; rows have "prompt", "chosen", "rejected", text or messages.
        tokenizer: mlx-lm's or a `transformers` one.
        max_length: most tokens of prompt and answer; pass it on as `TrainingArgs.max_seq_length`.
        strict: stop at the first bad row instead of leaving it out.

    Raises:
        gapo.data.PairError: `train.jsonl` is missing, or a file holds no pair.
    """
    plain = tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer
    found = []
    for name in ("train.jsonl", "valid.jsonl"):
        path = Path(folder) / name
        rows = read_pairs(path, strict=strict).rows if path.exists() or name == "train.jsonl" else []
        found.append([tokenize_pair(row, plain, max_length=max_length) for row in rows])
    return found[0], found[1]


def iterate_batches(
    dataset: Sequence[dict[str, Any]],
    batch_size: int,
    max_seq_length: int,
    loop: bool = False,
    seed: int | None = None,
    comm_group: Any = None,
) -> Iterator[tuple[mx.array, ...]]:
    """Batches of (ids, labels), each (2N, seq), chosen rows first; mlx-lm's signature and sharding over ranks.

    Where the rows have reference log-probabilities a third array follows, (2, N): of the chosen and rejected responses.

    Args:
        dataset: rows of `load_pairs` or `gapo.data.tokenize_pair`.
        batch_size: pairs in a batch, over all ranks together: they share one anchor.
        max_seq_length: longest row that is accepted.
        loop: go on for ever, shuffled anew each time.
        seed: of the shuffling; None for 0.
        comm_group: an `mx.distributed` group, each of whose ranks gets its share of each batch.

    Raises:
        ValueError: too few pairs, a row that is too long, or a batch that does not divide among the ranks.
    """
    rank, size = (comm_group.rank(), comm_group.size()) if comm_group is not None else (0, 1)
    if batch_size % size:
        raise ValueError(f"batch_size={batch_size} pairs cannot be divided among {size} ranks")
    longest = max((len(row[name]) for row in dataset for name in TOKENIZED), default=0)
    if longest > max_seq_length:
        raise ValueError(
            f"a row has {longest} tokens, more than max_seq_length={max_seq_length}: pass "
            f"max_length={max_seq_length} to "
            "load_pairs or tokenize_pair, which cut the prompt first"
        )
    made = batches(
        dataset,
        batch_size,
        pad_token_id=0,  # never counted
        seed=seed or 0,
        epochs=None if loop else 1,
        drop_last=True,
        pad_to_multiple_of=_PAD_TO,
    )
    for batch in made:
        parts = [
            [batch[f"{side}_{part}"][rank::size] for side in ("chosen", "rejected")] for part in ("input_ids", "labels")
        ]
        ids, labels = (mx.concatenate([mx.array(side) for side in sides]) for sides in parts)
        reference = [batch[name][rank::size] for name in REFERENCE if name in batch]
        yield (ids, labels, mx.array(np.stack(reference))) if reference else (ids, labels)


class MetricsCallback(TrainingCallback):
    """Adds the step's metrics, under TRL's keys and "gapo/", to what mlx-lm reports, and passes it on.

    Args:
        model: the model that trains.
        then: another `TrainingCallback` to call with the completed reports.

    Attributes:
        train, valid: the completed reports so far.
    """

    def __init__(self, model: nn.Module, then: TrainingCallback | None = None) -> None:
        self._model, self._then, self._told = model, then, False
        self.train: list[dict[str, Any]] = []
        self.valid: list[dict[str, Any]] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        train_info.update(last_metrics(self._model))
        ratio = train_info.get("gapo/first_order_ratio", 1.0)
        if not self._told and not LEAST <= ratio <= MOST:
            self._told = True  # mx.compile's step cannot say it itself
            warnings.warn(far_from_linear(ratio), RuntimeWarning, stacklevel=2)
        self.train.append(train_info)
        if self._then is not None:
            self._then.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        val_info.update(last_metrics(self._model, evaluation=True))
        self.valid.append(val_info)
        if self._then is not None:
            self._then.on_val_loss_report(val_info)


def last_metrics(model: nn.Module, evaluation: bool = False) -> dict[str, float]:
    """Metrics of the last batch that a loss of `make_loss` saw on `model` in training, or in evaluation; else empty."""
    return {name: float(value) for name, value in model.get(_VALID if evaluation else _TRAIN, {}).items()}


def _refuse_checkpointed_dropout(model: nn.Module) -> None:
    drops = any(isinstance(m, nn.Dropout) and m._p_1 < 1 for m in model.modules())
    checkpointed = any(type(m).__call__.__name__ == "checkpointed_fn" for m in model.modules())
    if drops and checkpointed:
        raise ValueError(
            "grad_checkpoint draws other dropout masks when it recomputes, and gradients come out wrong: set "
            "dropout to 0 "
            "(lora_parameters: dropout), or grad_checkpoint to False"
        )


__all__ = ["MetricsCallback", "iterate_batches", "last_metrics", "load_pairs", "loss", "make_loss", "pair_logps"]
