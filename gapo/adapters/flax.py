"""GAPO in Flax: a training step for NNX modules, and for Linen with `TrainState`; optax does the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gapo
from gapo._extras import missing

try:
    import jax
    import jax.numpy as jnp
    from flax import nnx
except ModuleNotFoundError as error:
    raise missing("gapo.adapters.flax", "flax", error) from error

from gapo.adapters.flax_inputs import (
    LogitsFn,
    arrays,
    linen_logits,
    named_dropout,
    refused_batch_statistics,
    require_same_variables,
    trained,
)
from gapo.backends.jax import JaxBackend, JaxForward
from gapo.config import GAPOConfig, step_settings
from gapo.data.collate import PARTS, REFERENCE
from gapo.data.reference_columns import require_reference
from gapo.logps import response_lengths
from gapo.metrics import pair_metrics, step_metrics
from gapo.objectives import LogProbs, without_anchor
from gapo.step import StepResult, run

Metrics = dict[str, jax.Array]


def make_train_step(
    logits_fn: LogitsFn | None = None,
    config: GAPOConfig | None = None,
    *,
    objective: str = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
    wrt: Any = None,
    axis_name: str | None = None,
) -> Callable[..., Any]:
    """A jitted GAPO training step.

    For NNX: `train_step(model, optimizer, batch, *, gamma=None, rng=None) -> (metrics, result)`, which updates `model`
    and `optimizer` in place. For Linen: `train_step(state, batch, *, gamma=None, rng=None) -> (state, metrics,
    result)`. Accumulate gradients with `optax.MultiSteps`; place arrays on a mesh and the step runs there. What the
    optimizer leaves where it is (`optax.multi_transform` with `optax.set_to_zero`) is neither perturbed nor
    differentiated.

    Args:
        logits_fn: `logits_fn(model, input_ids, attention_mask)` gives logits (batch, seq, vocab). None calls an NNX
            model with `input_ids`, and a Linen one as `state.apply_fn({"params": params}, input_ids)`: right for causal
            models whose padding stands on the right. For Linen's dropout it takes `rngs` as well, to be handed to
            `apply`; without a `logits_fn` that is done for you.
        config: settings of the step; None for the defaults.
        objective: "gapo"; "simpo" for the control on the probe loss; or another name of `gapo.objectives.OBJECTIVES`.
            Their `result` is None. Those that compare with a reference need its log-probabilities in the batch, as
            `gapo.data.with_reference_logps` puts them in the rows; those of the batch's statistics take the batch as it
            lies on a device.
        objective_settings: settings of the other objectives, such as {"beta": 0.1}; None for their defaults. "gapo" and
            "simpo" take theirs from `config`.
        wrt: which NNX variables train; None for those of the optimizer, as `nnx.Optimizer(..., wrt=nnx.LoRAParam)` was
            told. Others than the optimizer's are refused.
        axis_name: data axis of a surrounding `shard_map`, whose members share one anchor. Its caller averages nothing.

    Returns:
        `train_step`. `batch` is what `gapo.data.collate_pairs` makes: each (N, seq),
        {chosen,rejected}_{input_ids,attention_mask,labels}, besides reference log-probabilities (N,). `metrics` are
        scalars: "loss", TRL's keys and "gapo/"; `result` is the `gapo.StepResult`. `gamma` and `rng` are as in
        `gapo.value_and_grad`; with Linen `rng` draws the dropout masks too, the same ones for the clean forward and the
        anchor's: a new key each step. NNX modules draw from their own.

    Raises:
        ValueError: from `train_step`: padding that the default call would not see, `wrt` against the optimizer's, an
            `rng` that nothing takes, statistics of a batch in the forward (`nnx.BatchNorm` in training mode).

    Source: method document, "The step".
    """
    config = step_settings(config, objective, objective_settings)
    backend = JaxBackend(axis_name)
    measure = _measure(objective, config, objective_settings)

    def gradients(forward: JaxForward, batch: Any, gamma: Any, rng: Any) -> tuple[StepResult | None, Metrics, Any]:
        if objective == "gapo":
            result, cotangents = run(forward, config, backend, gamma=gamma, rng=rng)
            metrics = {"loss": result.loss, **step_metrics(result, config)}
        else:
            over = {} if gamma is None else {"gamma": gamma}

            def loss(outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, Metrics]:
                found = measure(outputs, batch, **over)
                return found["loss"], found

            result = None
            cotangents, metrics = jax.grad(loss, has_aux=True)(forward.outputs)
        grads = {name: backend.all_reduce(g, "mean") for name, g in forward.pullback(cotangents).items()}
        return result, metrics, forward.pack(grads)

    @nnx.jit
    def nnx_step(model: Any, optimizer: Any, batch: Any, gamma: Any, rng: Any) -> tuple[Metrics, StepResult | None]:
        require_same_variables(model, wrt, optimizer.wrt)
        graph, params, rest = nnx.split(model, optimizer.wrt, ...)

        def margin_fn(p: Any, b: Any) -> Any:
            merged = nnx.merge(graph, p, rest, copy=True)  # the same random state each time: the same dropout masks
            with refused_batch_statistics(merged):
                logps = pair_logps(lambda ids, mask: (logits_fn or _call)(merged, ids, mask), b)
            return logps, nnx.state(merged, nnx.Not(optimizer.wrt))

        trainable = trained(optimizer.tx, nnx.as_pure(optimizer.opt_state), nnx.as_pure(params))
        forward = JaxForward(margin_fn, params, batch, axis_name, True, config, trainable=trainable)
        result, metrics, grads = gradients(forward, batch, gamma, rng)
        nnx.update(model, forward.aux)
        optimizer.update(*(() if isinstance(optimizer, nnx.ModelAndOptimizer) else (model,)), grads)
        return metrics, result

    @jax.jit
    def linen_step(state: Any, batch: Any, gamma: Any, rng: Any) -> tuple[Any, Metrics, StepResult | None]:
        fn = linen_logits(state, logits_fn, rng, elsewhere=config.direction == "gaussian")

        def margin_fn(p: Any, b: Any) -> Any:
            return pair_logps(lambda ids, mask: fn(p, ids, mask), b)

        trainable = trained(state.tx, state.opt_state, state.params)
        with named_dropout("call train_step(state, batch, rng=key), with a new key each step"):
            forward = JaxForward(margin_fn, state.params, batch, axis_name, config=config, trainable=trainable)
        result, metrics, grads = gradients(forward, batch, gamma, rng)
        return state.apply_gradients(grads=grads), metrics, result

    def train_step(*args: Any, gamma: Any = None, rng: Any = None) -> Any:
        if len(args) == 2 and isinstance(args[0], nnx.ModelAndOptimizer):
            args = (args[0].model, *args)
        if len(args) == 3 and isinstance(args[0], nnx.Module) and isinstance(args[1], nnx.Optimizer):
            if isinstance(args[1], nnx.ModelAndOptimizer) and args[1].model is not args[0]:
                raise ValueError(
                    "the nnx.ModelAndOptimizer holds another model than the one given: give the same, or none"
                )
            return nnx_step(args[0], args[1], arrays(args[2], ids_alone=logits_fn is None), gamma, rng)
        if len(args) == 2 and hasattr(args[0], "apply_gradients"):
            return linen_step(args[0], arrays(args[1], ids_alone=logits_fn is None), gamma, rng)
        kinds = ", ".join(type(x).__name__ for x in args)
        raise TypeError(
            f"train_step takes (nnx.Module, nnx.Optimizer, batch), or (TrainState, batch) with Linen; got ({kinds})"
        )

    return train_step


def make_eval_step(
    logits_fn: LogitsFn | None = None,
    config: GAPOConfig | None = None,
    *,
    objective: str = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
) -> Callable[..., Metrics]:
    """A jitted evaluation: `eval_step(model_or_state, batch) -> metrics`, without an anchor and without dropout.

    An NNX model is evaluated as after `model.eval()`, and stays in the mode that it is in.

    Args:
        logits_fn: as in `make_train_step`.
        config: as in `make_train_step`.
        objective: likewise.
        objective_settings: likewise.

    Returns:
        `eval_step`: the mean probe loss, or another objective's own, under "loss", and the rewards under TRL's keys
        (method document, step 6).
    """
    measure = _measure(objective, step_settings(config, objective, objective_settings), objective_settings)

    @nnx.jit
    def nnx_step(model: Any, batch: Any) -> Metrics:
        model = nnx.clone(model)
        model.eval()
        return measure(pair_logps(lambda ids, mask: (logits_fn or _call)(model, ids, mask), batch), batch)

    @jax.jit
    def linen_step(state: Any, batch: Any) -> Metrics:
        fn = linen_logits(state, logits_fn, None)
        with named_dropout("give make_eval_step a logits_fn that applies the module with deterministic=True"):
            return measure(pair_logps(lambda ids, mask: fn(state.params, ids, mask), batch), batch)

    def eval_step(model: Any, batch: Any) -> Metrics:
        model = model.model if isinstance(model, nnx.ModelAndOptimizer) else model
        step = nnx_step if isinstance(model, nnx.Module) else linen_step
        return step(model, arrays(batch, ids_alone=logits_fn is None))

    return eval_step


def pair_logps(logits: Callable[..., jax.Array], batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """(chosen_logps, rejected_logps), each (N,), from one call of `logits(input_ids, attention_mask)`."""
    ids, mask, labels = (jnp.concatenate([batch[f"chosen_{p}"], batch[f"rejected_{p}"]]) for p in PARTS)
    returned = logits(ids, mask)
    if not isinstance(returned, jax.Array):
        raise TypeError(
            f"the model must return logits (batch, seq, vocab), got {type(returned).__name__}: give a logits_fn that "
            "takes them out, such as lambda model, input_ids, attention_mask: model(input_ids).logits"
        )
    logps = gapo.sequence_logps(returned, labels)
    half = logps.shape[0] // 2
    return logps[:half], logps[half:]


def _measure(objective: str, config: GAPOConfig, given: Mapping[str, Any] | None) -> Callable[..., Metrics]:
    """`measure(outputs, batch) -> metrics`: the mean loss without an anchor under "loss", and TRL's rewards."""
    found, settings = without_anchor(objective, config, given)

    def measure(outputs: tuple[jax.Array, ...], batch: Mapping[str, jax.Array], **over: Any) -> Metrics:
        if found.needs_reference:
            require_reference(found.name, batch)
        if over and "gamma" not in settings:
            raise ValueError(f"gamma is of objectives 'gapo' and 'simpo'; {found.name!r} takes {', '.join(settings)}")
        labels = jnp.concatenate([batch["chosen_labels"], batch["rejected_labels"]])
        ref_chosen, ref_rejected = (batch.get(name) for name in REFERENCE)
        chosen, rejected = outputs
        logps = LogProbs.from_averages(chosen, rejected, response_lengths(labels), ref_chosen, ref_rejected)
        losses = found.losses(logps, **{**settings, **over})
        return {"loss": jnp.mean(losses), **pair_metrics(logps, config)}

    return measure


def _call(model: Any, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    return model(input_ids)


__all__ = ["make_eval_step", "make_train_step", "pair_logps"]
