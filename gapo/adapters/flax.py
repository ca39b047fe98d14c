"""GAPO in Flax: a training step for NNX modules, and for Linen's `TrainState`. optax makes the update.

One batch takes this way, whatever the objective: `pair_logps` gives the log-probabilities of both sides from one call
of the model, `JaxForward` linearises it, `gapo.step.run` makes the cotangents, and a pullback gives the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from gapo._extras import missing

try:
    import jax
    from flax import nnx
except ModuleNotFoundError as error:
    raise missing("gapo.adapters.flax", "flax", error) from error

from gapo._namespace import is_concrete
from gapo.adapters.flax_inputs import (
    LogitsFn,
    arrays,
    by_pair,
    linen_logits,
    named_dropout,
    require_same_variables,
    trained,
)
from gapo.adapters.flax_loss import make_loss
from gapo.adapters.flax_pairs import (
    Metrics,
    ObjectiveLike,
    PairStep,
    linen_margin_fn,
    measured,
    nnx_margin_fn,
    nnx_measured,
    pair_logps,
)
from gapo.config import GAPOConfig
from gapo.logp_options import LogpOptions
from gapo.result import StepResult
from gapo.reweighting import Watch

_NOT_GIVEN: Any = object()
_LOOKS = tuple(8**k for k in range(1, 9))  # calls of a train step after which its weights are looked at


def make_train_step(
    logits_fn: LogitsFn | None = None,
    config: GAPOConfig | None = None,
    *,
    objective: ObjectiveLike = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    wrt: Any = None,
    axis_name: str | None = None,
    donate: bool = False,
) -> Callable[..., Any]:
    """A jitted training step: GAPO's, or that of another objective.

    For NNX: `train_step(model, optimizer, batch, *, gamma=None, rng=None) -> (metrics, result)`, which updates `model`
    and `optimizer` in place. For Linen: `train_step(state, batch, *, gamma=None, rng=None) -> (state, metrics,
    result)`. An objective with running statistics also needs `running`. Accumulate gradients with `optax.MultiSteps`.
    Arrays on a mesh are taken as they are.

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
        ld_alpha: LD-DPO's alpha in [0, 1]: how much the tail of a pair's longer answer counts in its log-probability;
            None for 1. The reference must be measured with the same,
            `gapo.data.with_reference_logps(..., ld_alpha=...)`.
        use_weighting: whether each pair's loss is multiplied by WPO's weight (`gapo.token_weights.wpo_weights`, without
            a cap), which carries no gradient.
        wrt: filter of the NNX variables that train; None for the optimizer's own, as in
            `nnx.Optimizer(..., wrt=nnx.LoRAParam)`. A filter that selects other variables is refused.
        axis_name: data axis of a surrounding `shard_map`, whose members share one anchor. The step averages the
            gradients over it; its caller averages nothing.
        donate: whether the step may write its results into the memory of its inputs: weights, optimizer state and
            random state, so that they exist once and not twice. Then no array that was taken out of the model, the
            optimizer or the `TrainState` before a step may be read after it, by you or by another object that shares it
            (JAX raises). In Linen go on with the returned state alone. A step that fails while it runs, as for lack of
            memory, leaves nothing to go on with but a checkpoint. The batch is never donated.

    Returns:
        `train_step`. `batch` has the columns of `gapo.data.collate_pairs`, {chosen,rejected}_{input_ids,
        attention_mask,labels}, each (N, seq), and reference log-probabilities (N,) where the objective needs them.
        `metrics` are scalars: "loss", TRL's keys and "gapo/". `result` is the `gapo.StepResult`; its fields of the
        anchor are None for an objective without one. `gamma`, a number or (N,), overrides the objective's. `rng` draws
        the perturbation of direction="gaussian". In Linen it draws the dropout masks too, the same ones for the clean
        forward and the anchor's: pass a new key each step. NNX modules draw from their own. `running` is the last
        step's `result.running`, and None at the first step. The step keeps none itself, since a checkpoint would miss
        them; so an objective with running statistics is refused where `running` is left out. The step that first
        has them compiles once more.

    Raises:
        TypeError, ValueError: an unknown objective, or settings that it does not have. From `train_step`: columns that
            are missing or do not fit; padding that the default call would not see; a `wrt` other than the optimizer's;
            an `rng` that nothing takes; statistics of the batch in the forward (`nnx.BatchNorm` in training mode); no
            `running`, or that of another objective.

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
    options = LogpOptions(ld_alpha, use_weighting)
    step = PairStep.of(config, objective, objective_settings, options, axis_name)

    def nnx_step(
        model: Any, optimizer: Any, batch: Any, inputs: Any, running_passed: bool
    ) -> tuple[Metrics, StepResult]:
        require_same_variables(model, wrt, optimizer.wrt)
        graph, params, rest = nnx.split(model, optimizer.wrt, ...)
        trainable = trained(optimizer.tx, nnx.as_pure(optimizer.opt_state), nnx.as_pure(params))
        margin_fn = nnx_margin_fn(logits_fn, graph, rest, changed=nnx.Not(optimizer.wrt), options=options)
        result, metrics, grads, state = step.gradients(margin_fn, params, batch, trainable, **inputs)
        _require_running(step.loss.name, result, running_passed)
        nnx.update(model, state)
        optimizer.update(*(() if isinstance(optimizer, nnx.ModelAndOptimizer) else (model,)), grads)
        return metrics, result

    def linen_step(state: Any, batch: Any, inputs: Any, running_passed: bool) -> tuple[Any, Metrics, StepResult]:
        fn = linen_logits(state, logits_fn, inputs["rng"], elsewhere=step.config.direction == "gaussian")
        trainable = trained(state.tx, state.opt_state, state.params)
        with named_dropout("call train_step(state, batch, rng=key), with a new key each step"):
            result, metrics, grads, _ = step.gradients(
                linen_margin_fn(fn, options), state.params, batch, trainable, **inputs
            )
        _require_running(step.loss.name, result, running_passed)
        return state.apply_gradients(grads=grads), metrics, result

    watch, calls = Watch(step.config, step.loss), count(1)
    nnx_jitted = nnx.jit(nnx_step, static_argnums=4, donate_argnums=(0, 1) if donate else ())
    linen_jitted = jax.jit(linen_step, static_argnums=3, donate_argnums=0 if donate else ())

    def train_step(*args: Any, gamma: Any = None, rng: Any = None, running: Any = _NOT_GIVEN) -> Any:
        returned = dispatched(*args, gamma=gamma, rng=rng, running=running)
        # A look waits for the step, so there are few: at calls 8, 64, 512, ...
        if next(calls) in _LOOKS and is_concrete(returned[-1].loss):
            watch.see(returned[-2])
        return returned

    def dispatched(*args: Any, gamma: Any, rng: Any, running: Any) -> Any:
        running_passed = running is not _NOT_GIVEN
        inputs = {"rng": rng, "running": running or None if running_passed else None}
        if len(args) == 2 and isinstance(args[0], nnx.ModelAndOptimizer):
            args = (args[0].model, *args)
        if len(args) == 3 and isinstance(args[0], nnx.Module) and isinstance(args[1], nnx.Optimizer):
            if isinstance(args[1], nnx.ModelAndOptimizer) and args[1].model is not args[0]:
                raise ValueError(
                    "the nnx.ModelAndOptimizer holds another model than the one given: give the same, or none"
                )
            batch = arrays(args[2], ids_alone=logits_fn is None, options=options)
            return nnx_jitted(args[0], args[1], batch, {**inputs, "gamma": by_pair(gamma, batch)}, running_passed)
        if len(args) == 2 and hasattr(args[0], "apply_gradients"):
            batch = arrays(args[1], ids_alone=logits_fn is None, options=options)
            return linen_jitted(args[0], batch, {**inputs, "gamma": by_pair(gamma, batch)}, running_passed)
        kinds = ", ".join(type(x).__name__ for x in args)
        raise TypeError(
            f"train_step takes (nnx.Module, nnx.Optimizer, batch), or (TrainState, batch) with Linen; got ({kinds})"
        )

    return train_step


def make_eval_step(
    logits_fn: LogitsFn | None = None,
    config: GAPOConfig | None = None,
    *,
    objective: ObjectiveLike = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> Callable[..., Metrics]:
    """A jitted evaluation: `eval_step(model_or_state, batch) -> metrics`, without an anchor and without dropout.

    An NNX model is evaluated as after `model.eval()`, and stays in the mode that it is in.

    Args:
        logits_fn: as in `make_train_step`.
        config: likewise.
        objective: likewise.
        objective_settings: likewise.
        ld_alpha: likewise.
        use_weighting: likewise.

    Returns:
        `eval_step`. Its metrics are means over the pairs: the objective's loss under "loss", without an SFT term, and
        the rewards under TRL's keys. An objective with an anchor has the probe's loss (method document, step 6).
    """
    options = LogpOptions(ld_alpha, use_weighting)
    step = PairStep.of(config, objective, objective_settings, options)

    @nnx.jit
    def nnx_step(model: Any, batch: Any) -> Metrics:
        model = nnx.clone(model)
        model.eval()
        return step.evaluate(nnx_measured(logits_fn, model, batch, options), batch)

    @jax.jit
    def linen_step(state: Any, batch: Any) -> Metrics:
        fn = linen_logits(state, logits_fn, None)
        with named_dropout("give make_eval_step a logits_fn that applies the module with deterministic=True"):
            return step.evaluate(measured(lambda ids, mask: fn(state.params, ids, mask), batch, options), batch)

    def eval_step(model: Any, batch: Any) -> Metrics:
        model = model.model if isinstance(model, nnx.ModelAndOptimizer) else model
        evaluate = nnx_step if isinstance(model, nnx.Module) else linen_step
        return evaluate(model, arrays(batch, ids_alone=logits_fn is None, options=options))

    return eval_step


def _require_running(name: str, result: StepResult, passed: bool) -> None:
    """Raise ValueError if running statistics would start anew at each step, because the caller forgets them."""
    if result.running is not None and not passed:
        raise ValueError(
            f"objective {name!r} has running statistics ({', '.join(sorted(result.running))}), and train_step keeps "
            "none: pass running=None at the first step, then running=result.running of the step before"
        )


__all__ = ["make_eval_step", "make_loss", "make_train_step", "pair_logps"]
