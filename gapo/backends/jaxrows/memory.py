"""How many bytes a pullback needs at its fullest moment: as it stands, and with what its sums over groups need stored.

Both are estimates, of operations in order, of which none is fused. They are compared with each other alone.
"""

from __future__ import annotations

from collections.abc import Set

from gapo.backends.jaxrows.group_gradients import scan_needs
from gapo.backends.jaxrows.program import Cell, Operation, Program
from gapo.backends.jaxrows.split import MIXED, Split


def peak(program: Program, reading: Split | None = None) -> int:
    """Bytes alive at the fullest moment. With `reading`, all that its cuts store is alive until the end."""
    ends = len(program.operations)
    last: dict[Cell, int] = {}
    for i, operation in enumerate(program.operations):
        last.update(dict.fromkeys(operation.operands, i))
    last.update(dict.fromkeys(program.results, ends))
    if reading is not None:
        last.update(dict.fromkeys(_stored_cells(reading), ends))
    made = {cell for operation in program.operations for cell in operation.results}
    alive = sum(cell.nbytes for cell in last if cell not in made)  # inputs and constants
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
