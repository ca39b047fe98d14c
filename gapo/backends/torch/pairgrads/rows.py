"""What autograd's graph tells of the rows of a forward: whose margins they enter, and where parameters are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gapo.backends.base import on_outputs

# The first nodes behind the margins whose rows are answers: token log-probabilities, or what the last layer gave.
_WITH_ROWS = ("_TokenLogpsBackward", "_TapBackward")


def odd_rows(outputs: Sequence[Tensor], coarse: bool) -> str | None:
    """What is wrong where row r of what the model gave does not belong to pair r mod N alone; None where all do.

    The margins are differentiated by those rows alone, through what the margin function does with them, once with equal
    weights and once with another weight for each pair: the latter must be the former, times the weight of its pair.
    """
    pairs = outputs[0].shape[0]
    if pairs == 1:  # all rows are the only pair's
        return None
    edges = [GradientEdge(node, 0) for node in _nodes_with_rows(outputs)]
    if not edges:
        return None
    weights = 0.5 + torch.rand(pairs, generator=torch.Generator().manual_seed(1)).to(outputs[0].device)
    equal, unequal = (_by_rows(outputs, edges, w) for w in (torch.ones_like(weights), weights))
    wrong = []
    for one, other in zip(equal, unequal, strict=True):
        if one.shape[0] not in (pairs, 2 * pairs):
            return f"the model gives {one.shape[0]} rows for {pairs} pairs"
        meant = one.flatten(1) * weights.repeat(one.shape[0] // pairs)[:, None].to(one.dtype)
        error, size = (meant - other.flatten(1)).norm(dim=1), other.flatten(1).norm(dim=1)
        wrong.append((error > (3e-2 if coarse else 1e-3) * size + 1e-6 * size.max()).any())
    if bool(torch.stack(wrong).any()):
        return "the rows of its answers do not stand in the order of the pairs, chosen ones first"
    return None


def _by_rows(outputs: Sequence[Tensor], edges: list[GradientEdge], weights: Tensor) -> list[Tensor]:
    cotangents = on_outputs(weights, outputs, xp)
    found = torch.autograd.grad(outputs, edges, cotangents, retain_graph=True)
    return [x if x.dtype == torch.float64 else x.float() for x in found]


def _nodes_with_rows(outputs: Sequence[Tensor]) -> list[Any]:
    return [node for node in walk(outputs, _has_rows) if _has_rows(node)]


def _has_rows(node: Any) -> bool:
    return node.name() in _WITH_ROWS


def uses(outputs: Sequence[Tensor], parameters: dict[str, Tensor]) -> Counter[str]:
    """How often each parameter enters the graph behind `outputs`."""
    names = {id(p): name for name, p in parameters.items()}
    found: Counter[str] = Counter()
    for node in walk(outputs):
        for parent, _ in node.next_functions:
            name = names.get(id(getattr(parent, "variable", None)))
            if name is not None:
                found[name] += 1
    return found


def walk(outputs: Sequence[Tensor], stop: Callable[[Any], bool] | None = None) -> Iterator[Any]:
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
