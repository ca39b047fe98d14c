"""GAPO in MLX-LM: a loss and batches for `mlx_lm.tuner.trainer.train`, unchanged, full or LoRA.

`train(model, optimizer, pairs, valid, args, loss=make_loss(config), iterate_batches=iterate_batches)`
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import gapo
from gapo._extras import missing

try:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    from gapo.adapters.mlx_metrics import MetricsCallback, detached, keep_evaluation, keep_training, last_metrics
    from gapo.adapters.mlx_pairs import as_arrays, iterate_batches, load_pairs, require_pairs, require_right_padding
except ModuleNotFoundError as error:
    raise missing("gapo.adapters.mlx_lm", "mlx-lm", error) from error

from gapo._namespace import is_concrete
from gapo.backends.mlx import MlxBackend, MlxForward
from gapo.config import GAPOConfig, step_settings
from gapo.data.collate import REFERENCE
from gapo.data.reference_columns import require_reference
from gapo.logps import response_lengths
from gapo.metrics import pair_metrics, step_metrics
from gapo.objectives import LogProbs, without_anchor
from gapo.step import StepResult, run


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
            needed; a batch that is not `iterate_batches`'; padding on the left; a gradient in evaluation mode, where
            there is no anchor; dropout together with mlx-lm's `grad_checkpoint`, whose gradients are wrong for any
            loss, since the recomputed forward draws other masks.

    Source: method document, "The step".
    """
    config = step_settings(config, objective, objective_settings)
    backend = MlxBackend()
    other, settings = without_anchor(objective, config, objective_settings)

    def loss(
        model: nn.Module, ids: mx.array, labels: mx.array, reference: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        require_pairs(ids, labels)
        if is_concrete(labels):
            require_right_padding(np.array(ids), np.array(labels))
        if model.training:
            _refuse_checkpointed_dropout(model)
            _warn_of_a_bare_quantised_base(model)
        if not model.training or objective != "gapo":
            references = () if reference is None or not reference.size else reference
            if other.needs_reference:
                require_reference(other.name, REFERENCE if len(references) else ())
            logps = LogProbs.from_averages(*pair_logps(model, (ids, labels)), response_lengths(labels), *references)
            metrics = pair_metrics(logps, config)
            if model.training:
                keep_training(model, metrics)
            else:
                keep_evaluation(model, metrics, len(logps.chosen))
            count = mx.sum(labels != -100) if model.training else mx.array(len(logps.chosen))
            value: Any = mx.mean(other.losses(logps, **settings))
            if objective == "gapo":
                value = _without_gradient(value)
            return value, count
        # `trainable_parameters` are the tracers of the caller's gradient here: the clean forward is the one it goes
        # back through, and the step's cotangents, constants to it, make the loss's gradient the step's.
        forward = MlxForward(pair_logps, model, (ids, labels))
        result, cotangents = run(forward, config, backend)
        forward.require_repeatable()
        result = detached(result)
        kept = keep_training(model, step_metrics(result, config))
        # Whoever evaluates the gradient evaluates the metrics too, which otherwise hold what they would be made of.
        cotangents = mx.depends([mx.stop_gradient(c) for c in cotangents], kept)
        pulls = [mx.sum(c * y) for c, y in zip(cotangents, forward.outputs, strict=True)]
        pull = pulls[0] + pulls[1]
        if on_step is not None:
            on_step(result)
        value = mx.stop_gradient(result.loss) + (pull - mx.stop_gradient(pull))
        return value, mx.sum(labels != -100)

    return loss


loss = make_loss()


def pair_logps(model: nn.Module, batch: Sequence[mx.array] | Mapping[str, Any]) -> tuple[mx.array, mx.array]:
    """(chosen_logps, rejected_logps), each (N,), of (ids, labels, ...): each (2N, seq), chosen rows first.

    A batch of `gapo.data.collate_pairs` is taken too.

    Raises:
        ValueError: shapes that are not those of pairs, or padding on the left.
        TypeError: the model returns more than logits.
    """
    ids, labels = (as_arrays(batch) if isinstance(batch, Mapping) else batch)[:2]
    require_pairs(ids, labels)
    logits = model(ids)
    if not isinstance(logits, mx.array):
        raise TypeError(
            f"the model must return logits, an array (batch, seq, vocab), got {type(logits).__name__}: wrap it in a "
            "module that returns them alone"
        )
    logps = gapo.sequence_logps(logits, labels)
    half = logps.shape[0] // 2
    return logps[:half], logps[half:]


@mx.custom_function
def _without_gradient(value: mx.array) -> mx.array:
    """`value`; raises where it is differentiated."""
    return value


@_without_gradient.vjp
def _refuse_gradient(value: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    raise ValueError(
        "the model is in evaluation mode, in which the loss is the probe loss without an anchor, and its gradient is "
        "asked for: call model.train() before training (mlx_lm.load leaves a model in evaluation mode)"
    )


def _warn_of_a_bare_quantised_base(model: nn.Module) -> None:
    """Packed weights are frozen by mlx, so that without adapters the norms alone would train."""
    packed = [name for name, x in tree_flatten(model.parameters()) if name.endswith(".weight") and x.dtype == mx.uint32]
    matrices = [name for name, x in tree_flatten(model.trainable_parameters()) if x.ndim > 1]
    if packed and not matrices:
        warnings.warn(
            f"the model is quantised and has no adapters: {len(packed)} packed matrices stay as they are, and norms "
            "and biases alone train. Call mlx_lm.tuner.utils.linear_to_lora_layers first",
            UserWarning,
            stacklevel=2,
        )


def _refuse_checkpointed_dropout(model: nn.Module) -> None:
    drops = any(getattr(m, "_p_1", 1) < 1 for m in model.modules())  # nn.Dropout, Dropout2d and Dropout3d
    checkpointed = any(type(m).__call__.__name__ == "checkpointed_fn" for m in model.modules())
    if drops and checkpointed:
        raise ValueError(
            "grad_checkpoint draws other dropout masks when it recomputes, and gradients come out wrong: set "
            "dropout to 0 "
            "(lora_parameters: dropout), or grad_checkpoint to False"
        )


__all__ = ["MetricsCallback", "iterate_batches", "last_metrics", "load_pairs", "loss", "make_loss", "pair_logps"]
