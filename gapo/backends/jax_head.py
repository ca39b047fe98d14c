"""What a function does with its arguments, read from its jaxpr: which parameters are the output head, which are stacked
layers, which results hang on no argument.

The head is found by what it is, whatever its name, tied to the input embedding or not: the parameter of the last matrix
product before a log-softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# An exponential summed over one of its axes is a softmax's, also behind a mask, a cast or a scale.
_KEEPS_EXP = {"convert_element_type", "select_n", "mul", "reshape", "broadcast_in_dim", "transpose", "copy"}
# What these make of weights is no weight any more: a looked-up embedding, features.
_LOOKS_UP = {"gather", "conv_general_dilated", "ragged_dot_general"}


@dataclass(frozen=True)
class Reading:
    """What a jaxpr tells of named parameters.

    Attributes:
        head: those of the output head: its matrix, its bias, and both factors of an adapter beside it. None where no
            log-softmax of a product's result was seen.
        stacked: those that a scan goes through, a layer at a time.
    """

    head: frozenset[str] | None
    stacked: frozenset[str]


def read(fn: Callable[[list[Any]], Any], names: Sequence[str], leaves: list[Any]) -> Reading:
    """Trace `fn(leaves)` and tell what it does with `leaves`, which `names` names.

    Raises:
        jax.errors.JAXTypeError: `fn` cannot be traced, since it looks at values.
    """
    closed = jax.make_jaxpr(fn)(leaves)
    reader = _Reader()
    outputs = reader.run(closed.jaxpr, [_Value(frozenset({name})) for name in names], ())
    return Reading(reader.head(_join(outputs)), frozenset(reader.stacked))


def depends(fn: Callable[[Any], Any], args: Any) -> list[bool]:
    """For each leaf of `fn(args)` whether it is computed from any entry of `args`, choices aside."""
    closed = jax.make_jaxpr(fn)(args)
    outputs = _Reader().run(closed.jaxpr, [_Value(frozenset({"args"})) for _ in closed.jaxpr.invars], ())
    return [bool(output.weights or output.products) for output in outputs]


class Readings:
    """Readings of one function, kept from step to step as `jax.jit` keeps its traces: by function and shapes."""

    def __init__(self) -> None:
        self._fn: Any = None
        self._found: dict[Hashable, Reading] = {}

    def of(self, fn: Any, key: Hashable | None, make: Callable[[], Reading]) -> Reading:
        """The reading of `fn` under `key`, from `make` the first time; under None it is not kept."""
        if self._fn is not fn:
            self._fn, self._found = fn, {}
        if key in self._found:
            return self._found[key]
        try:
            reading = make()
        except jax.errors.JAXTypeError:  # a function that looks at values cannot be traced
            reading = Reading(None, frozenset())
        if key is not None:
            self._found[key] = reading
        return reading


def signature(tree: Any) -> Hashable | None:
    """Structure, shapes, dtypes and whatever is no array; None under a trace, which lasts for one step."""
    leaves, structure = jax.tree.flatten(tree)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    found = (structure, *((x.shape, x.dtype) if hasattr(x, "dtype") else x for x in leaves))
    try:
        hash(found)
    except TypeError:
        return None
    return found


@dataclass(eq=False)
class _Product:
    """A matrix product with weights: of which parameters, the sizes of their own axes in the result, how many entries
    are summed, and the products that its other side comes from.
    """

    names: frozenset[str] = frozenset()
    free: tuple[int, ...] = ()
    summed: int = 0
    behind: frozenset[_Product] = frozenset()
    softmaxed: bool = field(default=False)


@dataclass(frozen=True)
class _Value:
    """An array: the parameters in it that went through no product, the last products it descends from, and whether it
    is an exponential. Without products it is a weight; with neither a constant.
    """

    weights: frozenset[str] = frozenset()
    products: frozenset[_Product] = frozenset()
    is_exp: bool = False

    @property
    def is_weight(self) -> bool:
        return bool(self.weights) and not self.products


class _Reader:
    """Runs jaxprs on `_Value`s. A product is known by its path: the positions of its equation and of the calls
    around it.
    """

    def __init__(self) -> None:
        self._products: dict[tuple[int, ...], _Product] = {}
        self.stacked: set[str] = set()

    def head(self, outputs: _Value) -> frozenset[str] | None:
        heads = {product for product in outputs.products if product.softmaxed}
        if not heads:
            return None
        whole = max(heads, key=lambda product: product.summed)
        # A low-rank factor reads what the whole matrix reads, and feeds a smaller product beside it.
        factors = {a for b in heads if b.summed < whole.summed for a in b.behind if a.behind == whole.behind}
        return outputs.weights.union(*(product.names for product in heads | factors))

    def run(self, jaxpr: Jaxpr, args: Sequence[_Value], path: tuple[int, ...]) -> list[_Value]:
        known: dict[Any, _Value] = dict(zip(jaxpr.invars, args, strict=True))

        def value(atom: Any) -> _Value:
            return _Value() if isinstance(atom, Literal) else known.get(atom, _Value())

        for i, eqn in enumerate(jaxpr.eqns):
            found = self._apply(eqn, [value(atom) for atom in eqn.invars], (*path, i))
            known.update(zip(eqn.outvars, found, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def _apply(self, eqn: JaxprEqn, args: list[_Value], path: tuple[int, ...]) -> list[_Value]:
        kind = eqn.primitive.name
        both = _join(args[1:] if kind == "select_n" else args)  # of a choice, what is chosen from
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
        opaque = any(isinstance(param, (Jaxpr, ClosedJaxpr)) for param in eqn.params.values())
        opaque = (opaque or kind == "pallas_call") and bool(both.weights or both.products)
        if opaque or (kind in _LOOKS_UP and args[0].is_weight):
            found = [_Value(products=frozenset({self._product(path, behind=both.products)}))]
            return found * len(eqn.outvars)
        if kind == "reduce_sum" and both.is_exp:
            self._softmax(both, [_shape(eqn.invars[0])[axis] for axis in eqn.params["axes"]])
        is_exp = kind in ("exp", "exp2") or (both.is_exp and kind in _KEEPS_EXP)
        return [_Value(both.weights, both.products, is_exp)] * len(eqn.outvars)

    def _dot(self, eqn: JaxprEqn, left: _Value, right: _Value, path: tuple[int, ...]) -> _Value:
        contracted, batched = eqn.params["dimension_numbers"]
        both = _join([left, right])
        unchanged = _Value(both.weights, both.products)
        if not both.products and left.is_weight == right.is_weight:
            return unchanged  # of two weights, such as an adapter's factors, it is a weight; of constants a constant
        if left.products and right.products:  # attention: a product of activations belongs to no parameter
            return _Value(products=frozenset({self._product(path, behind=both.products)}))
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
        """Note whose result was the logits: an axis of theirs is summed, whole but for a vocabulary's padding."""
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
        """Run `body` on constants, carries and slices until its carries tell nothing new."""
        carries = len(args) - consts if carries is None else carries
        fixed, carried, sliced = args[:consts], args[consts : consts + carries], args[consts + carries :]
        while True:
            found = self.run(body, [*fixed, *carried, *sliced], path)
            new = [_join(pair) for pair in zip(carried, found[:carries], strict=True)]
            if new == carried:
                return [*carried, *found[carries:]]
            carried = new


def _join(values: Sequence[_Value]) -> _Value:
    weights = frozenset().union(*(value.weights for value in values))
    products = frozenset().union(*(value.products for value in values))
    return _Value(weights, products, any(value.is_exp for value in values))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _called(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxpr that an equation calls on its own inputs and outputs: of jit, remat, shard_map, custom gradients."""
    for param in eqn.params.values():
        jaxpr = param.jaxpr if isinstance(param, ClosedJaxpr) else param
        if not isinstance(jaxpr, Jaxpr):
            continue
        if (len(jaxpr.invars), len(jaxpr.outvars)) == (len(eqn.invars), len(eqn.outvars)):
            yield jaxpr
