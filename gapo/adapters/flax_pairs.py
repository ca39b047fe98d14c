"""A batch of pairs through a Flax model: its forward, the gradients of a step, an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gapo import pairs
from gapo.adapters.flax_inputs import LogitsFn, refused_batch_statistics
from gapo.backends.base import gradients
from gapo.backends.jax import JaxBackend, JaxForward
from gapo.config import GAPOConfig, step_settings
from gapo.logp_options import LogpOptions
from gapo.metrics import evaluation_columns, evaluation_metrics, step_metrics
from gapo.objectives import Loss, Objective, resolve
from gapo.pairs import BatchConstants, LogProbs, require_reference
from gapo.result import StepResult
from gapo.step import makes_anchor, run

Metrics = dict[str, jax.Array]
ObjectiveLike = str | Objective | Callable[[LogProbs], jax.Array]
MarginFn = Callable[[Any, Any], Any]  # returns (logps, (state, weights of the pairs)), None for what there is not
Measured = tuple[tuple[jax.Array, jax.Array], jax.Array | None]


def pair_logps(
    logits: Callable[..., jax.Array], batch: Mapping[str, Any], *, ld_alpha: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """(chosen_logps, rejected_logps), each (N,), nats per token, from one call of `logits(input_ids, attention_mask)`.

    Args:
        logits: gives logits (2N, seq, vocab), chosen rows first.
        batch: the columns of `gapo.data.collate_pairs`.
        ld_alpha: as in `gapo.pairs.pair_logps`.

    Raises:
        TypeError: `logits` returns anything but an array.
        ValueError: `ld_alpha` is not in [0, 1], or not that of the batch's reference.
    """
    options = LogpOptions(ld_alpha)
    return measured(logits, options.checked(batch), options)[0]


def measured(logits: Callable[..., jax.Array], batch: Mapping[str, Any], options: LogpOptions) -> Measured:
    """(`pair_logps`, weights of the pairs (N,) or None) by these options."""
    ids, mask, labels = pairs.stacked({name: jnp.asarray(batch[name]) for name in pairs.COLUMNS}, *pairs.PARTS)
    returned = logits(ids, mask)
    if not isinstance(returned, jax.Array):
        raise TypeError(
            f"the model must return logits (batch, seq, vocab), got {type(returned).__name__}: give a logits_fn "
            "that takes them out, such as lambda model, input_ids, attention_mask: model(input_ids).logits"
        )
    return options.logps(returned, labels), options.pair_weights(returned, labels)


def nnx_measured(logits_fn: LogitsFn | None, model: Any, batch: Mapping[str, Any], options: LogpOptions) -> Measured:
    """`measured` of an NNX model; without a `logits_fn` it is called with the token ids alone."""
    return measured(lambda ids, mask: model(ids) if logits_fn is None else logits_fn(model, ids, mask), batch, options)


def linen_margin_fn(fn: LogitsFn, options: LogpOptions) -> MarginFn:
    """`margin_fn(params, batch) -> (logps, (None, weights))` of `fn(params, input_ids, attention_mask)`."""

    def margin_fn(params: Any, batch: Any) -> Any:
        logps, weights = measured(lambda ids, mask: fn(params, ids, mask), batch, options)
        return logps, (None, weights)

    return margin_fn


def nnx_margin_fn(logits_fn: LogitsFn | None, graph: Any, *rest: Any, changed: Any, options: LogpOptions) -> MarginFn:
    """`margin_fn(params, batch) -> (logps, (state, weights))` of an NNX model, split into `graph`, params and `rest`.

    Args:
        logits_fn: as in `nnx_measured`.
        graph: of `nnx.split`.
        rest: the states beside the parameters, if there are any.
        changed: filter of the variables that are returned if the forward changes them: random streams and the like.
        options: of the measuring.
    """

    def margin_fn(params: Any, batch: Any) -> Any:
        # A copy, so that each forward starts from the same random state, and draws the same dropout masks.
        model = nnx.merge(graph, params, *rest, copy=True)
        before = {path: jax.tree.leaves(x) for path, x in nnx.to_flat_state(nnx.state(model, changed))}
        with refused_batch_statistics(model):
            logps, weights = nnx_measured(logits_fn, model, batch, options)
        state = nnx.to_flat_state(nnx.state(model, changed))
        new = [(path, x) for path, x in state if not _same(jax.tree.leaves(x), before.get(path))]
        return logps, (nnx.from_flat_state(new), weights)

    return margin_fn


def _same(new: list[Any], old: list[Any] | None) -> bool:
    return old is not None and len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))


@dataclass(frozen=True)
class PairStep:
    """The step of an objective on a batch of pairs, and its evaluation."""

    config: GAPOConfig
    loss: Loss
    backend: JaxBackend
    options: LogpOptions
    axis_name: str | None = None

    @classmethod
    def of(
        cls,
        config: GAPOConfig | None,
        objective: ObjectiveLike,
        objective_settings: Mapping[str, Any] | None,
        options: LogpOptions,
        axis_name: str | None = None,
    ) -> PairStep:
        config = step_settings(config, getattr(objective, "name", objective), objective_settings, **asdict(options))
        loss = resolve(objective, config, objective_settings)
        options.require_weightable(loss.name, loss.objective.coupled)
        return cls(config, loss, JaxBackend(axis_name), options, axis_name)

    def gradients(
        self, margin_fn: MarginFn, params: Any, batch: Any, trainable: Sequence[bool], **inputs: Any
    ) -> tuple[StepResult, Metrics, Any, Any]:
        """The result, its metrics, the gradients as a tree like `params`, and the state of `margin_fn`.

        Args:
            margin_fn: `margin_fn(params, batch)` gives (the log-probabilities of `pair_logps`, (state, weights)).
            params: a pytree of arrays.
            batch: of `flax_inputs.arrays`.
            trainable: whether each leaf of `params` trains.
            inputs: `gamma`, `rng` and `running`, as `gapo.step.run` takes them.

        Raises:
            ValueError: `running` holds other statistics than those of the objective.
        """
        constants = BatchConstants.of(batch)
        of_anchor = self.config if makes_anchor(self.loss, self.config, constants) else None
        forward = JaxForward(
            margin_fn, params, batch, self.axis_name, True, of_anchor, trainable=trainable, by_side=self.loss.by_side
        )
        state, weights = forward.aux
        constants = replace(constants, pair_weights=weights)
        result, update = run(forward, self.config, self.backend, loss=self.loss, constants=constants, **inputs)
        _require_own_statistics(self.loss.name, inputs.get("running"), result)
        grads = {name: self.backend.all_reduce(g, "mean") for name, g in gradients(forward, update).items()}
        metrics = {"loss": result.loss, **step_metrics(result, self.config)}
        return result, metrics, forward.pack(grads), state

    def evaluate(self, outputs: Measured, batch: Mapping[str, jax.Array]) -> Metrics:
        """Means over the pairs of what `measured` gave, without an anchor (method document, step 6)."""
        if self.loss.evaluated.needs_reference:
            require_reference(self.loss.name, batch)
        logps, weights = outputs
        columns = evaluation_columns(self.loss, LogProbs.of_step(logps, BatchConstants.of(batch)), weights)
        return evaluation_metrics(columns, self.config)


def _require_own_statistics(name: str, running: Mapping[str, Any] | None, result: StepResult) -> None:
    """Raise ValueError if `running` is not of the objective `name`: its own would silently start anew."""
    own = sorted(result.running or ())
    if running and sorted(running) != own:
        raise ValueError(
            f"running holds {', '.join(sorted(running))}, and objective {name!r} keeps {', '.join(own) or 'none'}: "
            "pass the last step's result.running, and None at the first step"
        )


__all__ = ["PairStep", "linen_margin_fn", "measured", "nnx_margin_fn", "nnx_measured", "pair_logps"]
