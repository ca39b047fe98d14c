"""GAPO as a loss, for trainers of Flax models that own their step: the gradient of the loss is the step's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from gapo.adapters.flax_inputs import LogitsFn, arrays, by_pair, linen_logits, named_dropout
from gapo.adapters.flax_pairs import MarginFn, Metrics, ObjectiveLike, PairStep, linen_margin_fn, nnx_margin_fn
from gapo.config import GAPOConfig
from gapo.logp_options import LogpOptions


def make_loss(
    logits_fn: LogitsFn | None = None,
    config: GAPOConfig | None = None,
    *,
    objective: ObjectiveLike = "gapo",
    objective_settings: Mapping[str, Any] | None = None,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    wrt: Any = None,
    axis_name: str | None = None,
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The step as a loss for a trainer that differentiates by itself: `loss(model, batch) -> (loss, metrics)`.

    Under the trainer's `nnx.value_and_grad(loss, has_aux=True)` or `jax.value_and_grad(loss, has_aux=True)` the
    gradient is the one that `make_train_step` would apply, at whatever the trainer differentiates. With g of the step,

        d loss = <g, d theta>

    so a scaled loss has a scaled gradient. A call that is not differentiated is an evaluation: no anchor is taken, and
    the loss is that of `make_eval_step` in the model's present mode.

    Args:
        logits_fn: as in `make_train_step`; for a tree of parameters `logits_fn(params, input_ids, attention_mask)`,
            which must be given.
        config: as in `make_train_step`.
        objective: likewise. One with running statistics is refused, because a loss cannot hand them on.
        objective_settings: likewise.
        ld_alpha: likewise, like the next.
        use_weighting: whether pairs are weighted.
        wrt: which parameters train: a filter of NNX variables, such as `nnx.LoRAParam`. It may also be a function of
            (path, leaf), and for a tree of parameters it must. None for all that the trainer differentiates. The others
            are neither perturbed nor differentiated: their gradient is 0.
        axis_name: data axis of a surrounding `shard_map`, whose members share one anchor. Loss and gradient are then
            the mean over it; the trainer averages nothing.

    Returns:
        `loss(model, batch, gamma=None, rng=None)`. `model` is an `nnx.Module`, whose random state it advances, or a
        pytree of arrays, such as Linen's parameters. `batch`, `gamma` and `rng` are as in `make_train_step`. `metrics`
        are the scalars of `make_train_step`; in an evaluation those under "gapo/" are NaN.

    Raises:
        TypeError, ValueError: as `make_train_step`. From `loss`: `wrt` selects nothing, or what the trainer does not
            differentiate; a tree of parameters without a `logits_fn`.

    Source: method document, "The step".

    >>> from flax import nnx
    >>> from gapo.data import collate_pairs
    >>> row = {"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3]}
    >>> row |= {"chosen_labels": [-100, 2], "rejected_labels": [-100, 3]}
    >>> model = nnx.Sequential(nnx.Embed(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    >>> batch = collate_pairs([row], pad_token_id=0)
    >>> (loss, metrics), grads = nnx.value_and_grad(make_loss(objective="simpo"), has_aux=True)(model, batch)
    >>> bool(loss == metrics["loss"] and max(float(abs(g).max()) for g in jax.tree.leaves(grads)) > 0)
    True
    """
    options = LogpOptions(ld_alpha, use_weighting)
    step = PairStep.of(config, objective, objective_settings, options, axis_name)

    def linen_margin_fn_of(rng: Any) -> MarginFn:
        fn = linen_logits(None, logits_fn, rng, elsewhere=step.config.direction == "gaussian")
        return linen_margin_fn(fn, options)

    def loss(model: Any, batch: Any, gamma: Any = None, rng: Any = None) -> tuple[jax.Array, Metrics]:
        batch = arrays(batch, ids_alone=logits_fn is None, options=options)
        if isinstance(model, nnx.Module):
            graph, tree = nnx.split(model)
            margin_fn_of = lambda rng: nnx_margin_fn(logits_fn, graph, changed=nnx.Not(nnx.Param), options=options)  # noqa: E731
        elif logits_fn is not None:
            tree, margin_fn_of = model, linen_margin_fn_of
        else:
            raise TypeError(
                f"without a logits_fn the model must be an nnx.Module, got {type(model).__name__}: give make_loss a "
                "logits_fn(params, input_ids, attention_mask)"
            )
        with named_dropout("call loss(params, batch, rng=key), with a new key each step"):
            value, metrics, state = _differentiable(step, margin_fn_of, tree, wrt)(
                jax.tree.leaves(tree), batch, by_pair(gamma, batch), rng
            )
        if state:
            nnx.update(model, state)
        return value, metrics

    return loss


def _differentiable(step: PairStep, margin_fn_of: Callable[[Any], MarginFn], tree: Any, wrt: Any) -> Any:
    """`f(leaves of tree, batch, gamma, rng) -> (loss, metrics, state)`, whose derivative by the leaves is the step's.

    The derivative is ready when the value is: the step computes both. `symbolic_zeros` tells which leaves the trainer
    differentiates, also through a `jit` in between.
    """
    structure: Any = jax.tree.structure(tree)
    names, wanted = _selected(tree, wrt)

    def take(leaves: list[Any], trains: Sequence[bool], batch: Any, gamma: Any, rng: Any) -> tuple[Any, list[Any]]:
        result, metrics, grads, state = step.gradients(
            margin_fn_of(rng), structure.unflatten(leaves), batch, trains, gamma=gamma, rng=rng
        )
        if result.running is not None:
            raise ValueError(
                f"objective {step.loss.name!r} has running statistics ({', '.join(sorted(result.running))}), which a "
                "loss cannot hand on to the next step: use gapo.adapters.flax.make_train_step"
            )
        value = step.backend.all_reduce(result.loss, "mean")
        by_leaf = [g if train else None for g, train in zip(jax.tree.leaves(grads), trains, strict=True)]
        return (value, {**metrics, "loss": value}, state), by_leaf

    @jax.custom_vjp
    def f(leaves: list[Any], batch: Any, gamma: Any, rng: Any) -> Any:
        floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        trains = [a and b for a, b in zip(wanted, floating, strict=True)]
        (_, metrics, _), _ = jax.eval_shape(lambda *x: take(x[0], trains, *x[1:]), leaves, batch, gamma, rng)
        logps, (state, weights) = margin_fn_of(rng)(structure.unflatten(leaves), batch)
        evaluation = step.evaluate((logps, weights), batch)
        value = step.backend.all_reduce(evaluation["loss"], "mean")
        absent = {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in metrics.items()}
        return value, {**absent, **evaluation, "loss": value}, state

    def forward(leaves: Any, batch: Any, gamma: Any, rng: Any) -> Any:
        differentiated = [leaf.perturbed for leaf in leaves]
        leaves, *inputs = jax.tree.map(lambda x: x.value, (leaves, batch, gamma, rng))
        missing = [n for n, a, b in zip(names, wanted, differentiated, strict=True) if a and not b]
        if missing and wrt is not None:
            raise ValueError(
                f"make_loss(wrt={wrt}) selects {len(missing)} parameters that the trainer does not differentiate, such "
                f"as {missing[0]}: leave wrt out, or give both the same filter"
            )
        trains = [a and b for a, b in zip(wanted, differentiated, strict=True)]
        if not any(trains):
            raise ValueError(
                f"make_loss(wrt={wrt}) selects none of the {sum(differentiated)} differentiated parameters"
            )
        return take(leaves, trains, *inputs)

    def backward(grads: list[Any], cotangents: Any) -> Any:
        scale = cotangents[0]
        if isinstance(scale, SymbolicZero):
            return None, None, None, None
        return [None if g is None else (scale * g).astype(g.dtype) for g in grads], None, None, None

    f.defvjp(forward, backward, symbolic_zeros=True)
    return f


def _selected(tree: Any, wrt: Any) -> tuple[list[str], list[bool]]:
    """The name of each leaf, and whether the filter `wrt` selects it."""
    items, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    chosen = nnx.filterlib.to_predicate(... if wrt is None else wrt)
    names, wanted = [], []
    for path, item in items:
        keys = tuple(map(_key, path))
        count = len(jax.tree.leaves(item))
        names += [".".join(map(str, keys))] * count
        wanted += [bool(chosen(keys, item))] * count
    return names, wanted


def _key(entry: Any) -> Any:
    """The dictionary key, index or attribute name that an entry of a JAX key path stands for."""
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return str(entry)


__all__ = ["make_loss"]
