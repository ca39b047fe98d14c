"""A jaxpr as a flat list of operations: the calls in it are opened, the scans hold a program of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Literal

# Calls that run their jaxpr once on their operands, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclass(eq=False)
class Cell:
    """A variable. `value` is set for a constant."""

    aval: Any
    value: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self.aval, "shape", ()))

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def nbytes(self) -> int:
        dtype = getattr(self.aval, "dtype", None)
        return self.size * int(getattr(dtype, "itemsize", 0))


@dataclass(eq=False)
class Operation:
    """One operation: `call(*operands)` gives the list of its results. `body` is the program of a scan."""

    name: str
    params: dict[str, Any]
    operands: list[Cell]
    results: list[Cell]
    call: Callable[..., Sequence[Any]]
    body: Program | None = None


@dataclass(eq=False)
class Program:
    """Operations in the order of their dependence."""

    inputs: list[Cell]
    operations: list[Operation] = field(default_factory=list)
    results: list[Cell] = field(default_factory=list)


def program_of(closed: ClosedJaxpr) -> Program:
    """The program of a closed jaxpr. Constants become cells with a value."""
    inputs = [Cell(v.aval) for v in closed.jaxpr.invars]
    program = Program(inputs)
    constants = [Cell(jax.typeof(x), x) for x in closed.consts]
    program.results = _open(program, closed.jaxpr, constants, inputs)
    return program


def _open(program: Program, jaxpr: Any, constants: Sequence[Cell], inputs: Sequence[Cell]) -> list[Cell]:
    """Append the operations of `jaxpr` to `program`; returns its results."""
    cells: dict[Any, Cell] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def cell(atom: Any) -> Cell:
        return Cell(atom.aval, atom.val) if isinstance(atom, Literal) else cells[atom]

    for eqn in jaxpr.eqns:
        operands = [cell(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        inner = eqn.params.get(_CALLS.get(name, ""))
        if inner is not None:
            if eqn.params.get("prevent_cse") and eqn.params.get("differentiated"):
                operands = _apart(program, operands)
            consts = [Cell(jax.typeof(x), x) for x in getattr(inner, "consts", ())]
            results = _open(program, getattr(inner, "jaxpr", inner), consts, operands)
        else:
            results = [Cell(v.aval) for v in eqn.outvars]
            body = program_of(eqn.params["jaxpr"]) if name == "scan" else None
            program.operations.append(Operation(name, eqn.params, operands, results, _caller(eqn), body))
        cells.update(zip(eqn.outvars, results, strict=True))
    return [cell(atom) for atom in jaxpr.outvars]


def _apart(program: Program, operands: list[Cell]) -> list[Cell]:
    """Copies of `operands` that the compiler keeps apart from the originals.

    What a rematerialised layer computes again from them would otherwise be taken from the forward, and be held in
    memory until then.
    """
    results = [Cell(x.aval) for x in operands]
    barrier = Operation("optimization_barrier", {}, operands, results, lambda *xs: jax.lax.optimization_barrier(xs))
    program.operations.append(barrier)
    return results


def _caller(eqn: Any) -> Callable[..., Sequence[Any]]:
    def call(*operands: Any) -> Sequence[Any]:
        with eqn.ctx.manager:
            results = eqn.primitive.bind(*operands, **eqn.params)
        return results if eqn.primitive.multiple_results else [results]

    return call


def jaxprs_of(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an operation's parameters: a loop's body, a branch, a call's inside."""
    values = [v for value in params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [v for v in (getattr(value, "jaxpr", value) for value in values) if hasattr(v, "eqns")]
