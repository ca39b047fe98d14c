"""FSDP2: the clean forward of a module whose parameters are shards, and what shards require of the backend's verbs.

Autograd's graph ends at the gathered weights, which FSDP2 frees after the layer. Only a real backward reduces their
gradients to the shards. So the pullback is a backward with the optimiser's `.grad` set aside. Its gradients, like the
shards, are `DTensor`s: averages over the ranks, on which each rank does arithmetic of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapo.backends.base import LeafRule, on_outputs
from gapo.backends.torch.forward import TorchForward, is_shard
from gapo.backends.torch.pairgrads.graph import grads_aside
from gapo.backends.torch.plain import PlainForward


class PlainShardedForward(PlainForward):
    """A clean forward through `torch.distributed.fsdp.fully_shard`; its gradients are the ranks' average, as shards."""

    def _gradients(self, cotangents: Sequence[Tensor], wanted: list[str], keep: bool) -> dict[str, Tensor]:
        with grads_aside(self.parameters):
            torch.autograd.backward(self.outputs, list(cotangents), retain_graph=keep)
            grads = {name: p.grad for name, p in self.parameters.items()}
        if all(g is None for g in grads.values()):
            raise RuntimeError(
                "FSDP2 holds gradients back (set_requires_gradient_sync(False), or accelerate's no_sync), but ranks "
                "that share an anchor reduce at every backward: set sync_each_batch=True in "
                "accelerate.utils.GradientAccumulationPlugin, or call set_requires_gradient_sync(True)"
            )
        return {name: torch.zeros_like(self.parameters[name]) if (g := grads[name]) is None else g for name in wanted}


class ShardedForward(TorchForward):
    """A clean forward through `fully_shard` of which an anchor can be asked."""

    _gradients = PlainShardedForward._gradients

    def _prepare(self) -> None:
        self._units = fsdp_units(self._module)  # the root first
        self._reshard()  # after a forward without backward some parameters are still the gathered ones
        super()._prepare()

    def _run_again(self) -> None:
        self._reshard()
        super()._run_again()

    def at(self, move: LeafRule, names: Iterable[str]) -> tuple[Tensor, ...]:
        # Gathered weights stay as they are until they are resharded. Without the first call, the anchor's forward
        # would use theta and the gap would be wrong. Without the second, the update would use the anchor.
        self._reshard()
        try:
            return super().at(move, names)
        except BaseException:
            self._recover()
            raise
        finally:
            self._reshard()

    def directional(self, delta: LeafRule, names: Iterable[str]) -> Tensor:
        # A backward averages over the ranks. So each backward takes one pair of one rank, and all ranks join it.
        names = list(names)
        deltas = [delta(name, self.parameters[name].detach()) for name in names]
        mine, ranks = self.outputs[0].shape[0], dist.get_world_size()
        pairs: list[Any] = [None] * ranks
        dist.all_gather_object(pairs, mine)
        along: list[Any] = []
        for rank, there in enumerate(pairs):
            for i in range(there):
                cotangent = torch.zeros_like(self.outputs[0])
                if rank == dist.get_rank():
                    cotangent[i] = ranks
                grads = self.pullback(on_outputs(cotangent, self.outputs, xp), names).values()
                product = sum(whole(torch.sum(g * d)) for g, d in zip(grads, deltas, strict=True))
                if rank == dist.get_rank():
                    along.append(product)
        return torch.stack(along)

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    def _recover(self) -> None:
        """Take every unit out of a forward that failed. The root resets them all in torch >= 2.13."""
        if hasattr(self._units[0], "reset_iter_state"):
            self._units[0].reset_iter_state()


def fsdp_units(module: nn.Module) -> list[Any]:
    """The modules in `module`, itself included, that FSDP2 shards, the root first; empty for most.

    Raises:
        ValueError: it is sharded by FSDP1, whose flat parameters have no names of their own.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not loaded: nothing is sharded
    if fsdp is None:
        return []
    if any(isinstance(m, fsdp.FullyShardedDataParallel) for m in module.modules()):
        raise ValueError("the model is sharded by FSDP1: use FSDP2, fsdp_version=2 in accelerate")
    return [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]


def whole(x: Any) -> Tensor:
    """A `DTensor` gathered; any other tensor as it is."""
    full: Tensor = x.full_tensor() if is_shard(x) else x
    return full


def by_rank(x: Any, of_shard: Callable[[Tensor], Tensor]) -> Tensor:
    """`of_shard(local)` of every rank's shard of `x`, as a vector; 0 for an empty shard."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    local = x.to_local()
    value = of_shard(local) if local.numel() else local.new_zeros(())
    placements = [Replicate() if p.is_replicate() else Shard(0) for p in x.placements]
    return whole(DTensor.from_local(value.reshape(1), x.device_mesh, placements, run_check=False))


def like_shard(draw: Tensor, p: Any) -> Tensor:
    """This rank's part of `draw`, which is the same on all ranks, placed as the parameter `p` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(draw, p.device_mesh, p.placements, src_data_rank=None)
