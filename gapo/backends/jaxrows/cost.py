"""What a split pullback costs beside the pullback as it stands: products of matrices done again, and bytes held.

Bytes are estimates, for operations in order of which none is fused. They are compared with each other alone.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from math import prod
from typing import Any

import numpy as np

from gapo.backends.jaxrows.evaluation import scan_needs
from gapo.backends.jaxrows.labels import Shape
from gapo.backends.jaxrows.program import Cell, Operation, Program, jaxprs_of
from gapo.backends.jaxrows.split import MIXED, Split

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}


def peak(program: Program, reading: Split | None = None) -> int:
    """Bytes alive at the fullest moment. With `reading`, all that its cuts store is alive until the end."""
    ends = len(program.operations)
    last: dict[Cell, int] = {}
    for i, operation in enumerate(program.operations):
        last.update(dict.fromkeys(operation.operands, i))
    last.update(dict.fromkeys(program.results, ends))
    if reading is not None:
        last.update(dict.fromkeys(_stored_cells(reading), ends))
    results = {cell for operation in program.operations for cell in operation.results}
    alive = sum(cell.nbytes for cell in last if cell not in results)  # inputs and constants
    fullest = alive
    for i, operation in enumerate(program.operations):
        inner = 0 if operation.body is None else peak(operation.body) - _operands(operation.body)
        alive += sum(cell.nbytes for cell in operation.results if cell in last)
        if reading is not None:
            alive += _left_behind(reading, operation)
        fullest = max(fullest, alive + inner)
        alive -= sum(cell.nbytes for cell in {*operation.operands} if last[cell] == i)
    return fullest


def _operands(program: Program) -> int:
    return sum(cell.nbytes for cell in program.inputs)


def _stored_cells(reading: Split) -> Set[Cell]:
    cells = {cut.cell for cut in reading.cuts if cut.operation is None}
    for operation in reading.after:
        if operation not in reading.scans:
            cells |= {cell for cell in operation.operands if reading.state(cell) is not MIXED}
    return cells


def _left_behind(reading: Split, operation: Operation) -> int:
    """Bytes that the cuts at an operation, or in a scan, leave for the sums."""
    if operation in reading.scans:
        inner = reading.scans[operation]
        stored = [cell.nbytes for cell in scan_needs(inner, operation)]
        stored += [cut.cell.nbytes for cut in inner.cuts if cut.operation is None]
        within = sum(_left_behind(inner, o) for o in inner.program.operations)
        return int(operation.params["length"]) * (sum(stored) + within)
    sizes = [cut.layout[1] * cut.cell.nbytes for cut in reading.cuts if cut.operation is operation]
    return sum(sizes)


def products_after(reading: Split, times: int = 1) -> tuple[int, dict[str, int]]:
    """Multiplications of matrices that are done for each group once, and those behind sums, by the sum's cause.

    A product whose operand is cut at once is the gradient of a weight: it counts for neither.
    """
    once = 0
    behind: dict[str, int] = {}
    direct = {cut.cell for cut in reading.cuts if cut.operation is None}
    for operation in reading.before:
        if operation in reading.scans:
            inner, causes = products_after(reading.scans[operation], times * int(operation.params["length"]))
            once += inner
            for cause, n in causes.items():
                behind[cause] = behind.get(cause, 0) + n
        elif any(isinstance(reading.state(cell), np.ndarray) for cell in operation.results):
            once += times * _of(operation)
    for operation in reading.after:
        if operation in reading.scans:
            continue
        mixed = [cell for cell in operation.operands if reading.state(cell) is MIXED]
        if operation.name in _PRODUCTS and not mixed and any(cell in direct for cell in operation.operands):
            continue
        cause = reading.causes[operation.results[0]]
        behind[cause] = behind.get(cause, 0) + times * _of(operation)
    return once, behind


def _multiplications(name: str, params: dict[str, Any], operands: Sequence[Shape], result: Shape) -> int:
    """Of one operation and those within it."""
    if name == "dot_general":
        return prod(result) * prod(operands[0][axis] for axis in params["dimension_numbers"][0][0])
    if name in _PRODUCTS:
        return prod(result) * prod(operands[1]) // max(1, operands[1][0])
    inner = 0
    for jaxpr in jaxprs_of(params):
        for eqn in jaxpr.eqns:
            shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in (*eqn.invars, *eqn.outvars[:1])]
            inner += _multiplications(eqn.primitive.name, eqn.params, shapes[: len(eqn.invars)], shapes[-1])
    return int(params.get("length", 1)) * inner if inner else 0


def _of(operation: Operation) -> int:
    shapes = [cell.shape for cell in operation.operands]
    return _multiplications(operation.name, operation.params, shapes, operation.results[0].shape)
