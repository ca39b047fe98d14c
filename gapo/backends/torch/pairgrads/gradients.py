"""The gradients of every group by every parameter, after the backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from gapo.backends.torch.pairgrads.parts import Part


class GroupGradients:
    """What `Tape.backward` returns: N gradients by each parameter, to be weighted and multiplied at will.

    They are kept as parts, one for each call of a layer, in whichever form takes less memory. Linear questions are
    cheap and can be asked as often as wanted; no propagation takes place.
    """

    def __init__(self, parameters: Mapping[str, Tensor], like: Tensor, groups: int, blocks: int, by_row: bool) -> None:
        self.parameters = dict(parameters)
        self.groups, self._blocks, self._by_row = groups, blocks, by_row
        self._wide, self._device = torch.promote_types(like.dtype, torch.float32), like.device
        # Each with the block whose rows it is of; None where it is of all blocks.
        self.parts: dict[str, list[tuple[int | None, Part]]] = defaultdict(list)

    def weighted(
        self, weights: Tensor, names: Iterable[str] | None = None, *, release: bool = False
    ) -> dict[str, Tensor]:
        """`sum_i weights[i] * grad_i` by each parameter, in its shape and dtype; 0 for one that was not used.

        Args:
            weights: (N,), or (blocks, N) from a tape with `by_row`: a weight for each row.
            names: the parameters wanted; None for all.
            release: forget each parameter's parts once they are summed, so that memory falls as gradients are made.
        """
        shapes = [(self.groups,), *([(self._blocks, self.groups)] if self._by_row else [])]
        if tuple(weights.shape) not in shapes:
            raise ValueError(
                f"weights must have the shape {' or '.join(map(str, shapes))}, got {tuple(weights.shape)}"
                + ("" if self._by_row else "; a weight for each row needs Tape(..., by_row=True)")
            )
        weights = weights.to(self._device, self._wide)
        grads = {}
        for name in self.parameters if names is None else names:
            grads[name] = self._sum(name, weights)
            if release:
                self.parts.pop(name, None)
        return grads

    def _sum(self, name: str, weights: Tensor) -> Tensor:
        theta = self.parameters[name]
        total: Tensor | None = None
        for block, part in self.parts.get(name, ()):
            if self._by_row:
                rows = weights.expand(self._blocks, -1)
                weight = rows.flatten() if block is None else rows[block]
            else:
                weight = weights
            gradient = part.weighted(weight).to(theta.dtype)
            total = gradient if total is None else total + gradient
        return torch.zeros_like(theta) if total is None else total

    def along(
        self, delta: Mapping[str, Tensor] | Callable[[str, Tensor], Tensor], names: Iterable[str] | None = None
    ) -> Tensor:
        """`<grad_i, delta>`, (N,): how much each group's output changes along `delta`, to first order.

        Args:
            delta: a tensor for each parameter by name, or a function of (name, parameter) that makes it when needed.
            names: the parameters that move; None for those of a mapping, or all.
        """
        if isinstance(delta, Mapping):
            names = delta if names is None else names
        along = torch.zeros(self.groups, dtype=self._wide, device=self._device)
        for name in self.parameters if names is None else names:
            theta = self.parameters[name].detach()
            moved = delta[name] if isinstance(delta, Mapping) else delta(name, theta)
            for _, part in self.parts.get(name, ()):
                along = along + part.along(moved).reshape(-1, self.groups).sum(0)  # rows of a group add up
        return along
