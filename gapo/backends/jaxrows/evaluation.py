"""Running a split pullback: once up to its cuts, then its sums over groups for any weighting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gapo.backends.jaxrows.program import Cell, Operation
from gapo.backends.jaxrows.split import MIXED, Cut, Split

# These are cheap to compute again in each step of a scan, and dear to store for all of its steps.
_LIGHT = {"mul", "add", "sub", "div", "neg", "exp", "log", "rsqrt", "sqrt", "logistic", "tanh", "max", "min", "pow"}
_LIGHT |= {"integer_pow", "square", "convert_element_type", "broadcast_in_dim", "reshape", "transpose", "squeeze"}
_LIGHT |= {"select_n", "reduce_sum", "reduce_max", "slice", "concatenate", "iota", "eq", "ne", "lt", "le", "gt", "ge"}
_LIGHT |= {"and", "or", "not", "copy", "sign", "stop_gradient", "add_any", "pad", "erf", "cos", "sin", "expand_dims"}


def cuts_of(reading: Split) -> Iterator[Cut]:
    yield from reading.cuts
    for inner in reading.scans.values():
        yield from cuts_of(inner)


def run_before(reading: Split, cells: dict[Cell, Any]) -> tuple[dict[Cell, Any], list[Array]]:
    """Run what comes before the cuts: all cells, and what is stored, in the order of `cuts_of`."""
    in_scans: dict[Operation, list[Array]] = {}
    for operation in reading.before:
        if operation in reading.scans:
            in_scans[operation] = _scan_before(reading.scans[operation], operation, cells)
        else:
            cells.update(zip(operation.results, _run(operation, cells), strict=True))
    saved = [cells[cut.cell] if cut.operation is None else _grouped(cut, cells) for cut in reading.cuts]
    return cells, [*saved, *(x for operation in reading.scans for x in in_scans[operation])]


def _run(operation: Operation, cells: dict[Cell, Any]) -> Sequence[Any]:
    return operation.call(*(_value(cells, cell) for cell in operation.operands))


def _value(cells: dict[Cell, Any], cell: Cell) -> Any:
    return cells.get(cell, cell.value)


class _Scan:
    """The operands and results of a scan's step, by whether they are sums over groups."""

    def __init__(self, body: Split, operation: Operation) -> None:
        params = operation.params
        fixed, carries = params["num_consts"], params["num_carry"]
        self.options = {name: params[name] for name in ("length", "reverse", "unroll")}
        inputs, results = body.program.inputs, body.program.results

        def sides(inner: Sequence[Cell], outer: Sequence[Cell]) -> tuple[list[Any], list[Any]]:
            pairs = list(zip(inner, outer, strict=True))
            mixed = [pair for pair in pairs if body.state(pair[0]) is MIXED]
            return [pair for pair in pairs if pair not in mixed], mixed

        self.fixed, self.fixed_mixed = sides(inputs[:fixed], operation.operands[:fixed])
        self.carried, self.carried_mixed = sides(inputs[fixed : fixed + carries], operation.operands[fixed:][:carries])
        self.sliced, self.sliced_mixed = sides(inputs[fixed + carries :], operation.operands[fixed + carries :])
        # A carry's result is one of sums where its operand is.
        triples = zip(inputs[fixed : fixed + carries], results[:carries], operation.results[:carries], strict=True)
        ends = [(body.state(start) is MIXED, result, outer) for start, result, outer in triples]
        self.ends = [(result, outer) for is_mixed, result, outer in ends if not is_mixed]
        self.ends_mixed = [(result, outer) for is_mixed, result, outer in ends if is_mixed]
        self.stacked, self.stacked_mixed = sides(results[carries:], operation.results[carries:])


def _inner(pairs: Sequence[tuple[Cell, Cell]]) -> list[Cell]:
    return [inner for inner, _ in pairs]


def _scan_before(body: Split, operation: Operation, cells: dict[Cell, Any]) -> list[Array]:
    """Run the scan without its sums, which also stores what these need; sets its other results in `cells`."""
    scan = _Scan(body, operation)
    stored, _ = _needs(body, scan)

    def step(carry: Sequence[Any], slices: Sequence[Any]) -> tuple[list[Any], Any]:
        start = dict(zip(_inner([*scan.carried, *scan.sliced]), [*carry, *slices], strict=True))
        start |= {inner: _value(cells, outer) for inner, outer in scan.fixed}
        inner, saved = run_before(body, start)
        ends = [_value(inner, cell) for cell in _inner(scan.ends)]
        stacked = [_value(inner, cell) for cell in _inner(scan.stacked)]
        return ends, (stacked, saved, [inner[cell] for cell in stored])

    carry = [_value(cells, outer) for _, outer in scan.carried]
    slices = [_value(cells, outer) for _, outer in scan.sliced]
    ends, (stacked, saved, values) = jax.lax.scan(step, carry, slices, **scan.options)
    cells.update(zip([outer for _, outer in [*scan.ends, *scan.stacked]], [*ends, *stacked], strict=True))
    cells.update(zip(stored, values, strict=True))  # stacked over the steps
    return saved


def _needs(body: Split, scan: _Scan) -> tuple[list[Cell], set[Cell]]:
    """What the sums of a scan's step need: values to store, and those among the scan's operands that are at hand."""
    makers = body.makers()
    at_hand = {*_inner(scan.fixed), *_inner(scan.sliced)}
    stored: dict[Cell, None] = {}
    seen: set[Cell] = set()

    def need(cell: Cell) -> None:
        if cell in seen or cell.value is not None:
            return
        seen.add(cell)
        maker = makers.get(cell)
        if maker is not None and maker.name in _LIGHT:
            for operand in maker.operands:
                need(operand)
        elif cell not in at_hand:
            stored[cell] = None

    for cell in _values_after(body):
        need(cell)
    return list(stored), seen & at_hand


def scan_needs(body: Split, operation: Operation) -> list[Cell]:
    """The values that a scan stores for its sums, one for each of its steps."""
    return _needs(body, _Scan(body, operation))[0]


def _values_after(reading: Split) -> Iterator[Cell]:
    """Values that the operations on sums read."""
    cut_cells = {cut.cell for cut in reading.cuts}
    for operation in reading.after:
        if operation not in reading.scans:
            yield from (c for c in operation.operands if reading.state(c) is not MIXED and c not in cut_cells)
            continue
        scan = _Scan(reading.scans[operation], operation)
        stored, at_hand = _needs(reading.scans[operation], scan)
        yield from stored
        yield from (outer for inner, outer in [*scan.fixed, *scan.sliced] if inner in at_hand)


def run_after(
    reading: Split, values: dict[Cell, Any], sums: Sequence[Array], mixed: dict[Cell, Any]
) -> Callable[[Cell], Any]:
    """Run the operations on sums; returns a look-up of results.

    Args:
        reading: the split.
        values: those of its cells that are at hand.
        sums: at its cuts, in the order of `cuts_of`.
        mixed: the program's inputs that are sums.
    """
    makers = reading.makers()
    rest = list(sums)
    own = len(reading.cuts)
    mixed |= dict(zip([cut.cell for cut in reading.cuts], rest[:own], strict=True))
    of_scan = {}
    for operation, inner in reading.scans.items():
        length = len(list(cuts_of(inner)))
        of_scan[operation], own = rest[own : own + length], own + length

    def read(cell: Cell) -> Any:
        if cell in mixed:
            return mixed[cell]
        if cell not in values and cell.value is None:
            maker = makers[cell]
            values.update(zip(maker.results, maker.call(*map(read, maker.operands)), strict=True))
        return _value(values, cell)

    for operation in reading.after:
        if operation in reading.scans:
            _scan_after(reading.scans[operation], operation, read, values, of_scan[operation], mixed)
        else:
            mixed.update(zip(operation.results, operation.call(*map(read, operation.operands)), strict=True))
    return read


def _scan_after(
    body: Split,
    operation: Operation,
    read: Callable[[Cell], Any],
    values: dict[Cell, Any],
    sums: Sequence[Array],
    mixed: dict[Cell, Any],
) -> None:
    """Run the sums of a scan; sets its results that are sums in `mixed`."""
    scan = _Scan(body, operation)
    stored, at_hand = _needs(body, scan)
    sliced = [(inner, outer) for inner, outer in scan.sliced if inner in at_hand]
    fixed = {inner: read(outer) for inner, outer in scan.fixed if inner in at_hand}
    fixed_mixed = {inner: read(outer) for inner, outer in scan.fixed_mixed}

    def step(carry: Sequence[Any], slices: Any) -> tuple[list[Any], list[Any]]:
        by_step, stacked_sums, by_step_mixed = slices
        at_start = dict(zip([*_inner(sliced), *stored], by_step, strict=True))
        mixed = dict(zip(_inner(scan.sliced_mixed), by_step_mixed, strict=True))
        mixed |= dict(zip(_inner(scan.carried_mixed), carry, strict=True))
        inner = run_after(body, {**fixed, **at_start}, stacked_sums, mixed | fixed_mixed)
        return [inner(cell) for cell in _inner(scan.ends_mixed)], [inner(cell) for cell in _inner(scan.stacked_mixed)]

    carry = [read(outer) for _, outer in scan.carried_mixed]
    by_step = [*(read(outer) for _, outer in sliced), *(values[cell] for cell in stored)]
    slices = (by_step, list(sums), [read(outer) for _, outer in scan.sliced_mixed])
    ends, stacked = jax.lax.scan(step, carry, slices, **scan.options)
    outer = [outer for _, outer in [*scan.ends_mixed, *scan.stacked_mixed]]
    mixed.update(zip(outer, [*ends, *stacked], strict=True))


def _grouped(cut: Cut, cells: dict[Cell, Any]) -> Array:
    """The result of a cut's operation for each of its groups, (n, *shape)."""
    operation = cut.operation
    assert operation is not None
    operands = [_value(cells, cell) for cell in operation.operands]
    a, n, b = cut.layout

    def unfold(x: Array, axis: int) -> Array:
        return x.reshape(*x.shape[:axis], a, n, b, *x.shape[axis + 1 :])

    def places(axes: Sequence[int], axis: int) -> list[int]:
        """`axes` of the operand as axes of the unfolded one, `axis` as its two that are summed."""
        return [p for i in axes for p in ((axis, axis + 2) if i == axis else (i + 2 * (i > axis),))]

    if operation.name == "reduce_sum":
        axes = operation.params["axes"]
        before = sum(axis not in axes for axis in range(cut.axis))
        return jnp.moveaxis(unfold(operands[0], cut.axis).sum(places(axes, cut.axis)), before, 0)
    params = operation.params
    contracted, batched = params["dimension_numbers"]
    place = contracted[cut.slot].index(cut.axis)
    axes = [contracted[side][place] for side in (0, 1)]
    left, right = (unfold(x, axis) for x, axis in zip(operands, axes, strict=True))
    sums, batches = ([places(part[side], axes[side]) for side in (0, 1)] for part in (contracted, batched))
    return jax.lax.dot_general(
        left,
        right,
        ((sums[0], sums[1]), ([axes[0] + 1, *batches[0]], [axes[1] + 1, *batches[1]])),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
