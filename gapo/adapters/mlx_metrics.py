"""The step's metrics in mlx-lm's reports: where they are kept between the loss and the callback."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback

from gapo._namespace import is_concrete
from gapo.rounding import LEAST, MOST, far_from_linear
from gapo.step import StepResult

# Metrics stand in the module, whose state mlx-lm's compiled step hands out; "_" keeps them from the parameters.
# Training and evaluation have a place each, since the compiled step writes its outputs back by position.
_TRAIN, _VALID = "_gapo_train", "_gapo_valid"


def detached(result: StepResult) -> StepResult:
    """`result` in arrays of its own where values can be read.

    What is evaluated while MLX differentiates keeps all that it was made of, several times the weights.
    """
    if not is_concrete(result.loss):
        return result
    fields = {name: x for name, x in vars(result).items() if x is not None}
    return replace(result, **{name: mx.array(x.tolist(), x.dtype) for name, x in fields.items()})


def keep_training(model: nn.Module, metrics: Mapping[str, mx.array]) -> list[mx.array]:
    """Put a batch's metrics where `last_metrics` finds them, also from a compiled step; returns those arrays."""
    model[_TRAIN] = {name: mx.stop_gradient(value) for name, value in metrics.items()}
    return list(model[_TRAIN].values())


def keep_evaluation(model: nn.Module, metrics: Mapping[str, mx.array], pairs: int) -> None:
    """Add those of a batch of `pairs` to this evaluation's: of the same weights, and not asked for yet."""
    if not is_concrete(next(iter(metrics.values()))):
        model[_VALID] = dict(metrics)
        return
    model.pop(_VALID, None)
    weights = [x for _, x in tree_flatten(model.trainable_parameters())]
    stamp = min(weights, key=lambda x: x.size, default=None)  # training replaces it
    window = vars(model).get(_VALID)
    if window is None or window.asked or window.stamp is not stamp:
        window = vars(model)[_VALID] = _Evaluation(stamp)
    window.add({name: float(value) for name, value in metrics.items()}, pairs)


class _Evaluation:
    """Sums over the pairs of an evaluation."""

    def __init__(self, stamp: mx.array | None) -> None:
        self.stamp, self.asked = stamp, False
        self._sums: dict[str, float] = {}
        self._pairs = 0

    def add(self, metrics: Mapping[str, float], pairs: int) -> None:
        self._pairs += pairs
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + pairs * value

    def means(self) -> dict[str, float]:
        self.asked = True
        return {name: value / self._pairs for name, value in self._sums.items()}


def last_metrics(model: nn.Module, evaluation: bool = False) -> dict[str, float]:
    """Metrics of the last training batch that a loss of `make_loss` saw on `model`; else empty.

    With `evaluation`, means over the pairs of the last evaluation: all batches since the weights changed or the metrics
    were last asked for.

    Raises:
        RuntimeError: the step was compiled without handing out the model's state.
    """
    place = _VALID if evaluation else _TRAIN
    window = vars(model).get(place)
    if isinstance(window, _Evaluation) and place not in model:
        return window.means()
    try:
        return {name: float(value) for name, value in model.get(place, {}).items()}
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            "the metrics of a compiled step are not known outside it: hand out the model's state, "
            "mx.compile(step, inputs=state, outputs=state) with model.state among `state`"
        ) from error


class MetricsCallback(TrainingCallback):
    """Adds the step's metrics, under TRL's keys and "gapo/", to what mlx-lm reports, and passes it on.

    Args:
        model: the model that trains.
        then: another `TrainingCallback` to call with the completed reports, such as mlx-lm's `WandBCallback`. Not the
            other way round: `WandBCallback(wrapped_callback=MetricsCallback(...))` logs before it calls this one.

    Attributes:
        train, valid: the completed reports so far.

    Raises:
        ValueError: the model has no trainable parameter.
    """

    def __init__(self, model: nn.Module, then: TrainingCallback | None = None) -> None:
        if not tree_flatten(model.trainable_parameters()):
            raise ValueError(
                "the model has no trainable parameter (all are frozen): unfreeze some, or add adapters with "
                "mlx_lm.tuner.utils.linear_to_lora_layers"
            )
        self._model, self._then = model, then
        self._warned = self._told = False
        self.train: list[dict[str, Any]] = []
        self.valid: list[dict[str, Any]] = []

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._complete(train_info, last_metrics(self._model), sys._getframe(1).f_locals.get("self"))
        ratio = train_info.get("gapo/first_order_ratio", 1.0)
        if not self._told and not LEAST <= ratio <= MOST:
            self._told = True  # mx.compile's step cannot say it itself
            warnings.warn(far_from_linear(ratio), RuntimeWarning, stacklevel=2)
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
        if late and not self._warned:
            self._warned = True
            name = type(caller).__name__
            warnings.warn(
                f"{name} logs before the callback that it wraps, so that the metrics of MetricsCallback do not reach "
                f"it: turn them round, MetricsCallback(model, then={name}(...))",
                UserWarning,
                stacklevel=3,
            )
