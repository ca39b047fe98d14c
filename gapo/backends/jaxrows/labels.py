"""Whose numbers an array holds: labels of its entries, and how each operation carries them on.

A pullback is linear in its cotangents, one for each group of a batch. An entry of an intermediate array has label g if
it is linear in cotangent g alone, and -1 if it is 0. Labels are an integer array that broadcasts to the array's shape:
an axis along which they do not change has length 1.

`carry` gives an operation's labels from its operands', or raises `Mixes` where entries of several groups meet, and for
every operation that it does not know. So it never labels an entry wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Labels = np.ndarray  # integers, of as many axes as the array that they describe
Shape = tuple[int, ...]
# (parameters of the operation, shapes of operands, shape of the first result, labels of operands or None) -> labels
_Rule = Callable[[Mapping[str, Any], Sequence[Shape], Shape, Sequence[Labels | None]], Labels]


class Mixes(Exception):
    """An operation adds up entries of several groups, or may do so."""


def carry(
    name: str, params: Mapping[str, Any], shapes: Sequence[Shape], results: Sequence[Shape], labels: Sequence[Any]
) -> list[Labels]:
    """Labels of the results of the operation `name`.

    Args:
        name: of the primitive.
        params: its parameters.
        shapes: of its operands.
        results: shapes of its results.
        labels: of its operands; None for an operand that does not depend on the cotangents.

    Raises:
        Mixes: an entry of a result may depend on several groups, or not linearly.
    """
    if name == "split":
        return [compressed(x) for x in _split(params, labels)]
    rule = _RULES.get(name)
    if rule is None:
        raise Mixes("is not among the operations that keep groups apart")
    carried = compressed(rule(params, shapes, results[0], labels))
    if carried.ndim != len(results[0]) or any(n not in (1, m) for n, m in zip(carried.shape, results[0], strict=True)):
        raise Mixes("gave labels of another shape than its result")
    return [carried] * len(results)


def compressed(labels: Labels) -> Labels:
    """The same labels, with length 1 along each axis where they do not change. A 0 may take any label."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1:
            label = labels.max(axis, keepdims=True)
            if ((labels == label) | (labels < 0)).all():
                labels = label
    return labels


def joined(left: Labels, right: Labels) -> Labels:
    """Labels of a sum. Raises Mixes where the terms are of different groups."""
    left, right = np.broadcast_arrays(left, right)
    if ((left != right) & (left >= 0) & (right >= 0)).any():
        raise Mixes("adds up entries of different groups")
    return np.maximum(left, right)


def moved(labels: Labels, sources: Sequence[int | None]) -> Labels:
    """Labels of a result whose axis i is the operand's axis `sources[i]`, or new where that is None.

    An axis of the operand that is not named is summed over.
    """
    rest = tuple(axis for axis in range(labels.ndim) if axis not in sources)
    if any(labels.shape[axis] > 1 for axis in rest):
        raise Mixes("sums over the groups")
    axes = [source for source in sources if source is not None]
    labels = labels.transpose(*rest, *axes).reshape([labels.shape[axis] for axis in axes])
    return np.expand_dims(labels, [i for i, source in enumerate(sources) if source is None])


def _only(labels: Sequence[Labels | None], *places: int) -> Labels:
    """The labels of the one operand that depends on the cotangents, which must be in one of `places`."""
    if any(x is not None and i not in places for i, x in enumerate(labels)) or not places:
        raise Mixes("is not linear in this operand")
    carried = [x for x in labels if x is not None]
    if len(carried) != 1:
        raise Mixes("multiplies two derivatives")
    return carried[0]


def _sum(params: Any, shapes: Any, result: Shape, labels: Sequence[Labels | None]) -> Labels:
    # A scalar among the operands broadcasts, as its labels do.
    terms = [x.reshape((1,) * (len(result) - x.ndim) + x.shape) for x in labels if x is not None]
    total = terms[0]
    for term in terms[1:]:
        total = joined(total, term)
    return total


def _factor(*places: int) -> _Rule:
    """Of an elementwise operation that is linear in one operand."""

    def rule(params: Any, shapes: Any, result: Shape, labels: Sequence[Labels | None]) -> Labels:
        x = _only(labels, *places)
        return x.reshape((1,) * (len(result) - x.ndim) + x.shape)

    return rule


def _select(params: Any, shapes: Any, result: Shape, labels: Sequence[Labels | None]) -> Labels:
    if labels[0] is not None:
        raise Mixes("chooses by a derivative")
    return _sum(params, shapes, result, labels[1:])


def _transpose(params: Any, shapes: Any, result: Any, labels: Sequence[Labels | None]) -> Labels:
    return moved(_only(labels, 0), params["permutation"])


def _broadcast(params: Any, shapes: Any, result: Shape, labels: Sequence[Labels | None]) -> Labels:
    places = list(params["broadcast_dimensions"])
    return moved(_only(labels, 0), [places.index(i) if i in places else None for i in range(len(result))])


def _squeeze(params: Any, shapes: Any, result: Any, labels: Sequence[Labels | None]) -> Labels:
    x = _only(labels, 0)
    away = {axis % x.ndim for axis in params["dimensions"]}
    return moved(x, [axis for axis in range(x.ndim) if axis not in away])


def _reduce_sum(params: Any, shapes: Any, result: Any, labels: Sequence[Labels | None]) -> Labels:
    x = _only(labels, 0)
    return moved(x, [axis for axis in range(x.ndim) if axis not in params["axes"]])


def _reshape(params: Any, shapes: Sequence[Shape], result: Shape, labels: Sequence[Labels | None]) -> Labels:
    x = _only(labels, 0)
    if params.get("dimensions") is not None:
        raise Mixes("reshapes in another order of axes")
    full: list[int] = []
    new: list[int] = []
    for before, after in _aligned(shapes[0], result):
        varies = any(x.shape[axis] > 1 for axis in before)
        full += [shapes[0][axis] if varies else 1 for axis in before]
        new += [result[axis] if varies else 1 for axis in after]
    return np.broadcast_to(x, full).reshape(new)


def _aligned(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The finest groups of consecutive axes of `old` and of `new` with as many entries each."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before: list[int] = []
        after: list[int] = []
        entries = wanted = 1
        while True:
            if entries <= wanted and i < len(old) and not (before and entries == wanted):
                before.append(i)
                entries *= old[i]
                i += 1
            elif j < len(new) and not (after and entries == wanted):
                after.append(j)
                wanted *= new[j]
                j += 1
            else:
                break
        groups.append((before, after))
    return groups


def _dot(params: Any, shapes: Sequence[Shape], result: Any, labels: Sequence[Labels | None]) -> Labels:
    side = 0 if labels[0] is not None else 1
    x = _only(labels, 0, 1)
    contracted, batched = params["dimension_numbers"]

    def free(of: int) -> list[int]:
        return [a for a in range(len(shapes[of])) if a not in contracted[of] and a not in batched[of]]

    none: list[int | None] = [None] * len(free(1 - side))
    own: list[int | None] = list(free(side))
    return moved(x, [*batched[side], *(own + none if side == 0 else none + own)])


def _convolution(params: Any, shapes: Any, result: Shape, labels: Sequence[Labels | None]) -> Labels:
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise Mixes("sums over the groups")
    x = _only(labels, 0)
    out: list[int | None] = [None] * len(result)
    out[numbers.out_spec[0]] = numbers.lhs_spec[0]
    return moved(x, out)


def _per_axis(x: Labels, shape: Shape, change: Callable[[int, np.ndarray], np.ndarray]) -> Labels:
    """Apply `change(axis, labels along it)` on each axis along which the labels change."""
    for axis in range(x.ndim):
        if x.shape[axis] > 1:
            x = np.moveaxis(change(axis, np.moveaxis(x, axis, 0)), 0, axis)
    return x


def _pad(params: Any, shapes: Sequence[Shape], result: Any, labels: Sequence[Labels | None]) -> Labels:
    def change(axis: int, x: np.ndarray) -> np.ndarray:
        low, high, inner = params["padding_config"][axis]
        spread = np.full(((len(x) - 1) * (inner + 1) + 1, *x.shape[1:]), -1)
        spread[:: inner + 1] = x
        spread = spread[max(-low, 0) : len(spread) - max(-high, 0)]
        return np.pad(spread, [(max(low, 0), max(high, 0)), *[(0, 0)] * (x.ndim - 1)], constant_values=-1)

    return _per_axis(_only(labels, 0), shapes[0], change)


def _slice(params: Any, shapes: Sequence[Shape], result: Any, labels: Sequence[Labels | None]) -> Labels:
    steps = params["strides"] or (1,) * len(shapes[0])

    def change(axis: int, x: np.ndarray) -> np.ndarray:
        return x[params["start_indices"][axis] : params["limit_indices"][axis] : steps[axis]]

    return _per_axis(_only(labels, 0), shapes[0], change)


def _split(params: Mapping[str, Any], labels: Sequence[Labels | None]) -> list[Labels]:
    x, axis = _only(labels, 0), params["axis"]
    places = np.cumsum(params["sizes"])[:-1]
    return np.split(x, places, axis) if x.shape[axis] > 1 else [x] * len(params["sizes"])


def _reverse(params: Any, shapes: Sequence[Shape], result: Any, labels: Sequence[Labels | None]) -> Labels:
    def change(axis: int, x: np.ndarray) -> np.ndarray:
        return x[::-1] if axis in params["dimensions"] else x

    return _per_axis(_only(labels, 0), shapes[0], change)


def _concatenate(params: Any, shapes: Sequence[Shape], result: Shape, labels: Sequence[Labels | None]) -> Labels:
    axis = params["dimension"]
    parts = [np.full((1,) * len(result), -1) if x is None else x for x in labels]
    rest = np.broadcast_shapes(*([1 if i == axis else n for i, n in enumerate(x.shape)] for x in parts))
    sizes = [[shape[axis] if i == axis else n for i, n in enumerate(rest)] for shape in shapes]
    return np.concatenate([np.broadcast_to(x, size) for x, size in zip(parts, sizes, strict=True)], axis)


def _cumulative(params: Any, shapes: Any, result: Any, labels: Sequence[Labels | None]) -> Labels:
    x = _only(labels, 0)
    if x.shape[params["axis"]] > 1:
        raise Mixes("sums over the groups")
    return x


def _gather(params: Any, shapes: Sequence[Shape], result: Shape, labels: Sequence[Labels | None]) -> Labels:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [axis for axis in range(len(shapes[0])) if axis not in gone]
    sources: list[int | None] = [None] * len(result)
    for place, axis in zip(numbers.offset_dims, windows, strict=True):
        if sizes[axis] == shapes[0][axis]:
            sources[place] = axis
    looked_up = [axis for axis in range(len(result)) if axis not in numbers.offset_dims]
    for axis, of_indices in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        sources[looked_up[of_indices]] = axis
    return moved(_only(labels, 0), sources)


def _scatter_add(params: Any, shapes: Sequence[Shape], result: Shape, labels: Sequence[Labels | None]) -> Labels:
    numbers = params["dimension_numbers"]
    if labels[1] is not None:
        raise Mixes("places by a derivative")
    terms = [] if labels[0] is None else [labels[0]]
    if labels[2] is not None:
        updates = shapes[2]
        gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        windows = [axis for axis in range(len(result)) if axis not in gone]
        sources: list[int | None] = [None] * len(result)
        for place, axis in zip(numbers.update_window_dims, windows, strict=True):
            if updates[place] == result[axis]:
                sources[axis] = place
        placed = [axis for axis in range(len(updates)) if axis not in numbers.update_window_dims]
        for axis, of_indices in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
            sources[axis] = placed[of_indices]
        terms.append(moved(labels[2], sources))
    return terms[0] if len(terms) == 1 else joined(*terms)


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("add", "add_any", "sub"), _sum),
    **dict.fromkeys(("neg", "convert_element_type", "copy", "copy_p", "reduce_precision", "real"), _factor(0)),
    **dict.fromkeys(("pcast", "pvary", "sharding_constraint", "reshard"), _factor(0)),
    "cumsum": _cumulative,
    "mul": _factor(0, 1),
    "div": _factor(0),
    "select_n": _select,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "reduce_sum": _reduce_sum,
    "reshape": _reshape,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "pad": _pad,
    "slice": _slice,
    "rev": _reverse,
    "concatenate": _concatenate,
    "gather": _gather,
    "scatter-add": _scatter_add,
}
