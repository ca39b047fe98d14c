"""The clean forward in PyTorch: one autograd graph, pulled back twice."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn

from gapo.backends.base import LeafRule, MarginFn, Update, on_outputs
from gapo.backends.torch.cut import cut_below
from gapo.backends.torch.deposit import deposited
from gapo.backends.torch.half import quantises, rounds
from gapo.backends.torch.head import head_parameters
from gapo.backends.torch.pairgrads import Verdicts
from gapo.backends.torch.pairgrads.agreement import coarse_arithmetic, compared
from gapo.backends.torch.pairgrads.verdicts import basis
from gapo.backends.torch.plain import PlainForward
from gapo.backends.torch.replay import Replay
from gapo.config import GAPOConfig
from gapo.selection import select

logger = logging.getLogger(__name__)


class TorchForward(PlainForward):
    """The clean forward of a module and its autograd graph, of which an anchor can be asked.

    Some graphs can be pulled back once only: a kernel stores results over its saved tensors, or a compiled graph
    donates them. The first step finds that out by pulling back twice. The update then gets a second clean forward.

    `verdicts` hold what earlier steps found out about this module; without them nothing is taken as known.
    """

    def __init__(
        self,
        margin_fn: MarginFn,
        module: nn.Module,
        batch: Any,
        config: GAPOConfig,
        verdicts: Verdicts | None = None,
        wrapper: nn.Module | None = None,
    ) -> None:
        self._config = config
        self._at_anchor = config.updates_at_anchor  # then the anchor's forward runs whole, and is pulled back
        self._verdicts = Verdicts() if verdicts is None else verdicts
        self._spent = False  # whether the graph behind `outputs` can be pulled back no more
        super().__init__(margin_fn, module, batch, wrapper)
        if self._cut:
            self._cut.see(self.outputs)

    def _prepare(self) -> None:
        self.head = head_parameters(self._module, self.parameters)
        self._basis = basis(self._margin_fn, self._module)
        self._replay = Replay(self._module, self._verdicts)
        exact = self._config.anchor != "first_order"
        self._moved = select(self.parameters, self.head, self._config)
        reuses = exact and not self._at_anchor
        self._cut = cut_below(self._module, self._moved, self._verdicts) if reuses else None

    def _run_clean(self) -> tuple[Tensor, ...]:
        with self._cut.kept(self._basis) if self._cut else nullcontext():
            return super()._run_clean()

    def _run_again(self) -> None:
        """A second clean forward: the same numbers, and a graph of its own."""
        with torch.enable_grad(), self._replay.again():
            self.outputs = self._run(self._inside())
        self._spent = False

    def _inside(self) -> nn.Module:
        """The module within DDP, which has prepared its reduction in the first forward: not all ranks may run again."""
        return self._module.module if isinstance(self._module, nn.parallel.DistributedDataParallel) else self._module

    def half_compute(self) -> bool:
        return rounds(self.outputs) or quantises(self._module)

    def pullback(self, cotangents: Sequence[Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        wanted = list(self.parameters if names is None else names)
        if self._spent:
            self._run_again()
        lasts = self._verdicts.get("lasts", self._module, self._basis)
        # An update at the anchor needs the clean graph no more, unless first-order gaps come for `target_gap`.
        last = self._at_anchor and self._config.target_gap is None
        if names is None or lasts is False or last:
            self._spent = True
            return self._gradients(cotangents, wanted, keep=False)
        grads = self._gradients(cotangents, wanted, keep=True)
        if self._spent:
            return grads
        if lasts is None:
            again = self._gradients(cotangents, wanted, keep=True)
            same, why = compared(again.__getitem__, grads, than="those of its first backward", coarse=self._coarse())
            if same is False:
                self._do_not_keep(why)
            elif same:
                self._verdicts.keep("lasts", self._module, self._basis, True)
        return grads

    def _coarse(self) -> bool:
        """Whether gradients are of 16-bit arithmetic, or of products as coarse."""
        return coarse_arithmetic((*self.parameters.values(), *self.outputs), self.outputs[0].device.type)

    def _gradients(self, cotangents: Sequence[Tensor], wanted: list[str], keep: bool) -> dict[str, Tensor]:
        """The gradients by the parameters `wanted`; with `keep` the graph lives on, if it can."""
        try:
            return super()._gradients(cotangents, wanted, keep)
        except RuntimeError as error:
            if not keep or "donated buffer" not in str(error):
                raise
        self._do_not_keep("a compiled graph donates its buffers")
        return super()._gradients(cotangents, wanted, keep=False)

    def _do_not_keep(self, reason: str) -> None:
        self._spent = True
        self._verdicts.keep("lasts", self._module, self._basis, False)
        logger.warning(
            "the graph of this model can be pulled back once only (%s): each step runs a second clean forward for its "
            "update, which costs one forward more",
            reason,
        )

    def as_loss(self, value: Tensor, update: Update) -> Tensor:
        if isinstance(update, Mapping):
            return deposited(value, update, self.parameters)
        if self._spent:
            self._run_again()
        return super().as_loss(value, update)

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[Tensor, ...]:
        def outputs() -> tuple[Tensor, ...]:
            return self._cut.outputs(self._run, self._replay.again) if self._cut else self._run()

        with torch.no_grad(), self._replay.again():
            return self._while_moved(move, names, outputs)

    def pulled_at(
        self, move: LeafRule, names: Iterable[str], cotangents: Callable[[tuple[Tensor, ...]], Sequence[Tensor]]
    ) -> dict[str, Tensor]:
        def grads() -> dict[str, Tensor]:
            with torch.enable_grad():
                self.outputs = self._run(self._inside())
            slopes = cotangents(tuple(output.detach() for output in self.outputs))
            return self._gradients(slopes, list(self.parameters), keep=False)

        with torch.no_grad(), self._replay.again():
            return self._while_moved(move, names, grads)

    def _while_moved(self, move: LeafRule, names: Iterable[str], then: Callable[[], Any]) -> Any:
        """`then()` with the named parameters moved, which are back afterwards, whatever happens."""
        # `.data` is written in place: storages stay where they are (views, buckets, CUDA graphs), and the version
        # counter does not move, so that the clean graph stays valid. theta returns from a clone, bit for bit.
        names, shared = list(names), self._sharing_memory(names)
        saved: dict[str, Tensor] = {}
        try:
            try:
                for name in shared:  # before one of them moves the others
                    saved[name] = self.parameters[name].data.clone()
                for name in names:
                    theta = self.parameters[name].data
                    saved[name] = saved[name] if name in shared else theta.clone()
                    moved = move(name, saved[name])
                    if name in shared and not torch.equal(theta, saved[name]):  # another one has moved it already
                        moved = theta + (moved - saved[name])
                    theta.copy_(moved)
                torch.clear_autocast_cache()  # low-precision copies of theta would hide the anchor
                return then()
            finally:
                self._put_back(saved)
        finally:  # a Ctrl-C may fall into the lines above, and then their work is finished here
            self._put_back(saved)

    def _sharing_memory(self, names: Iterable[str]) -> set[str]:
        """Those of the parameters `names` that lie in the same storage as another one of them."""
        places = {name: p.untyped_storage().data_ptr() for name in names if not is_shard(p := self.parameters[name])}
        owners = Counter(places.values())
        return {name for name, place in places.items() if owners[place] > 1}

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
            cotangent = torch.zeros_like(self.outputs[0])
            cotangent[i] = 1
            grads = self.pullback(on_outputs(cotangent, self.outputs, xp), names).values()
            along.append(sum(torch.sum(g * d) for g, d in zip(grads, deltas, strict=True)))
        return torch.stack(along)


def is_shard(x: Any) -> bool:
    """Whether `x` is a rank's shard of a parameter or of its gradient, a `DTensor`."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)
