"""The `Backend` verbs on JAX: pure functions over pytrees, also under `jax.jit`, on one device or on a mesh.

One `jax.vjp` serves the whole step. It runs the clean forward. In a compiled step its pullback is evaluated once, and
the gradient of the probe, the gaps and the update are sums over pairs of what that left (`jaxrows`). Where that is not
possible, the pullback gives the probe's gradient and then the update's, and its transpose each margin's derivative
along the perturbation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

from gapo import geometry
from gapo._namespace import is_concrete
from gapo.backends import jax_onepass
from gapo.backends.base import LeafRule, MarginFn, margins_of, outputs_of, require_real
from gapo.backends.jax_head import Reading, Readings, read, signature
from gapo.config import GAPOConfig
from gapo.result import StepResult
from gapo.selection import HEAD_NAME, NO_NUMBERS

jax.tree_util.register_dataclass(StepResult)  # so that it can leave a jitted function


class JaxForward:
    """The clean forward of `margin_fn` and its linearisation: one `jax.vjp`, whose pullback runs once if it can.

    Args:
        margin_fn: as in `gapo.value_and_grad`; with `has_aux` it returns (outputs, aux).
        params: a pytree of arrays.
        batch: passed to `margin_fn`.
        axis_name: data axis of a surrounding `shard_map` or `pmap`, if there is one.
        has_aux: whether `margin_fn` returns an `aux`. The attribute `aux` then holds the clean forward's.
        config: of a step with an anchor, checked for `last_layers`, which needs layers with numbers; None without.
        readings: cache of what `margin_fn` does with its parameters, shared by the steps of one backend.
        trainable: whether each leaf of `params` trains; None for all. Only floating-point leaves ever do.
        by_side: whether the cotangents of an update may be other than (w, -w) on two outputs.

    Raises:
        TypeError: a leaf of `params` is no array.
        ValueError: a parameter is complex, or `last_layers` would count layers that one array holds together.
    """

    def __init__(
        self,
        margin_fn: MarginFn,
        params: Any,
        batch: Any,
        axis_name: str | None = None,
        has_aux: bool = False,
        config: GAPOConfig | None = None,
        readings: Readings | None = None,
        trainable: Sequence[bool] | None = None,
        by_side: bool = True,
    ) -> None:
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        self._leaves = [_array(name, leaf) for name, (_, leaf) in zip(self._names, leaves, strict=True)]
        trainable = [True] * len(leaves) if trainable is None else trainable
        require_real({n: jnp.iscomplexobj(leaf) for n, leaf in zip(self._names, self._leaves, strict=True)})
        self.parameters: dict[str, Any] = {
            name: leaf
            for name, leaf, trains in zip(self._names, self._leaves, trainable, strict=True)
            if trains and jnp.issubdtype(leaf.dtype, jnp.floating)
        }
        self._margin_fn, self._batch, self._has_aux, self._by_side = margin_fn, batch, has_aux, by_side
        self._axis_name = axis_name
        # An update at the anchor is another backward, of other weights: one pass would save nothing.
        self._one_pass = config is None or not config.updates_at_anchor
        self._readings = Readings() if readings is None else readings
        self._by_pair: jax_onepass.PairGradients | None = None
        # Within `shard_map`, JAX sums the gradient of an invariant parameter over the axis by itself. Cast to varying
        # first, it stays this member's own, and the step averages it where the method says so.
        self._varying = {name: _varying(leaf, axis_name) for name, leaf in self.parameters.items()}
        self.outputs, self._vjp, self.aux = jax.vjp(self._run, self._varying, has_aux=True)
        if config is not None and config.last_layers is not None:
            self._require_numbered_layers(config.last_layers)

    @property
    def head(self) -> Iterator[str]:
        """Names of the output head's parameters. `margin_fn` is traced once the first name is requested."""
        by_name = {name for name in self.parameters if HEAD_NAME.search(name)}
        head = by_name | (self._read().head or frozenset())
        # A head that is the whole model means a bare product, not a language model: there only names count.
        yield from (head if len(head) < len(self.parameters) else by_name)

    def _require_numbered_layers(self, last_layers: int) -> None:
        stacked = [name for name in self.parameters if name in self._read().stacked]
        if stacked:
            raise ValueError(
                f"last_layers={last_layers} counts layers by the numbers in their names, but {', '.join(stacked[:3])} "
                f"hold all layers of a scan: {NO_NUMBERS}"
            )

    def _read(self) -> Reading:
        names, leaves = list(self._varying), list(self._varying.values())

        def run(leaves: list[Array]) -> tuple[Array, ...]:
            return self._run(dict(zip(names, leaves, strict=True)))[0]

        key = signature((self._tree, self._leaves, self._batch))
        return self._readings.of(self._margin_fn, key, lambda: read(run, names, leaves))

    def _run(self, parameters: dict[str, Array]) -> tuple[tuple[Array, ...], Any]:
        leaves = [parameters.get(name, leaf) for name, leaf in zip(self._names, self._leaves, strict=True)]
        returned = self._margin_fn(jax.tree_util.tree_unflatten(self._tree, leaves), self._batch)
        outputs, aux = returned if self._has_aux else (returned, None)
        return outputs_of(outputs), aux

    def pullback(self, cotangents: Sequence[Array], names: Iterable[str] | None = None) -> dict[str, Array]:
        probe = names is not None  # after which an update follows
        if probe and self._one_pass and not is_concrete(self.outputs[0]):
            self._by_pair = jax_onepass.gradients_by_pair(self._pullback_jaxpr, self.outputs, self._by_side)
        if self._by_pair is None:
            (grads,) = self._vjp(tuple(cotangents))
        else:
            grads = dict(zip(self.parameters, self._by_pair.weighted(cotangents), strict=True))
        return {name: grads[name] for name in (self.parameters if names is None else names)}

    def half_compute(self) -> bool:
        # The pullback's jaxpr holds the derivative of every operation between parameters and outputs, in its dtype.
        return _rounds(self._pullback_jaxpr.jaxpr)

    @cached_property
    def _pullback_jaxpr(self) -> ClosedJaxpr:
        def pullback(*cotangents: Array) -> list[Array]:
            (grads,) = self._vjp(cotangents)
            return [grads[name] for name in self.parameters]

        return jax.make_jaxpr(pullback)(*self.outputs)

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[Array, ...]:
        moved = {name: move(name, self.parameters[name]) for name in names}
        return self._run({**self.parameters, **moved})[0]

    def pulled_at(
        self, move: LeafRule, names: Iterable[str], cotangents: Callable[[tuple[Array, ...]], Sequence[Array]]
    ) -> dict[str, Array]:
        moved = {name: _varying(move(name, self.parameters[name]), self._axis_name) for name in names}
        outputs, pull, _ = jax.vjp(self._run, {**self._varying, **moved}, has_aux=True)
        (grads,) = pull(tuple(cotangents(outputs)))
        return dict(grads)

    def directional(self, delta: LeafRule, names: Iterable[str]) -> Array:
        if self._by_pair is not None:
            names = set(names)
            direction = [
                delta(name, theta).astype(theta.dtype) if name in names else jnp.zeros_like(theta)
                for name, theta in self._varying.items()
            ]
            return self._by_pair.along(direction)
        # The pullback is the linear map J^T, so that its transpose is J: no second linearisation, no third forward.
        push = jax.linear_transpose(self._vjp, self.outputs)
        tangents = {name: jnp.zeros_like(theta) for name, theta in self._varying.items()}
        for name in names:
            theta = self.parameters[name]
            tangents[name] += delta(name, theta).astype(theta.dtype)
        (along,) = push((tangents,))
        return margins_of(along)

    def pack(self, grads: dict[str, Array]) -> Any:
        """`grads` as a tree like the parameters: 0 for a frozen leaf, and `jax.grad`'s float0 for one of integers."""

        def zero(leaf: Array) -> Any:
            floating = jnp.issubdtype(leaf.dtype, jnp.floating)
            return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)

        leaves = [
            grads[name] if name in grads else zero(leaf) for name, leaf in zip(self._names, self._leaves, strict=True)
        ]
        return jax.tree_util.tree_unflatten(self._tree, leaves)


class JaxBackend:
    """The `Backend` verbs on JAX.

    Under `jit` sharded arrays are global, and no verb needs to know of ranks. In `shard_map` and `pmap`, `axis_name`
    names the data axis whose members share one anchor.
    """

    xp = jnp

    def __init__(self, axis_name: str | None = None) -> None:
        self._axis_name = axis_name
        self._readings = Readings()

    def forward(
        self,
        margin_fn: MarginFn,
        params: Any,
        batch: Any,
        config: GAPOConfig,
        *,
        anchor: bool = True,
        by_side: bool = False,
    ) -> JaxForward:
        return JaxForward(
            margin_fn, params, batch, self._axis_name, config=config, readings=self._readings, by_side=by_side
        )

    def differentiate(
        self, losses: Callable[[tuple[Array, ...]], Array], values: Sequence[Array]
    ) -> tuple[Array, tuple[Array, ...]]:
        by_pair, pull = jax.vjp(losses, tuple(values))
        (slopes,) = pull(jnp.full_like(by_pair, 1 / by_pair.shape[0]))
        return by_pair, slopes

    def norm(self, x: Array, size: Array | None = None) -> Array:
        return _norm(x, size)

    def share_nonzero(self, x: Array) -> Array:
        return jnp.mean((x != 0).astype(x.dtype))

    def blocks(self, *arrays: Array) -> list[tuple[Array, ...]]:
        return [arrays]

    def all_reduce(self, x: Array, op: str) -> Array:
        if self._axis_name is None:
            return x
        reduce = {"mean": jax.lax.pmean, "max": jax.lax.pmax, "sum": jax.lax.psum}[op]
        return reduce(x, self._axis_name)

    def normal(self, names: Iterable[str], parameters: dict[str, Array], rng: Any) -> dict[str, Array]:
        if rng is None:
            raise ValueError(
                'direction="gaussian" draws random numbers: call step(params, batch, rng=jax.random.key(seed))'
            )
        draws = {}
        for i, name in enumerate(names):
            theta = parameters[name]
            dtype = jnp.promote_types(theta.dtype, jnp.float32)
            draws[name] = jax.random.normal(jax.random.fold_in(rng, i), theta.shape, dtype)
        return draws

    def call_back(self, condition: Array, tell: Callable[..., None], *values: Array) -> bool:
        jax.lax.cond(condition, lambda *v: jax.debug.callback(tell, *v), lambda *v: None, *values)
        return True

    def pack(self, forward: JaxForward, grads: dict[str, Array]) -> Any:
        return forward.pack(grads)


@jax.jit  # traced once for each shape
def _norm(x: Array, size: Array | None) -> Array:
    return geometry.norm(x, jnp, size)


def _array(name: str, leaf: Any) -> Array:
    """A leaf of the parameters as an array, or TypeError that names it."""
    number = isinstance(leaf, (np.ndarray, np.generic, float, int)) and np.asarray(leaf).dtype.kind not in "OSUMm"
    if number or isinstance(leaf, jax.Array):
        return jnp.asarray(leaf)
    raise TypeError(
        f"params must be a pytree of arrays; the leaf {name!r} is of type {type(leaf).__name__}. Pass the arrays "
        "alone, and let margin_fn put the rest back. For an Equinox module: params, static = eqx.partition(model, "
        "eqx.is_inexact_array), and eqx.combine(params, static) in margin_fn"
    )


def _rounds(jaxpr: Any) -> bool:
    """Whether a jaxpr computes in fewer than 32 bits, or multiplies matrices with less than float32's precision."""
    for eqn in jaxpr.eqns:
        if any(_is_half(getattr(v.aval, "dtype", None)) for v in eqn.outvars):
            return True
        if eqn.primitive.name in ("dot_general", "conv_general_dilated") and jax.default_backend() != "cpu":
            # By default accelerators multiply float32 matrices in bfloat16 or TF32.
            wide = eqn.outvars[0].aval.dtype == jnp.float64 or "HIGHEST" in str(eqn.params["precision"])
            if not (wide or "F32_F32_F32" in str(eqn.params["precision"])):
                return True
        if any(_rounds(inner) for value in eqn.params.values() for inner in _jaxprs_in(value)):
            return True
    return False


def _jaxprs_in(value: Any) -> list[Any]:
    """The jaxprs in one parameter of an equation: a scan's body, a branch, a rematerialised layer."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    opened = [getattr(v, "jaxpr", v) for v in values]  # a ClosedJaxpr's own
    return [v for v in opened if hasattr(v, "eqns")]


def _is_half(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def _varying(x: Array, axis_name: str | None) -> Array:
    """`x`, cast to varying over the mesh axis if it is invariant."""
    if axis_name is None:
        return x
    kind: Any = jax.typeof(x)
    return x if axis_name in kind.mat.varying else jax.lax.pcast(x, axis_name, to="varying")


def make_backend(axis_name: str | None = None) -> JaxBackend:
    """The JAX backend; `axis_name` is the data axis of a surrounding `shard_map` or `pmap`, if there is one."""
    return JaxBackend(axis_name)
