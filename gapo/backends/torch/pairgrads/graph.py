"""Walks over autograd's graph, and backwards that leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Edge = tuple[Any, int]  # a node of the graph, and which of its inputs


def walk(outputs: Iterable[Tensor], stop: Callable[[Any], bool] | None = None) -> Iterator[Any]:
    """Every node of the graph behind `outputs`, once; not what lies behind a node at which `stop` is true."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        if stop is not None and stop(node):
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def uses(nodes: Iterable[Any], parameters: dict[str, Tensor]) -> dict[Edge, str]:
    """Where each parameter enters: the edges of `nodes` that lead to one, with its name."""
    names = {id(p): name for name, p in parameters.items()}
    return {
        (node, i): names[id(parent.variable)]
        for node in nodes
        for i, (parent, _) in enumerate(node.next_functions)
        if id(getattr(parent, "variable", None)) in names
    }


@contextmanager
def grads_aside(parameters: dict[str, Any]) -> Iterator[None]:
    """Set every `.grad` aside; afterwards all are as they were, whatever a backward wrote there meanwhile."""
    aside = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        yield
    finally:
        for name, p in parameters.items():
            p.grad = aside[name]


@contextmanager
def no_grads_left(parameters: dict[str, Any]) -> Iterator[None]:
    """The same for a backward that must write to no `.grad`.

    Raises:
        RuntimeError: it wrote to one.
    """
    with grads_aside(parameters):
        yield
        for name, p in parameters.items():
            if p.grad is not None:
                raise RuntimeError(
                    f"a backward within the backward wrote to the .grad of {name!r}, which would add to every update, "
                    "as re-entrant checkpoints do: use torch.utils.checkpoint with use_reentrant=False"
                )
