"""Where a pullback sums over the groups of a batch: the cut between what is done by group and what comes after.

The operations of a pullback fall into three parts:

1. values, which do not depend on the cotangents: residuals of the forward, and what is computed from them;
2. arrays whose every entry is linear in the cotangent of one group (`labels`);
3. sums over groups, and all that is computed from these: in the end, the gradients of parameters.

A `Cut` is a place where the second part passes into the third. With the cotangents 1 the second part is computed once.
For cotangents w, an array of it is the array at 1, each entry times the w of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gapo.backends.jaxrows.labels import Labels, Mixes, carry, compressed, joined
from gapo.backends.jaxrows.program import Cell, Operation, Program


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name


ZERO = _Mark("0, whatever the cotangents are")
MIXED = _Mark("a sum over groups")
State = Any  # None for a value, ZERO, Labels, or MIXED

_ZERO_STAYS = {"broadcast_in_dim", "convert_element_type", "reshape", "transpose", "squeeze", "neg", "copy", "slice"}


@dataclass(eq=False)
class Cut:
    """An array by group that is summed, or by-group results of the operation that sums it.

    Attributes:
        cell: the array; with `operation`, that operation's result.
        labels: of the array's entries.
        operation: a matrix product or a sum whose result is formed for each group, (groups, *shape of the result);
            None where the array itself is stored.
        slot: place of the array among its operands.
        axis: the array's axis along which the groups change.
        first: the first group that the axis holds.
        layout: (a, n, b): that axis is the n groups from `first` on, in blocks of b, a times over.
    """

    cell: Cell
    labels: Labels
    operation: Operation | None = None
    slot: int = 0
    axis: int = 0
    first: int = 0
    layout: tuple[int, int, int] = (1, 1, 1)


@dataclass(eq=False)
class Split:
    """A program's operations by part.

    Attributes:
        program: the program.
        groups: number of groups.
        states: of its cells.
        before: operations on values and on arrays by group; a scan may be here and in `after` as well.
        after: operations on sums.
        cuts: of this program, without those in its scans.
        scans: the split of each scan's body.
        causes: in words, the operation that first summed over groups, by the cells behind it.
    """

    program: Program
    groups: int
    states: dict[Cell, State] = field(default_factory=dict)
    before: list[Operation] = field(default_factory=list)
    after: list[Operation] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    scans: dict[Operation, Split] = field(default_factory=dict)
    causes: dict[Cell, str] = field(default_factory=dict)

    def state(self, cell: Cell) -> State:
        if cell in self.states:
            return self.states[cell]
        return ZERO if cell.value is not None and _is_zero(cell) else None

    def makers(self) -> dict[Cell, Operation]:
        return {cell: operation for operation in self.program.operations for cell in operation.results}


def split(program: Program, states: Sequence[State], groups: int) -> Split:
    """Read a pullback.

    Args:
        program: the pullback.
        states: of its inputs: labels for a cotangent.
        groups: number of groups.
    """
    reading = _read(program, states, groups)
    for cell in program.results:
        _sum_up(reading, cell)
    return reading


def _read(program: Program, states: Sequence[State], groups: int) -> Split:
    reading = Split(program, groups)
    reading.states.update(zip(program.inputs, states, strict=True))
    for operation in program.operations:
        _place(reading, operation)
    return reading


def _place(reading: Split, operation: Operation) -> None:
    """Give an operation its part, and its results their states."""
    states = [reading.state(cell) for cell in operation.operands]
    if all(state is None or state is ZERO for state in states):
        zero = _stays_zero(operation, states)
        reading.states.update(dict.fromkeys(operation.results, ZERO if zero else None))
        reading.before.append(operation)
        return
    why = "takes a sum over the groups"
    if operation.body is not None:
        try:
            _place_scan(reading, operation, states)
            return
        except Mixes as mixes:
            why = str(mixes)
    elif not any(state is MIXED for state in states):
        try:
            reading.states.update(zip(operation.results, _carried(operation, states), strict=True))
            reading.before.append(operation)
            return
        except Mixes as mixes:
            why = str(mixes)
        cut = _by_group(reading, operation, states)
        if cut is not None:
            reading.cuts.append(cut)
            reading.states[cut.cell] = MIXED
            reading.causes[cut.cell] = f"{operation.name} {why}"
            return
    inherited = [reading.causes[cell] for cell in operation.operands if cell in reading.causes]
    cause = inherited[0] if inherited else f"{operation.name} {why}"
    for cell in operation.operands:
        _sum_up(reading, cell)
    reading.states.update(dict.fromkeys(operation.results, MIXED))
    reading.causes.update(dict.fromkeys(operation.results, cause))
    reading.after.append(operation)


def _sum_up(reading: Split, cell: Cell) -> None:
    """Cut at `cell` if it is an array by group."""
    if isinstance(reading.state(cell), np.ndarray) and all(cut.cell is not cell for cut in reading.cuts):
        reading.cuts.append(Cut(cell, reading.states[cell]))


def _carried(operation: Operation, states: Sequence[State]) -> list[Labels]:
    # A term that does not depend on the cotangents must be 0. Conditions and indices are no terms.
    if any(states[i] is None for i in _terms(operation)):
        raise Mixes("adds a constant to a derivative")
    labels = [state if isinstance(state, np.ndarray) else None for state in states]
    if operation.name == "optimization_barrier":
        return list(states)
    shapes = [cell.shape for cell in operation.operands]
    return carry(operation.name, operation.params, shapes, [cell.shape for cell in operation.results], labels)


def _terms(operation: Operation) -> list[int]:
    """The places of those operands that a sum adds up, or a choice chooses from."""
    places = range(len(operation.operands))
    if operation.name in ("add", "add_any", "sub", "concatenate", "pad"):
        return list(places)
    return {"select_n": list(places)[1:], "scatter-add": [0, 2]}.get(operation.name, [])


def _place_scan(reading: Split, operation: Operation, states: Sequence[State]) -> None:
    """Split the body of a scan. Raises Mixes where its steps hold different groups."""
    fixed, carries = operation.params["num_consts"], operation.params["num_carry"]
    start = fixed + carries
    sliced = []
    for state in states[start:]:
        if isinstance(state, np.ndarray) and state.shape[0] > 1:
            raise Mixes("goes through the groups one by one")
        sliced.append(state[0] if isinstance(state, np.ndarray) else state)
    carried = list(states[fixed:start])
    while True:
        body = _read(operation.body, [*states[:fixed], *carried, *sliced], reading.groups)  # type: ignore[arg-type]
        results = [body.state(cell) for cell in body.program.results]
        joint = [_either(*pair) for pair in zip(carried, results[:carries], strict=True)]
        if all(_same(*pair) for pair in zip(carried, joint, strict=True)):
            break
        carried = joint
    for cell, state in zip(body.program.results, joint, strict=False):
        if state is MIXED:
            _sum_up(body, cell)
    for cell, state in zip(operation.operands[fixed:start], joint, strict=True):
        if state is MIXED:
            _sum_up(reading, cell)
    reading.scans[operation] = body
    stacked = [state[None] if isinstance(state, np.ndarray) else state for state in results[carries:]]
    reading.states.update(zip(operation.results, [*joint, *stacked], strict=True))
    cause = next(iter(body.causes.values()), f"{operation.name} sums over the groups")
    reading.causes.update({c: cause for c in operation.results if reading.states[c] is MIXED})
    reading.before.append(operation)
    if any(reading.states[cell] is MIXED for cell in operation.results):
        reading.after.append(operation)


def _either(before: State, after: State) -> State:
    """The state of a carry that enters as `before` and leaves a step as `after`."""
    if before is MIXED or after is MIXED:
        if before is None or after is None:
            raise Mixes("adds a constant to a derivative")
        return MIXED
    if isinstance(before, np.ndarray) and isinstance(after, np.ndarray):
        return compressed(joined(before, after))
    if before is None or after is None:
        if isinstance(before, np.ndarray) or isinstance(after, np.ndarray):
            raise Mixes("adds a constant to a derivative")
        return None
    return before if isinstance(before, np.ndarray) else after


def _same(a: State, b: State) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a is b


def _stays_zero(operation: Operation, states: Sequence[State]) -> bool:
    if operation.name in ("mul", "dot_general"):
        return any(state is ZERO for state in states)
    sums = operation.name in ("add", "add_any", "sub", "concatenate", "pad") or operation.name in _ZERO_STAYS
    return sums and all(state is ZERO for state in states)


def _is_zero(cell: Cell) -> bool:
    value = cell.value
    if not isinstance(value, (int, float, np.ndarray, np.generic)):
        return False
    return not np.any(value)


def _by_group(reading: Split, operation: Operation, states: Sequence[State]) -> Cut | None:
    """The cut that forms the operation's result for each group, where those are fewer numbers than its operands."""
    if operation.name not in ("dot_general", "reduce_sum") or operation.params.get("out_sharding") is not None:
        return None
    slots = [i for i, state in enumerate(states) if isinstance(state, np.ndarray)]
    if len(slots) != 1:
        return None
    (slot,) = slots
    labels, dot = states[slot], operation.name == "dot_general"
    axes = [axis for axis, n in enumerate(labels.shape) if n > 1]
    summed = operation.params["dimension_numbers"][0][slot] if dot else operation.params["axes"]
    if len(axes) != 1 or axes[0] not in summed:
        return None
    first, layout = _layout(labels.ravel())
    (cell,) = operation.results
    if layout is None or layout[1] * cell.size > sum(x.size for x in operation.operands):
        return None
    return Cut(cell, labels, operation, slot, axes[0], first, layout)


def _layout(labels: Labels) -> tuple[int, tuple[int, int, int] | None]:
    """`first` and `layout` of a cut whose axis has these labels; None where they are in no such order."""
    first, n = int(labels.min()), int(labels.max() - labels.min()) + 1
    changes = np.flatnonzero(labels != labels[0])
    b = int(changes[0]) if len(changes) else len(labels)
    a, rest = divmod(len(labels), n * b)
    expected = np.broadcast_to(first + np.arange(n)[:, None], (max(a, 1), n, b)).ravel()
    return first, (a, n, b) if first >= 0 and not rest and np.array_equal(labels, expected) else None
