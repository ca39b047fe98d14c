"""GAPO in MLX-LM: a loss and batches for `mlx_lm.tuner.trainer.train` as it is, full or LoRA.

`train(model, optimizer, pairs, valid, args, loss=make_loss(config), iterate_batches=iterate_batches)`

mlx-lm differentiates the loss itself. The loss therefore runs the step on the clean forward, and returns its value as a
scalar with the step's gradient behind it: one that the step has computed already, or, where it propagates anew, a
scalar that is linear in the forward's outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from gapo._extras import missing

try:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    from gapo.adapters.mlx_metrics import (
        MetricsCallback,
        RunningStatistics,
        detached,
        keep_evaluation,
        keep_training,
        last_metrics,
    )
    from gapo.adapters.mlx_pairs import as_arrays, iterate_batches, load_pairs, require_pairs, require_right_padding
except ModuleNotFoundError as error:
    raise missing("gapo.adapters.mlx_lm", "mlx-lm", error) from error

from gapo._namespace import is_concrete
from gapo.backends.mlx import MlxBackend
from gapo.columns import REFERENCE_ALPHA
from gapo.config import GAPOConfig, step_settings
from gapo.data.tokenize import IGNORE_INDEX
from gapo.logp_options import LogpOptions, PairLogps
from gapo.logps import response_lengths
from gapo.metrics import evaluation_columns, evaluation_metrics, step_metrics
from gapo.objectives import Objective, resolve
from gapo.pairs import REFERENCE, BatchConstants, LogProbs, halves, require_reference
from gapo.result import StepResult
from gapo.reweighting import Watch
from gapo.step import run


def make_loss(
    config: GAPOConfig | None = None,
    *,
    objective: str | Objective | Callable[[LogProbs], mx.array] = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    on_step: Callable[[StepResult], None] | None = None,
    running: Mapping[str, float] | None = None,
) -> Callable[..., tuple[mx.array, mx.array]]:
    """A loss for `mlx_lm.tuner.trainer.train` and `evaluate`: `loss(model, *batch) -> (scalar, count)`.

    In training (`model.training`) it is the step's loss on the batch, and the count its answers' tokens. In evaluation
    it has no anchor and no SFT term, and the count is the pairs, over which mlx-lm averages. An objective with an
    anchor is evaluated by the probe's loss.

    Args:
        config: settings of the step; None for the defaults.
        objective: a name of `gapo.objectives.OBJECTIVES`, a `gapo.objectives.Objective`, or a function of `LogProbs`
            that returns the loss of each pair, (N,). An objective with a reference needs its log-probabilities, which
            `iterate_batches` yields where the rows have them (`gapo.data.with_reference_logps`).
        objective_settings: settings of the objective, such as {"beta": 0.1}; None for its defaults. "gapo" and "simpo"
            take theirs from `config`.
        ld_alpha: LD-DPO's alpha in [0, 1]: how much the tail of a pair's longer answer counts in its log-probability;
            None for 1. The reference must be measured with the same,
            `gapo.data.with_reference_logps(..., ld_alpha=...)`.
        use_weighting: whether each pair's loss is multiplied by WPO's weight (`gapo.token_weights.wpo_weights`, without
            a cap), which carries no gradient.
        on_step: called with the `StepResult` of each training batch; its fields of the anchor are None for an objective
            without one. Under `mx.compile` it would be called once, while the step is traced: leave it out there.
        running: running statistics to go on from, by name, where a training is continued: the "gapo/running/" figures
            that it reported last. None begins anew, as each new loss does. From then on the loss keeps them in the
            model, for each model its own; under `mx.compile` `model.state` must be among the inputs and outputs, as
            in mlx-lm's `train`, or they stay where they began.

    Raises:
        TypeError, ValueError: an unknown objective, or settings that it does not have. From the loss: no reference
            where one is needed; `running` of another objective; a batch that is not `iterate_batches`'; padding on the
            left; a gradient in evaluation mode of a loss that differs there; dropout together with mlx-lm's
            `grad_checkpoint`, whose recomputed forward draws other masks, so that its gradients are wrong for any loss.

    Source: method document, "The step".

    >>> import mlx.core as mx
    >>> from mlx import nn
    >>> mx.random.seed(0)
    >>> model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4))
    >>> ids, labels = mx.array([[1, 2], [1, 3]]), mx.array([[-100, 2], [-100, 3]])  # one pair, the chosen row first
    >>> def squares(logps):
    ...     return (1 - logps.margins) ** 2
    >>> loss = make_loss(objective=squares)
    >>> (value, tokens), grads = nn.value_and_grad(model, loss)(model, ids, labels)
    >>> chosen, rejected = pair_logps(model, (ids, labels))
    >>> abs(value.item() - (1 - (chosen - rejected).item()) ** 2) < 1e-5, tokens.item()
    (True, 2)
    """
    options = LogpOptions(ld_alpha, use_weighting)
    config = step_settings(config, getattr(objective, "name", objective), objective_settings, **asdict(options))
    target = resolve(objective, config, objective_settings)
    options.require_weightable(target.name, target.objective.coupled)
    logps = PairLogps(row_logits, options)
    backend, watch = MlxBackend(), Watch(config, target)
    statistics = RunningStatistics(running)
    takes_anchor = target.needs_anchor or config.updates_at_anchor

    def loss(
        model: nn.Module, ids: mx.array, labels: mx.array, reference: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        require_pairs(ids, labels)
        if is_concrete(labels):
            require_right_padding(np.array(ids), np.array(labels))
        constants = _constants(labels, reference, options)
        return (train_loss if model.training else evaluation_loss)(model, (ids, labels), constants)

    def train_loss(
        model: nn.Module, batch: tuple[mx.array, mx.array], constants: BatchConstants
    ) -> tuple[mx.array, mx.array]:
        _refuse_checkpointed_dropout(model)
        _warn_of_a_bare_quantised_base(model)
        # The module's parameters are the tracers of mlx-lm's gradient here, which `as_loss` answers.
        logps.await_batch(batch)
        forward = backend.forward(logps, model, batch, config, anchor=takes_anchor, by_side=target.by_side)
        constants = replace(constants, pair_weights=logps.pair_weights())
        before = statistics.of(model)
        result, update = run(forward, config, backend, loss=target, constants=constants, running=before)
        forward.require_repeatable()
        if takes_anchor:  # the step has read values; without an anchor it stays lazy, and so does its result
            result = detached(result)
        statistics.keep(model, result.running)
        metrics = keep_training(model, step_metrics(result, config), watch)
        # A figure that nobody evaluates would keep the batch's graph alive. `depends` evaluates it with the gradient.
        figures = [*metrics, *(x for _, x in tree_flatten(vars(result)) if x is not None)]
        by_name: Any = update if isinstance(update, Mapping) else dict(enumerate(update))
        arrays = mx.depends([mx.stop_gradient(x) for x in by_name.values()], figures)
        update = dict(zip(by_name, arrays, strict=True)) if by_name is update else arrays
        if on_step is not None:
            on_step(result)
        return forward.as_loss(result.loss, update), mx.sum(batch[1] != IGNORE_INDEX)

    def evaluation_loss(
        model: nn.Module, batch: tuple[mx.array, mx.array], constants: BatchConstants
    ) -> tuple[mx.array, mx.array]:
        if target.evaluated.needs_reference and constants.ref_chosen is None:
            require_reference(target.name, ())
        logps.await_batch(batch)
        measured = LogProbs.of_step(logps(model, batch), constants)
        columns = evaluation_columns(target, measured, logps.pair_weights())
        metrics = evaluation_metrics(columns, config)
        value: Any = metrics.pop("loss")
        pairs = len(columns["loss"])
        keep_evaluation(model, metrics, pairs)
        if takes_anchor or target.sft_weight:  # the gradient of another loss than the training's
            value = _without_gradient(value)
        return value, mx.array(pairs)

    return loss


def pair_logps(
    model: nn.Module, batch: Sequence[mx.array] | Mapping[str, Any], *, ld_alpha: float | None = None
) -> tuple[mx.array, mx.array]:
    """(chosen_logps, rejected_logps), each (N,), nats per token, from one call of `model` on both sides.

    Args:
        model: gives logits (2N, seq, vocab) of ids (2N, seq).
        batch: (ids, labels, ...), each (2N, seq), chosen rows first, or a batch of `gapo.data.collate_pairs`.
        ld_alpha: as in `gapo.pairs.pair_logps`.

    Raises:
        ValueError: shapes that are not those of pairs, padding on the left, or an `ld_alpha` that is out of its range
            or not that of the batch's reference.
        TypeError: the model returns more than logits.
    """
    options, arrays = LogpOptions(ld_alpha), as_arrays(batch) if isinstance(batch, Mapping) else batch
    if len(arrays) > 2:
        _constants(arrays[1], arrays[2], options)  # for its checks
    return PairLogps(row_logits, options)(model, arrays)


def row_logits(model: nn.Module, batch: Sequence[mx.array] | Mapping[str, Any]) -> tuple[mx.array, mx.array]:
    """(logits, labels) of both sides, from one call of `model`."""
    ids, labels = (as_arrays(batch) if isinstance(batch, Mapping) else batch)[:2]
    require_pairs(ids, labels)
    logits = model(ids)
    if not isinstance(logits, mx.array):
        raise TypeError(
            f"the model must return logits, an array (batch, seq, vocab), got {type(logits).__name__}: wrap it in a "
            "module that returns them alone"
        )
    return logits, labels


def _constants(labels: mx.array, reference: mx.array | None, options: LogpOptions) -> BatchConstants:
    """Lengths and reference of a batch of `iterate_batches`."""
    columns = dict(zip(("chosen_lengths", "rejected_lengths"), halves(response_lengths(labels)), strict=True))
    if reference is not None and reference.size:
        columns |= dict(zip((*REFERENCE, REFERENCE_ALPHA), reference, strict=False))
    return BatchConstants.of(options.checked(columns))


@mx.custom_function
def _without_gradient(value: mx.array) -> mx.array:
    """`value`, which raises ValueError when it is differentiated."""
    return value


@_without_gradient.vjp
def _refuse_gradient(value: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    raise ValueError(
        "the model is in evaluation mode, in which the loss has no anchor and no SFT term, and its gradient was "
        "requested: call model.train() before training (mlx_lm.load leaves a model in evaluation mode)"
    )


def _warn_of_a_bare_quantised_base(model: nn.Module) -> None:
    """Warn where only norms and biases would train: MLX freezes packed weights, and there are no adapters."""
    packed = [name for name, x in tree_flatten(model.parameters()) if name.endswith(".weight") and x.dtype == mx.uint32]
    matrices = [name for name, x in tree_flatten(model.trainable_parameters()) if x.ndim > 1]
    if packed and not matrices:
        warnings.warn(
            f"the model is quantised and has no adapters: {len(packed)} packed matrices stay as they are, and only "
            "norms and biases train. Call mlx_lm.tuner.utils.linear_to_lora_layers first",
            UserWarning,
            stacklevel=2,
        )


def _refuse_checkpointed_dropout(model: nn.Module) -> None:
    """Raise ValueError where dropout meets mlx-lm's `grad_checkpoint`, which patches the layers' `__call__`."""
    drops = any(getattr(m, "_p_1", 1) < 1 for m in model.modules())  # nn.Dropout, Dropout2d and Dropout3d
    checkpointed = any(type(m).__call__.__name__ == "checkpointed_fn" for m in model.modules())
    if drops and checkpointed:
        raise ValueError(
            "grad_checkpoint draws other dropout masks when it recomputes, and gradients come out wrong: set dropout "
            "to 0 (lora_parameters: dropout), or grad_checkpoint to False"
        )


loss = make_loss()

__all__ = ["MetricsCallback", "iterate_batches", "last_metrics", "load_pairs", "loss", "make_loss", "pair_logps"]
