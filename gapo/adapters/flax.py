"""GAPO in Flax: a training step for NNX modules, and for Linen's `TrainState`. optax makes the update.

One batch takes this way, whatever the objective: `pair_logps` gives the log-probabilities of both sides from one call
of the model, `JaxForward` linearises it, `gapo.step.run` makes the cotangents, and one pullback gives the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from gapo._extras import missing

try:
    import jax
    import jax.numpy as jnp
    from flax import nnx
except ModuleNotFoundError as error:
    raise missing("gapo.adapters.flax", "flax", error) from error

from gapo import pairs
from gapo._namespace import is_concrete
from gapo.adapters.flax_inputs import (
    LogitsFn,
    arrays,
    by_pair,
    linen_logits,
    named_dropout,
    refused_batch_statistics,
    require_same_variables,
    trained,
)
from gapo.backends.jax import JaxBackend, JaxForward
from gapo.config import GAPOConfig, step_settings
from gapo.metrics import evaluation_columns, evaluation_metrics, step_metrics
from gapo.objectives import Objective, resolve
from gapo.pairs import BatchConstants, LogProbs, require_reference
from gapo.result import StepResult
from gapo.reweighting import Watch
from gapo.step import run

Metrics = dict[str, jax.Array]
_LOOKS = tuple(8**k for k in range(1, 9))  # calls of a train step after which its weights are looked at


def make_train_step(
    logits_fn: LogitsFn | None = None,
    config: GAPOConfig | None = None,
    *,
    objective: str | Objective | Callable[[LogProbs], jax.Array] = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
    wrt: Any = None,
    axis_name: str | None = None,
) -> Callable[..., Any]:
    """A jitted training step: GAPO's, or that of another objective.

    For NNX: `train_step(model, optimizer, batch, *, gamma=None, rng=None) -> (metrics, result)`, which updates `model`
    and `optimizer` in place. For Linen: `train_step(state, batch, *, gamma=None, rng=None) -> (state, metrics,
    result)`. Accumulate gradients with `optax.MultiSteps`. Arrays on a mesh are taken as they are.

    A parameter that the optimizer never changes (`optax.multi_transform` with `optax.set_to_zero`) is neither perturbed
    nor differentiated.

    Args:
        logits_fn: `logits_fn(model, input_ids, attention_mask)` gives logits (batch, seq, vocab). None calls an NNX
            model with `input_ids`, and a Linen one as `state.apply_fn({"params": params}, input_ids)`. That is right
            for causal models with padding on the right. For Linen's dropout, let the function take `rngs` as well, and
            pass them to `apply`; without a `logits_fn` this is done for you.
        config: settings of the step; None for the defaults.
        objective: a name of `gapo.objectives.OBJECTIVES`, a `gapo.objectives.Objective`, or a function of `LogProbs`
            that returns the loss of each pair, (N,). An objective with a reference needs its log-probabilities in the
            batch, as `gapo.data.with_reference_logps` puts them in the rows. One with statistics of the batch computes
            them within each member of `axis_name`.
        objective_settings: settings of the objective, such as {"beta": 0.1}; None for its defaults. "gapo" and "simpo"
            take theirs from `config`.
        wrt: filter of the NNX variables that train; None for the optimizer's own, as in
            `nnx.Optimizer(..., wrt=nnx.LoRAParam)`. A filter that selects other variables is refused.
        axis_name: data axis of a surrounding `shard_map`, whose members share one anchor. The step averages the
            gradients over it; its caller averages nothing.

    Returns:
        `train_step`. `batch` has the columns of `gapo.data.collate_pairs`, {chosen,rejected}_{input_ids,
        attention_mask,labels}, each (N, seq), and reference log-probabilities (N,) where the objective needs them.
        `metrics` are scalars: "loss", TRL's keys and "gapo/". `result` is the `gapo.StepResult`; its fields of the
        anchor are None for an objective without one. `gamma`, a number or (N,), overrides the objective's. `rng` draws
        the perturbation of direction="gaussian". In Linen it draws the dropout masks too, the same ones for the clean
        forward and the anchor's: pass a new key each step. NNX modules draw from their own.

    Raises:
        TypeError, ValueError: an unknown objective, or settings that it does not have. From `train_step`: columns that
            are missing or do not fit; padding that the default call would not see; a `wrt` other than the optimizer's;
            an `rng` that nothing takes; statistics of the batch in the forward (`nnx.BatchNorm` in training mode).

    Source: method document, "The step".

    >>> import optax
    >>> from flax import nnx
    >>> from gapo.data import collate_pairs
    >>> row = {"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3]}
    >>> row |= {"chosen_labels": [-100, 2], "rejected_labels": [-100, 3]}
    >>> model = nnx.Sequential(nnx.Embed(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    >>> def squares(logps):
    ...     return (1 - logps.margins) ** 2
    >>> metrics, result = make_train_step(objective=squares)(model, optimizer, collate_pairs([row], pad_token_id=0))
    >>> bool(abs(metrics["loss"] - (1 - result.margins[0]) ** 2) < 1e-5)
    True
    """
    config = step_settings(config, getattr(objective, "name", objective), objective_settings)
    loss = resolve(objective, config, objective_settings)
    backend = JaxBackend(axis_name)
    watch, calls = Watch(config, loss), count(1)
    of_anchor = config if loss.needs_anchor else None

    def gradients(forward: JaxForward, batch: Any, gamma: Any, rng: Any) -> tuple[StepResult, Metrics, Any]:
        constants = BatchConstants.of(batch)
        result, cotangents = run(forward, config, backend, loss=loss, constants=constants, gamma=gamma, rng=rng)
        grads = {name: backend.all_reduce(g, "mean") for name, g in forward.pullback(cotangents).items()}
        return result, {"loss": result.loss, **step_metrics(result, config)}, forward.pack(grads)

    @nnx.jit
    def nnx_step(model: Any, optimizer: Any, batch: Any, gamma: Any, rng: Any) -> tuple[Metrics, StepResult]:
        require_same_variables(model, wrt, optimizer.wrt)
        graph, params, rest = nnx.split(model, optimizer.wrt, ...)

        def margin_fn(p: Any, b: Any) -> Any:
            # A copy, so that each forward starts from the same random state, and draws the same dropout masks.
            merged = nnx.merge(graph, p, rest, copy=True)
            with refused_batch_statistics(merged):
                logps = pair_logps(lambda ids, mask: (logits_fn or _call)(merged, ids, mask), b)
            return logps, nnx.state(merged, nnx.Not(optimizer.wrt))

        trainable = trained(optimizer.tx, nnx.as_pure(optimizer.opt_state), nnx.as_pure(params))
        forward = JaxForward(margin_fn, params, batch, axis_name, True, of_anchor, trainable=trainable)
        result, metrics, grads = gradients(forward, batch, gamma, rng)
        nnx.update(model, forward.aux)
        optimizer.update(*(() if isinstance(optimizer, nnx.ModelAndOptimizer) else (model,)), grads)
        return metrics, result

    @jax.jit
    def linen_step(state: Any, batch: Any, gamma: Any, rng: Any) -> tuple[Any, Metrics, StepResult]:
        fn = linen_logits(state, logits_fn, rng, elsewhere=config.direction == "gaussian")

        def margin_fn(p: Any, b: Any) -> Any:
            return pair_logps(lambda ids, mask: fn(p, ids, mask), b)

        trainable = trained(state.tx, state.opt_state, state.params)
        with named_dropout("call train_step(state, batch, rng=key), with a new key each step"):
            forward = JaxForward(margin_fn, state.params, batch, axis_name, config=of_anchor, trainable=trainable)
        result, metrics, grads = gradients(forward, batch, gamma, rng)
        return state.apply_gradients(grads=grads), metrics, result

    def train_step(*args: Any, gamma: Any = None, rng: Any = None) -> Any:
        returned = dispatched(*args, gamma=gamma, rng=rng)
        # A look waits for the step, so there are few: at calls 8, 64, 512, ...
        if next(calls) in _LOOKS and is_concrete(returned[-1].loss):
            watch.see(returned[-2])
        return returned

    def dispatched(*args: Any, gamma: Any, rng: Any) -> Any:
        if len(args) == 2 and isinstance(args[0], nnx.ModelAndOptimizer):
            args = (args[0].model, *args)
        if len(args) == 3 and isinstance(args[0], nnx.Module) and isinstance(args[1], nnx.Optimizer):
            if isinstance(args[1], nnx.ModelAndOptimizer) and args[1].model is not args[0]:
                raise ValueError(
                    "the nnx.ModelAndOptimizer holds another model than the one given: give the same, or none"
                )
            batch = arrays(args[2], ids_alone=logits_fn is None)
            return nnx_step(args[0], args[1], batch, by_pair(gamma, batch), rng)
        if len(args) == 2 and hasattr(args[0], "apply_gradients"):
            batch = arrays(args[1], ids_alone=logits_fn is None)
            return linen_step(args[0], batch, by_pair(gamma, batch), rng)
        kinds = ", ".join(type(x).__name__ for x in args)
        raise TypeError(
            f"train_step takes (nnx.Module, nnx.Optimizer, batch), or (TrainState, batch) with Linen; got ({kinds})"
        )

    return train_step


def make_eval_step(
    logits_fn: LogitsFn | None = None,
    config: GAPOConfig | None = None,
    *,
    objective: str | Objective | Callable[[LogProbs], jax.Array] = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
) -> Callable[..., Metrics]:
    """A jitted evaluation: `eval_step(model_or_state, batch) -> metrics`, without an anchor and without dropout.

    An NNX model is evaluated as after `model.eval()`, and stays in the mode that it is in.

    Args:
        logits_fn: as in `make_train_step`.
        config: likewise.
        objective: likewise.
        objective_settings: likewise.

    Returns:
        `eval_step`. Its metrics are means over the pairs: the objective's loss under "loss", without an SFT term, and
        the rewards under TRL's keys. An objective with an anchor has the probe's loss (method document, step 6).
    """
    config = step_settings(config, getattr(objective, "name", objective), objective_settings)
    loss = resolve(objective, config, objective_settings)

    def measure(outputs: tuple[jax.Array, jax.Array], batch: Mapping[str, jax.Array]) -> Metrics:
        if loss.evaluated.needs_reference:
            require_reference(loss.name, batch)
        logps = LogProbs.of_step(outputs, BatchConstants.of(batch))
        return evaluation_metrics(evaluation_columns(loss, logps), config)

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
    """(chosen_logps, rejected_logps), each (N,), nats per token, from one call of `logits(input_ids, attention_mask)`.

    Args:
        logits: gives logits (2N, seq, vocab), chosen rows first.
        batch: the columns of `gapo.data.collate_pairs`.

    Raises:
        TypeError: `logits` returns anything but an array.
    """

    def checked(ids: jax.Array, mask: jax.Array) -> jax.Array:
        returned = logits(ids, mask)
        if not isinstance(returned, jax.Array):
            raise TypeError(
                f"the model must return logits (batch, seq, vocab), got {type(returned).__name__}: give a logits_fn "
                "that takes them out, such as lambda model, input_ids, attention_mask: model(input_ids).logits"
            )
        return returned

    return pairs.pair_logps(checked, {name: jnp.asarray(batch[name]) for name in pairs.COLUMNS})


def _call(model: Any, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    return model(input_ids)


__all__ = ["make_eval_step", "make_train_step", "pair_logps"]
