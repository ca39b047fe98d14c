"""The clean forward in PyTorch: one autograd graph, pulled back twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn

from gapo.backends.base import LeafRule, MarginFn, on_outputs, outputs_of, require_real
from gapo.backends.torch.cut import cut_below
from gapo.backends.torch.half import quantises, rounds
from gapo.backends.torch.head import head_parameters
from gapo.backends.torch.random_state import RandomState
from gapo.config import GAPOConfig
from gapo.selection import select


class TorchForward:
    """The clean forward of a module and its autograd graph."""

    def __init__(self, margin_fn: MarginFn, module: nn.Module, batch: Any, config: GAPOConfig) -> None:
        self._margin_fn, self._module, self._batch = margin_fn, module, batch
        self.parameters: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        require_real({name: p.is_complex() for name, p in self.parameters.items()})
        self.head = head_parameters(module, self.parameters)
        self._random_state = RandomState(module)
        moved = () if config.anchor == "first_order" else select(self.parameters, self.head, config)
        self._cut = cut_below(module, moved) if moved else None
        with torch.enable_grad(), self._cut.kept() if self._cut else nullcontext():
            self.outputs = self._run()
        for output in self.outputs:
            if self.parameters and not output.requires_grad:
                raise ValueError(
                    "the outputs of margin_fn carry no gradient: it must not detach them or run under torch.no_grad"
                )

    def _run(self) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = outputs_of(self._margin_fn(self._module, self._batch))
        return outputs

    def half_compute(self) -> bool:
        return rounds(self.outputs) or quantises(self._module)

    def pullback(self, cotangents: Sequence[Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        wanted = list(self.parameters if names is None else names)
        grads = torch.autograd.grad(
            self.outputs,
            [self.parameters[name] for name in wanted],
            grad_outputs=list(cotangents),
            retain_graph=names is not None,
            materialize_grads=True,
        )
        return dict(zip(wanted, grads, strict=True))

    def as_loss(self, value: Tensor, cotangents: Sequence[Tensor]) -> Tensor:
        """A scalar of this value whose `backward()` gives the pullback of `cotangents`: the way of training loops."""
        pull = torch.stack([torch.sum(c * y) for c, y in zip(cotangents, self.outputs, strict=True)]).sum()
        return value + (pull - pull.detach())

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[Tensor, ...]:
        # `.data` is written in place: storages stay where they are (views, buckets, CUDA graphs), and the version
        # counter does not move, so that the clean graph stays valid. theta returns from a clone, bit for bit.
        saved: dict[str, Tensor] = {}
        try:
            try:
                with torch.no_grad(), self._random_state.replayed():
                    for name in names:
                        theta = self.parameters[name].data
                        saved[name] = theta.clone()
                        theta.copy_(move(name, theta))
                    torch.clear_autocast_cache()  # low-precision copies of theta would hide the anchor
                    return self._cut.outputs(self._run, self._random_state) if self._cut else self._run()
            finally:
                self._put_back(saved)
        finally:  # a Ctrl-C may fall into the lines above, and then their work is finished here
            self._put_back(saved)

    def _put_back(self, saved: dict[str, Tensor]) -> None:
        for name in list(saved):
            self.parameters[name].data.copy_(saved[name])
            del saved[name]
        torch.clear_autocast_cache()

    def directional(self, delta: LeafRule, names: Iterable[str]) -> Tensor:
        # One backward for each pair: slow, and right for every module.
        names = list(names)
        deltas = [delta(name, self.parameters[name].detach()) for name in names]
        along: list[Any] = []
        for i in range(self.outputs[0].shape[0]):
            one = torch.zeros_like(self.outputs[0])
            one[i] = 1
            grads = self.pullback(on_outputs(one, self.outputs, xp), names).values()
            along.append(sum(torch.sum(g * d) for g, d in zip(grads, deltas, strict=True)))
        return torch.stack(along)
