"""The inputs of the Flax steps: models, optimizers and batches, checked before their numbers could be wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import InvalidRngError

from gapo.backends.jax_head import depends
from gapo.data.tokenize import IGNORE_INDEX
from gapo.logp_options import LogpOptions
from gapo.objective import require_number
from gapo.pairs import ANCHOR, COLUMNS, REFERENCE, SIDES

# `logits_fn(model, input_ids, attention_mask) -> (batch, seq, vocab)`. For Linen the model is the tree of parameters,
# and a function with an argument `rngs` receives them.
LogitsFn = Callable[..., jax.Array]


def require_same_variables(model: Any, wrt: Any, of_optimizer: Any) -> None:
    """Raise ValueError if `wrt` and the optimizer's filter select different variables of `model`."""
    if wrt is None:
        return
    asked, held = (set(nnx.to_flat_state(nnx.state(model, f)).paths) for f in (wrt, of_optimizer))
    if asked != held:
        raise ValueError(
            f"make_train_step(wrt={wrt}) asks for {len(asked)} variables, and the optimizer, made with "
            f"wrt={of_optimizer}, holds {len(held)}: leave wrt out, or make the optimizer with the same"
        )


def trained(tx: Any, opt_state: Any, params: Any) -> list[bool]:
    """Whether each parameter trains, that is, whether its update depends on a gradient.

    Under `optax.set_to_zero` it does not.
    """
    return depends(lambda grads: tx.update(grads, opt_state, params)[0], params)


@contextmanager
def refused_batch_statistics(model: Any) -> Iterator[None]:
    """Raise ValueError if the forward in this context normalises by statistics of its batch.

    A forward that does so also updates the running statistics, which is what can be seen.
    """

    def statistics() -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(model, nnx.BatchStat))

    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
    before = statistics()
    yield
    replaced = any(old is not new for old, new in zip(before, statistics(), strict=False))
    if replaced and not all(norm.use_running_average for norm in norms):  # `nnx.remat` replaces even unused statistics
        raise ValueError(
            "batch normalisation in training mode mixes the pairs, and counts their padding, so that no anchor gap "
            "belongs to a pair: set use_running_average=True on nnx.BatchNorm, or use a norm of each token"
        )


def linen_logits(state: Any, logits_fn: LogitsFn | None, rng: Any, elsewhere: bool = False) -> LogitsFn:
    """`logits_fn(params, input_ids, attention_mask)` of a `TrainState`; its dropout masks, if any, come from `rng`.

    Raises:
        ValueError: nothing uses `rng`: neither the function, nor a perturbation `elsewhere`.
    """
    fn = logits_fn or state.apply_fn
    parameters = inspect.signature(fn).parameters
    takes = "rngs" in parameters or (logits_fn is None and any(p.kind == p.VAR_KEYWORD for p in parameters.values()))
    if rng is not None and not takes and not elsewhere:
        raise ValueError(
            "nothing takes the rng: dropout needs a logits_fn(params, input_ids, attention_mask, rngs) that hands rngs "
            'on to apply, and only direction="gaussian" draws a perturbation. Leave rng out if there is no dropout'
        )
    # `JaxBackend.normal` draws the perturbation of parameter i from `fold_in(rng, i)`: stay clear of those.
    keys = {"rngs": {"dropout": jax.random.fold_in(rng, 2**32 - 1)}} if rng is not None and takes else {}
    if logits_fn is None:
        return lambda params, ids, _: fn({"params": params}, ids, **keys)
    return lambda params, ids, mask: fn(params, ids, mask, **keys)


@contextmanager
def named_dropout(way_out: str) -> Iterator[None]:
    """Replace Flax's error about a missing dropout key by a ValueError that says the `way_out`."""
    try:
        yield
    except InvalidRngError as error:
        raise ValueError(f"the model draws random numbers and was given no key: {way_out}") from error


def arrays(batch: Mapping[str, Any], ids_alone: bool, options: LogpOptions) -> dict[str, jax.Array]:
    """The columns of `batch` that the step reads.

    Raises:
        KeyError: a column is missing.
        ValueError: shapes do not fit; the reference was measured with another alpha than that of `options`; or, with
            `ids_alone`, padding stands before a token. Under a trace values cannot raise, and the loss is NaN instead.
    """
    if missing := [name for name in COLUMNS if name not in batch]:
        needed = ", ".join(COLUMNS)
        raise KeyError(f"a batch of pairs needs {needed}; {missing[0]!r} is missing, got {', '.join(batch)}")
    shapes = {name: np.shape(batch[name]) for name in COLUMNS}
    shape = shapes[COLUMNS[0]]
    if len(set(shapes.values())) > 1 or len(shape) != 2:
        raise ValueError(f"the columns of a batch of pairs must be (N, seq), of one shape; got {shapes}")
    batch = options.checked(batch)
    constants = [name for name in (*REFERENCE, *ANCHOR) if name in batch]
    for name in constants:
        if np.shape(batch[name]) != shape[:1]:
            raise ValueError(f"{name} must be (N,) = {shape[:1]}, got {np.shape(batch[name])}")
    columns = {name: jnp.asarray(batch[name]) for name in (*COLUMNS, *constants)}
    for side in SIDES if ids_alone else ():
        mask = batch[f"{side}_attention_mask"]
        if isinstance(mask, jax.core.Tracer):  # without a counted label, the margin of a row is NaN
            before = jnp.any(jnp.diff(mask.astype(jnp.int8)) > 0, axis=-1, keepdims=True)
            columns[f"{side}_labels"] = jnp.where(before, IGNORE_INDEX, columns[f"{side}_labels"])
        else:
            _require_padding_behind(f"{side}_attention_mask", mask)
    return columns


def _require_padding_behind(name: str, mask: Any) -> None:
    """Raise ValueError if a token follows padding, in this process's shards of `mask`."""
    shards = [s.data for s in mask.addressable_shards if s.replica_id == 0] if isinstance(mask, jax.Array) else [mask]
    if any((np.diff(np.asarray(rows).astype(np.int8), axis=-1) > 0).any() for rows in shards):
        raise ValueError(
            f"{name} has padding before a token, and without a logits_fn the model is called with input_ids alone: pad "
            "on the right (padding_side='right'), or give a logits_fn that hands attention_mask to the model"
        )


def by_pair(gamma: Any, batch: Mapping[str, jax.Array]) -> Any:
    """`gamma` as one number for each pair of `batch`, (N,): a jitted step cannot check a traced scalar."""
    if gamma is None or np.ndim(gamma) > 0:
        return gamma
    if not isinstance(gamma, jax.core.Tracer):
        require_number("gamma", gamma, "", lambda v: True)
    return jnp.broadcast_to(gamma, batch[COLUMNS[0]].shape[:1])
