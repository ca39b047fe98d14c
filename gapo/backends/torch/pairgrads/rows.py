"""Whether row r of a batch belongs to group r mod N, asked of the outputs at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gapo.backends.torch.pairgrads.graph import walk


def odd_rows(outputs: Sequence[Tensor], seeds: Sequence[Tensor], blocks: int, by_row: bool, coarse: bool) -> str | None:
    """What is wrong where row r of what the module returned does not belong to group r mod N alone; None where all do.

    The outputs are differentiated by those rows, through the few operations between them: once with equal weights and
    once with another weight for each group. The second must be the first, times the weight of the row's group.

    `by_row`: output j is that of block j, and each row must enter the output of its own block.
    """
    groups = outputs[0].shape[0]
    if groups * (blocks if by_row else 1) == 1:  # all rows are the only group's
        return None
    nodes = [node for node in walk(outputs, _tells_rows) if _tells_rows(node)]
    if not nodes:
        return None
    # In the order of the forwards: one forward for each block comes in the order of the blocks.
    nodes.sort(key=lambda node: node._sequence_nr())
    edges = [GradientEdge(node, 0) for node in nodes]
    weights = unequal(outputs, by_row, seed=1)
    equal, scaled = (_by_rows(outputs, edges, w, seeds) for w in (torch.ones_like(weights), weights))
    wrong = []
    for i, (plain, other) in enumerate(zip(equal, scaled, strict=True)):
        # Of a tap whose layer's first axis is rows times tokens, the tape has told them apart.
        rows = getattr(getattr(nodes[i], "call", None), "rows", 0) or plain.shape[0]
        if rows % groups or rows // groups > blocks:
            return f"the model gives {rows} rows for {groups} groups"
        by_block = weights.expand(blocks, groups)
        if rows == groups:
            by_block = by_block[i * blocks // len(nodes)]
        plain, other = plain.reshape(rows, -1), other.reshape(rows, -1)
        expected = plain * by_block.flatten()[:rows, None].to(plain.dtype)
        error, size = (expected - other).norm(dim=1), other.norm(dim=1)
        wrong.append((error > (3e-2 if coarse else 1e-3) * size + 1e-6 * size.max()).any())
    if bool(torch.stack(wrong).any()):
        return "the rows of its outputs do not stand in the order of the groups"
    return None


def unequal(outputs: Sequence[Tensor], by_row: bool, seed: int) -> Tensor:
    """A weight for each group, (1, N), or for each row's, (outputs, N): under equal ones a wrong order is unseen."""
    shape = len(outputs) if by_row else 1, outputs[0].shape[0]
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(outputs[0].device)


def scaled_by(weights: Tensor, seeds: Sequence[Tensor]) -> list[Tensor]:
    """The seeds times weights (1, N), or (outputs, N)."""
    rows = weights.expand(len(seeds), -1)
    return [w.to(seed.dtype) * seed for w, seed in zip(rows, seeds, strict=True)]


def _by_rows(
    outputs: Sequence[Tensor], edges: list[GradientEdge], weights: Tensor, seeds: Sequence[Tensor]
) -> list[Tensor]:
    grads = torch.autograd.grad(outputs, edges, scaled_by(weights, seeds), retain_graph=True)
    return [x if x.dtype == torch.float64 else x.float() for x in grads]


def _tells_rows(node: Any) -> bool:
    """Whether the node's first output has an axis of rows: a tap's, or that of a function that says `rows_first`."""
    function = getattr(type(node), "_forward_cls", None)
    return getattr(function, "rows_first", False)
