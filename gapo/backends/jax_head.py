"""Which parameters of a function are the output head, which are stacked layers, which results depend on no argument.

JAX has no modules, and a parameter's name may say nothing. So the head is found by what it does, tied to the input
embedding or not: it is the parameter of the last matrix product before a log-softmax.

The method is abstract interpretation. `_Reader` runs the function's jaxpr on `_Value`s, which stand for arrays and hold
where an array comes from instead of its numbers:

1. A parameter is a weight: `_Value(weights={its name})`. An elementwise operation joins the values of its operands.
2. A matrix product with a weight becomes a `_Product`. The product holds the weight's names, and the sizes of the axes
   that the weight brings into the result: for a head, the vocabulary. The result's value refers to this product alone.
3. An exponential marks its value. Where a marked value is summed over an axis as long as one of its product's own, that
   is a softmax over the vocabulary, and the product made the logits.
4. The head is the weights of those products, among all that the outputs descend from.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# An exponential stays one behind these: a mask, a cast, a scale, a change of layout.
_KEEPS_EXP = {"convert_element_type", "select_n", "mul", "reshape", "broadcast_in_dim", "transpose", "copy"}
# Their results are no weights any more: looked-up embeddings, features of a convolution.
_LOOKS_UP = {"gather", "conv_general_dilated", "ragged_dot_general"}


@dataclass(frozen=True)
class Reading:
    """What a jaxpr says about named parameters.

    Attributes:
        head: names of the output head's parameters: its matrix, its bias, and both factors of an adapter beside it.
            None where no log-softmax of a product's result was seen.
        stacked: names of the parameters that a scan takes one layer at a time.
    """

    head: frozenset[str] | None
    stacked: frozenset[str]


def read(fn: Callable[[list[Any]], Any], names: Sequence[str], leaves: list[Any]) -> Reading:
    """Trace `fn(leaves)` and say what it does with `leaves`, whose names are `names`.

    Raises:
        jax.errors.JAXTypeError: `fn` looks at values, and so cannot be traced.
    """
    closed = jax.make_jaxpr(fn)(leaves)
    reader = _Reader()
    outputs = reader.run(closed.jaxpr, [_Value(frozenset({name})) for name in names], ())
    return Reading(reader.head(_join(outputs)), frozenset(reader.stacked))


def depends(fn: Callable[[Any], Any], args: Any) -> list[bool]:
    """For each leaf of `fn(args)`, whether it is computed from `args`. The condition of a choice does not count."""
    closed = jax.make_jaxpr(fn)(args)
    outputs = _Reader().run(closed.jaxpr, [_Value(frozenset({"args"})) for _ in closed.jaxpr.invars], ())
    return [bool(output.weights or output.products) for output in outputs]


class Readings:
    """The readings of one function by signature, kept from step to step as `jax.jit` keeps its traces."""

    def __init__(self) -> None:
        self._fn: Any = None
        self._by_signature: dict[Hashable, Reading] = {}

    def of(self, fn: Any, key: Hashable | None, make: Callable[[], Reading]) -> Reading:
        """The reading of `fn` under `key`, which `make` makes the first time. With `key` None it is not stored."""
        if self._fn is not fn:
            self._fn, self._by_signature = fn, {}
        if key in self._by_signature:
            return self._by_signature[key]
        try:
            reading = make()
        except jax.errors.JAXTypeError:  # `fn` looks at values: only parameter names remain to go by
            reading = Reading(None, frozenset())
        if key is not None:
            self._by_signature[key] = reading
        return reading


def signature(tree: Any) -> Hashable | None:
    """Structure, shapes, dtypes and every leaf that is no array. None under a trace, which lasts for one step."""
    leaves, structure = jax.tree.flatten(tree)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    key = (structure, *((x.shape, x.dtype) if hasattr(x, "dtype") else x for x in leaves))
    try:
        hash(key)
    except TypeError:
        return None
    return key


@dataclass(eq=False)
class _Product:
    """A matrix product with a weight, or another operation whose result is no weight any more.

    Attributes:
        names: the weight's parameters.
        free: sizes of the weight's axes that are axes of the result too.
        summed: how many entries each sum of the product has.
        behind: the products that the other operand descends from.
        softmaxed: whether the result went through a softmax over one of `free`.
    """

    names: frozenset[str] = frozenset()
    free: tuple[int, ...] = ()
    summed: int = 0
    behind: frozenset[_Product] = frozenset()
    softmaxed: bool = False


@dataclass(frozen=True)
class _Value:
    """An array by its origin. Without products it is a weight; with neither weights nor products a constant.

    Attributes:
        weights: parameters that reached it through no product, such as a bias.
        products: the last products that it descends from.
        is_exp: whether it is an exponential.
    """

    weights: frozenset[str] = frozenset()
    products: frozenset[_Product] = frozenset()
    is_exp: bool = False

    @property
    def is_weight(self) -> bool:
        return bool(self.weights) and not self.products


class _Reader:
    """Runs jaxprs on `_Value`s.

    A product's identity is its path: the position of its equation, and those of the calls around it. So a loop that is
    read several times has each of its products once.
    """

    def __init__(self) -> None:
        self._products: dict[tuple[int, ...], _Product] = {}
        self.stacked: set[str] = set()

    def head(self, outputs: _Value) -> frozenset[str] | None:
        logits = {product for product in outputs.products if product.softmaxed}
        if not logits:
            return None
        # A LoRA adapter on the head adds B (A x) to W x. Both products made logits, and B's sum is the shorter one. A
        # itself made none; it is the product behind B that reads the same x as W does.
        whole = max(logits, key=lambda product: product.summed)
        factors = {a for b in logits if b.summed < whole.summed for a in b.behind if a.behind == whole.behind}
        return outputs.weights.union(*(product.names for product in logits | factors))

    def run(self, jaxpr: Jaxpr, args: Sequence[_Value], path: tuple[int, ...]) -> list[_Value]:
        values: dict[Any, _Value] = dict(zip(jaxpr.invars, args, strict=True))

        def value(atom: Any) -> _Value:
            return _Value() if isinstance(atom, Literal) else values.get(atom, _Value())

        for i, eqn in enumerate(jaxpr.eqns):
            results = self._apply(eqn, [value(atom) for atom in eqn.invars], (*path, i))
            values.update(zip(eqn.outvars, results, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: JaxprEqn, args: list[_Value], path: tuple[int, ...]) -> list[_Value]:
        """The values of an equation's results. `path` is the equation's."""
        kind = eqn.primitive.name
        joined = _join(args[1:] if kind == "select_n" else args)  # a choice's condition brings no numbers
        if kind == "dot_general":
            return [self._dot(eqn, args[0], args[1], path)]
        if kind == "scan":
            return self._scan(eqn, args, path)
        if kind == "while":
            start = eqn.params["cond_nconsts"]
            return self._loop(eqn.params["body_jaxpr"].jaxpr, args[start:], eqn.params["body_nconsts"], path)
        if kind == "cond":
            branches = [self.run(b.jaxpr, args[1:], (*path, i)) for i, b in enumerate(eqn.params["branches"])]
            return [_join(values) for values in zip(*branches, strict=True)]
        called = next(_called(eqn), None)
        if called is not None:
            return self.run(called, args, path)
        # A call that cannot be followed, such as a Pallas kernel, may do anything: it counts as a product of its own.
        opaque = kind == "pallas_call" or any(isinstance(x, (Jaxpr, ClosedJaxpr)) for x in eqn.params.values())
        if (opaque and (joined.weights or joined.products)) or (kind in _LOOKS_UP and args[0].is_weight):
            result = _Value(products=frozenset({self._product(path, behind=joined.products)}))
            return [result] * len(eqn.outvars)
        if kind == "reduce_sum" and joined.is_exp:
            self._softmax(joined, [_shape(eqn.invars[0])[axis] for axis in eqn.params["axes"]])
        is_exp = kind in ("exp", "exp2") or (joined.is_exp and kind in _KEEPS_EXP)
        return [_Value(joined.weights, joined.products, is_exp)] * len(eqn.outvars)

    def _dot(self, eqn: JaxprEqn, left: _Value, right: _Value, path: tuple[int, ...]) -> _Value:
        contracted, batched = eqn.params["dimension_numbers"]
        joined = _join([left, right])
        unchanged = _Value(joined.weights, joined.products)
        if not joined.products and left.is_weight == right.is_weight:
            return unchanged  # of two weights, such as an adapter's factors, it is a weight; of constants a constant
        if left.products and right.products:  # attention: a product of activations belongs to no parameter
            return _Value(products=frozenset({self._product(path, behind=joined.products)}))
        # One operand is an activation, or a constant. The other is the weight.
        side = 0 if left.is_weight or (not right.is_weight and not left.products) else 1
        shape = _shape(eqn.invars[side])
        free = tuple(n for axis, n in enumerate(shape) if axis not in (*contracted[side], *batched[side]))
        weight, other = (left, right) if side == 0 else (right, left)
        if not weight.weights and not free:  # a constant that picks entries, such as targets as one-hot rows
            return unchanged
        summed = prod(shape[axis] for axis in contracted[side])
        return _Value(products=frozenset({self._product(path, weight.weights, free, summed, behind=other.products)}))

    def _product(
        self,
        path: tuple[int, ...],
        names: frozenset[str] = frozenset(),
        free: tuple[int, ...] = (),
        summed: int = 0,
        *,
        behind: frozenset[_Product],
    ) -> _Product:
        product = self._products.setdefault(path, _Product())
        product.names |= names
        product.behind |= behind - {product}
        product.free, product.summed = free, summed
        return product

    def _softmax(self, exponential: _Value, sizes: list[int]) -> None:
        """Mark the products whose result is summed here. A vocabulary's padding may be cut off before the sum."""
        for product in exponential.products:
            product.softmaxed |= any(n // 2 < size <= n for n in product.free for size in sizes)

    def _scan(self, eqn: JaxprEqn, args: list[_Value], path: tuple[int, ...]) -> list[_Value]:
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        for value in args[consts + carries :]:
            self.stacked |= value.weights if value.is_weight else set()
        return self._loop(eqn.params["jaxpr"].jaxpr, args, consts, path, carries)

    def _loop(
        self, body: Jaxpr, args: list[_Value], consts: int, path: tuple[int, ...], carries: int | None = None
    ) -> list[_Value]:
        """Run `body` on constants, carries and slices until its carries gain no new origin."""
        carries = len(args) - consts if carries is None else carries
        fixed, carried, sliced = args[:consts], args[consts : consts + carries], args[consts + carries :]
        while True:
            results = self.run(body, [*fixed, *carried, *sliced], path)
            joined = [_join(pair) for pair in zip(carried, results[:carries], strict=True)]
            if joined == carried:
                return [*carried, *results[carries:]]
            carried = joined


def _join(values: Sequence[_Value]) -> _Value:
    weights = frozenset().union(*(value.weights for value in values))
    products = frozenset().union(*(value.products for value in values))
    return _Value(weights, products, any(value.is_exp for value in values))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _called(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs that an equation calls on its own operands: those of jit, remat, shard_map and custom gradients."""
    for param in eqn.params.values():
        jaxpr = param.jaxpr if isinstance(param, ClosedJaxpr) else param
        if not isinstance(jaxpr, Jaxpr):
            continue
        if (len(jaxpr.invars), len(jaxpr.outvars)) == (len(eqn.invars), len(eqn.outvars)):
            yield jaxpr
