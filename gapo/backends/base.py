"""The protocol between the step and a framework: a few verbs, each with the reason why the Array API cannot say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from gapo._namespace import Array, Namespace
from gapo.config import GAPOConfig

# What `margin_fn(params, batch)` returns: margins (N,), or (chosen_logps, rejected_logps), each (N,).
MarginFn = Callable[[Any, Any], Any]
# A rule for one parameter: (name, theta) -> array of the shape of theta.
LeafRule = Callable[[str, Array], Array]
# What the gradient of a step is: cotangents on the clean outputs, or, taken at the anchor, the gradients by name.
Update = Sequence[Array] | Mapping[str, Array]


class Forward(Protocol):
    """One clean forward of a batch, and its pullback. The parameters stay as they are."""

    @property
    def outputs(self) -> tuple[Array, ...]:
        """(margins,), or (chosen_logps, rejected_logps); each (N,)."""

    @property
    def parameters(self) -> dict[str, Array]:
        """Every trainable parameter by name."""

    def pullback(self, cotangents: Sequence[Array], names: Iterable[str] | None = None) -> dict[str, Array]:
        """Gradients of `sum_j <cotangents[j], outputs[j]>` by the named parameters; 0 for one that was not used.

        Called once, without `names`, for all parameters, after which the forward is spent. On an `AnchorForward` the
        probe calls it before, with `names`; a backend may make the second call cheap.
        """


class AnchorForward(Forward, Protocol):
    """A clean forward of which an anchor can be asked."""

    @property
    def head(self) -> Iterable[str]:
        """Names among `parameters` that belong to the output head."""

    def half_compute(self) -> bool:
        """Whether the clean forward computed with less than float32's precision: in 16 bits, or by TF32 products.

        There a perturbation that is added to the weights is rounded, whatever their own dtype, which is not asked about
        here. False also where it cannot be seen. Asked before the update's pullback.
        """

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[Array, ...]:
        """Outputs with `move(name, theta)` in place of the named parameters; no gradient, the same dropout masks.

        In-place backends call `move` parameter by parameter, so that one full copy is alive, and put theta back bit for
        bit whatever happens. Writing to a framework's parameters is not in the Array API.
        """

    def pulled_at(
        self, move: LeafRule, names: Iterable[str], cotangents: Callable[[tuple[Array, ...]], Sequence[Array]]
    ) -> dict[str, Array]:
        """As `at`, with gradient: those of `sum_j <c[j], outputs[j]>` by all parameters at the moved weights.

        c is `cotangents(outputs)`, called once with the outputs there. Asked after the probe's pullback, and last of
        all: the clean forward is spent. theta is back bit for bit, whatever happens.
        """

    def directional(self, delta: LeafRule, names: Iterable[str]) -> Array:
        """Derivative of each pair's margin along `delta(name, theta)`, (N,): `<grad M_i, delta>`, never rounded."""


class Backend(Protocol):
    """A framework. Gradients, parameters, random numbers and ranks differ; the arithmetic is the Array API's."""

    @property
    def xp(self) -> Namespace:
        """The framework's Array-API namespace."""

    def forward(
        self,
        margin_fn: MarginFn,
        params: Any,
        batch: Any,
        config: GAPOConfig,
        *,
        anchor: bool = True,
        by_side: bool = False,
    ) -> Forward:
        """Run the clean forward so that it can be pulled back: automatic differentiation is each framework's own.

        The rest tells what will be asked of it, so that a backend can choose its way.

        Args:
            margin_fn: of (params, batch).
            params: the framework's own form of parameters.
            batch: handed to `margin_fn`.
            config: settings of the step.
            anchor: whether probe and anchor follow, so that it must be an `AnchorForward`. With
                `config.updates_at_anchor` the update is taken by `pulled_at`.
            by_side: whether the update's cotangents on chosen and rejected log-probabilities may differ by more than
                their sign.
        """

    def differentiate(
        self, losses: Callable[[tuple[Array, ...]], Array], values: Sequence[Array]
    ) -> tuple[Array, tuple[Array, ...]]:
        """`losses(values)`, (N,), and the derivative of their mean by each of `values`, (N,) each; all constants.

        A pair's loss may depend on the others, so the derivative is the framework's own of the whole function.
        """

    def norm(self, x: Array, size: Array | None = None) -> Array:
        """Euclidean norm of one array, whole where ranks hold a shard each: `geometry.norm`, or a kernel as safe.

        A kernel that has no use for `size` leaves it.
        """

    def share_nonzero(self, x: Array) -> Array:
        """Share of the entries of one array that are not 0, a scalar in its dtype, whole likewise."""

    def blocks(self, *arrays: Array) -> Iterable[tuple[Array, ...]]:
        """Arrays of one shape, cut alike into flat blocks, in order; or uncut, in one tuple.

        Arithmetic entry by entry may be done block by block. An eager framework passes over memory once for each
        operation: on blocks that stay in a cache, all of them together take one pass.
        """

    def all_reduce(self, x: Array, op: str) -> Array:
        """`x` reduced by "mean", "max" or "sum" over the data-parallel ranks, which share one anchor."""

    def normal(self, names: Iterable[str], parameters: dict[str, Array], rng: Any) -> dict[str, Array]:
        """A standard normal draw for each named parameter, float32 or wider, equal on all ranks."""

    def call_back(self, condition: Array, tell: Callable[..., None], *values: Array) -> bool:
        """Within a compiled step, call `tell(*values)` on the host if `condition` holds once the step has run.

        False where the framework's compiled programs cannot call the host. Not called outside of them.
        """

    def pack(self, forward: Any, grads: dict[str, Array]) -> Any:
        """Gradients by name in the form the framework's optimisers take; `forward` is the one they came from."""


def gradients(forward: Any, update: Update) -> dict[str, Array]:
    """The gradients by name that a step's update stands for; `forward` is its clean forward."""
    return dict(update) if isinstance(update, Mapping) else forward.pullback(update)


def require_real(kinds: Mapping[str, bool]) -> None:
    """Raise ValueError naming the trainable parameters that are complex: whether each is, by name.

    Their gradients are conjugated or not by framework, and neither |theta| nor the pairs' gaps are defined for them.
    """
    names = [name for name, is_complex in kinds.items() if is_complex]
    if names:
        raise ValueError(
            f"trainable parameters must be real, and {', '.join(map(repr, names[:3]))}{' ...' if names[3:] else ''} "
            f"{'are' if names[1:] else 'is'} complex: freeze what does not train (in JAX keep it out of params). "
            "Real and imaginary parts can train as two real parameters"
        )


def by_pairs(margin_fn: MarginFn) -> MarginFn:
    """Declare that row r of whatever a layer receives belongs to pair r mod N: rejected rows stand behind chosen ones.

    A word to readers: the PyTorch backend asks every margin function, declared or not.
    """
    margin_fn.by_pairs = True  # type: ignore[attr-defined]
    return margin_fn


def outputs_of(returned: Any) -> tuple[Array, ...]:
    """What a `margin_fn` returned, as one or two (N,) arrays. Raises TypeError or ValueError for anything else."""
    outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    accepted = "margin_fn must return margins (N,), or (chosen_logps, rejected_logps), each (N,)"
    if len(outputs) not in (1, 2):
        raise TypeError(f"{accepted}; got {len(outputs)} values")
    for output in outputs:
        if not hasattr(output, "shape"):
            raise TypeError(f"{accepted}; got {type(output).__name__}")
    shapes = [tuple(output.shape) for output in outputs]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise ValueError(f"{accepted}, with N >= 1 pairs; got {', '.join(map(str, shapes))}")
    return outputs


def margins_of(outputs: Sequence[Array]) -> Array:
    """(N,) margins of (margins,) or (chosen_logps, rejected_logps); of their derivatives likewise."""
    return outputs[0] if len(outputs) == 1 else outputs[0] - outputs[1]


def on_outputs(by_margin: Array, outputs: Sequence[Array], xp: Namespace) -> tuple[Array, ...]:
    """The transpose: a cotangent on the margins (N,) as cotangents on `outputs`, in their dtypes."""
    by_output = (by_margin,) if len(outputs) == 1 else (by_margin, -by_margin)
    return tuple(xp.astype(c, output.dtype) for c, output in zip(by_output, outputs, strict=True))
