"""The step's metrics in mlx-lm's reports.

mlx-lm's training loop passes nothing from a loss to a callback, and compiles the step. The metrics travel in the
module: a compiled step's outputs are its module's state, and a callback reads them there.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback

from gapo._namespace import is_concrete, settled
from gapo.result import StepResult
from gapo.reweighting import Watch
from gapo.rounding import LEAST, MOST, far_from_linear

# The "_" keeps an entry of a module out of its parameters. Training and evaluation have an entry each: a compiled step
# writes the module's state back by position, so that its entries must not change in between.
_TRAIN, _VALID, _WATCH = "_gapo_train", "_gapo_valid", "_gapo_watch"


def detached(result: StepResult) -> StepResult:
    """`result` as arrays without a graph, where values can be read.

    An array that is evaluated while MLX differentiates keeps its whole graph alive, several times the weights.
    """
    figures = {name: settled(x) for name, x in vars(result).items() if x is not None and name != "running"}
    running = result.running and {name: settled(x) for name, x in result.running.items()}
    return replace(result, **figures, running=running)


class RunningStatistics:
    """Where a loss keeps its objective's running statistics from step to step: in the model that it trains.

    Each loss has an entry of its own, since another objective may use the same names, and an entry that has once been
    made stays: a compiled step tells the states of a module apart by their number of arrays.

    Args:
        begin: the statistics to go on from.
    """

    _count = itertools.count()

    def __init__(self, begin: Mapping[str, float] | None) -> None:
        self._begin = {name: float(value) for name, value in (begin or {}).items()}
        self._place = f"_gapo_running_{next(self._count)}"

    def of(self, model: nn.Module) -> Mapping[str, Any]:
        """The statistics as they stand before a step."""
        running: Mapping[str, Any] = model.get(self._place, self._begin)
        return running

    def keep(self, model: nn.Module, running: Mapping[str, mx.array] | None) -> None:
        """Store the statistics after a step, also of a compiled one.

        Raises:
            ValueError: those to go on from are not the objective's.
        """
        if unknown := sorted(self._begin.keys() - (running or {}).keys()):
            raise ValueError(
                f"running names {', '.join(map(repr, unknown))}; the running statistics of this objective are "
                f"{', '.join(map(repr, running or ())) or 'none'}"
            )
        if running:
            model[self._place] = {name: mx.stop_gradient(value) for name, value in running.items()}


def keep_training(model: nn.Module, metrics: Mapping[str, mx.array], watch: Watch | None = None) -> list[mx.array]:
    """Store a batch's metrics for `last_metrics`, also from a compiled step, and return the stored arrays.

    `watch` judges the weights in the reports of `MetricsCallback`.
    """
    vars(model)[_WATCH] = watch
    model[_TRAIN] = {name: mx.stop_gradient(value) for name, value in metrics.items()}
    return list(model[_TRAIN].values())


def keep_evaluation(model: nn.Module, metrics: Mapping[str, mx.array], pairs: int) -> None:
    """Add the metrics of a batch to those of its evaluation.

    An evaluation ends when the weights change, or when its metrics are read.

    Args:
        model: the model, where the metrics are stored.
        metrics: scalars, each a mean over the batch.
        pairs: the number of pairs in the batch.
    """
    if not is_concrete(next(iter(metrics.values()))):
        model[_VALID] = dict(metrics)
        return
    model.pop(_VALID, None)
    weights = [x for _, x in tree_flatten(model.trainable_parameters())]
    stamp = min(weights, key=lambda x: x.size, default=None)  # an optimiser replaces each array that it updates
    window = vars(model).get(_VALID)
    if window is None or window.was_read or window.stamp is not stamp:
        window = vars(model)[_VALID] = _Evaluation(stamp)
    window.add({name: float(value) for name, value in metrics.items()}, pairs)


class _Evaluation:
    """Sums over the pairs of an evaluation; `stamp` is an array that identifies the weights."""

    def __init__(self, stamp: mx.array | None) -> None:
        self.stamp, self.was_read = stamp, False
        self._sums: dict[str, float] = {}
        self._pairs = 0

    def add(self, metrics: Mapping[str, float], pairs: int) -> None:
        self._pairs += pairs
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + pairs * value

    def means(self) -> dict[str, float]:
        self.was_read = True
        return {name: value / self._pairs for name, value in self._sums.items()}


def last_metrics(model: nn.Module, evaluation: bool = False) -> dict[str, float]:
    """Metrics of the last batch that a loss of `make_loss` computed on `model`; empty if there was none.

    Args:
        model: the model that the loss was called on.
        evaluation: False for the last training batch. True for means over the pairs of the last evaluation: all batches
            since the weights changed or the metrics were last read.

    Raises:
        RuntimeError: the step was compiled, and the model's state is not among its outputs.
    """
    place = _VALID if evaluation else _TRAIN
    window = vars(model).get(place)
    if isinstance(window, _Evaluation) and place not in model:
        return window.means()
    try:
        return {name: float(value) for name, value in model.get(place, {}).items()}
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            "the metrics of a compiled step are not known outside it: make the model's state an output, "
            "mx.compile(step, inputs=state, outputs=state) with model.state among `state`"
        ) from error


class MetricsCallback(TrainingCallback):
    """Adds the step's metrics, under TRL's keys and "gapo/", to mlx-lm's reports.

    Args:
        model: the model that trains.
        then: another `TrainingCallback` to call with the completed reports, such as mlx-lm's `WandBCallback`. The
            reverse does not work: `WandBCallback(wrapped_callback=MetricsCallback(...))` logs before it calls this one.

    Attributes:
        train, valid: the completed reports so far.

    Raises:
        ValueError: the model has no trainable parameter.

    Warns:
        UserWarning: a tracker wraps this callback, and logs without the metrics.
        RuntimeWarning: once, when a report's `first_order_ratio` lies outside [0.5, 2].
    """

    def __init__(self, model: nn.Module, then: TrainingCallback | None = None) -> None:
        if not tree_flatten(model.trainable_parameters()):
            raise ValueError(
                "the model has no trainable parameter (all are frozen): unfreeze some, or add adapters with "
                "mlx_lm.tuner.utils.linear_to_lora_layers"
            )
        self._model, self._then = model, then
        self._warned: set[str] = set()
        self.train: list[dict[str, Any]] = []
        self.valid: list[dict[str, Any]] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._complete(train_info, last_metrics(self._model), sys._getframe(1).f_locals.get("self"))
        ratio = train_info.get("gapo/first_order_ratio", 1.0)
        if "ratio" not in self._warned and not LEAST <= ratio <= MOST:
            self._warned.add("ratio")  # a compiled step cannot warn of it itself
            warnings.warn(far_from_linear(ratio), RuntimeWarning, stacklevel=2)
        if (watch := vars(self._model).get(_WATCH)) is not None:
            watch.see(train_info)
        self.train.append(train_info)
        if self._then is not None:
            self._then.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self._complete(val_info, last_metrics(self._model, evaluation=True), sys._getframe(1).f_locals.get("self"))
        self.valid.append(val_info)
        if self._then is not None:
            self._then.on_val_loss_report(val_info)

    def _complete(self, info: dict[str, Any], metrics: dict[str, float], caller: Any) -> None:
        late = getattr(caller, "wrapped_callback", None) is self and not metrics.keys() <= info.keys()
        info.update(metrics)
        if late and "order" not in self._warned:
            self._warned.add("order")
            name = type(caller).__name__
            warnings.warn(
                f"{name} logs before the callback that it wraps, so that the metrics of MetricsCallback do not reach "
                f"it: turn them round, MetricsCallback(model, then={name}(...))",
                UserWarning,
                stacklevel=3,
            )
