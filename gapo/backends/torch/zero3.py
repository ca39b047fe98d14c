"""DeepSpeed ZeRO-3, experimental: the step on a model whose parameters lie in flat partitions.

DeepSpeed counts its hooks for one backward to a forward, so a graph cannot be propagated through twice: the update gets
a forward of its own, through the engine, and a step costs three forwards and two backwards. The probe's backward is
autograd's alone: each gradient is reduced and cut to this rank's part as it comes, so that no rank ever holds them all.

Tested with DeepSpeed 0.19 on CPUs, stage 3 without offloading.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapo.backends.base import LeafRule, MarginFn, outputs_of
from gapo.backends.torch.pairgrads import Verdicts
from gapo.backends.torch.sharded import ShardedForward
from gapo.config import GAPOConfig


class Zero3Forward(ShardedForward):
    """A clean forward through a `DeepSpeedEngine` of ZeRO stage 3, experimental.

    `parameters` are this rank's partitions as flat `DTensor`s that share their memory.
    """

    def __init__(
        self,
        margin_fn: MarginFn,
        engine: Any,
        batch: Any,
        config: GAPOConfig,
        verdicts: Verdicts | None = None,
    ) -> None:
        if config.anchor == "first_order":
            raise ValueError(
                'anchor="first_order" is not supported under DeepSpeed ZeRO-3: use FSDP2, or anchor="exact" with '
                'weights in float32, from which DeepSpeed\'s "torch_autocast" computes in bfloat16'
            )
        if config.target_gap is not None:
            raise ValueError(
                "target_gap is not supported under DeepSpeed ZeRO-3, since it starts from the first-order gaps: set "
                "rho, or use FSDP2"
            )
        self._engine = engine
        self._gathered = dict(engine.module.named_parameters())
        for name, p in self._gathered.items():
            _require_supported(name, p)
        super().__init__(margin_fn, engine.module, batch, config, verdicts)
        self.parameters = {name: _partition(self._gathered[name]) for name in self.parameters}

    def pullback(self, cotangents: Sequence[Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        wanted = list(self.parameters if names is None else names)
        grads: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in wanted:
                hooks.callback(self._gathered[name].register_hook(_keeper(grads, name)).remove)
            torch.autograd.grad(
                self.outputs, [self._gathered[name] for name in wanted], list(cotangents), allow_unused=True
            )
        self._reshard()
        return {name: grads[name] if name in grads else torch.zeros_like(self.parameters[name]) for name in wanted}

    def directional(self, delta: LeafRule, names: Iterable[str]) -> Tensor:
        raise ValueError(
            "weights or compute have 16 bits, where only a first-order anchor is right, which ZeRO-3 does not "
            'support: use FSDP2, or weights in float32, from which DeepSpeed\'s "torch_autocast" computes in bfloat16; '
            'anchor="exact" goes on, with gaps that are rounded'
        )

    def as_loss(self, value: Tensor, update: Any) -> Tensor:
        with torch.enable_grad(), self._replay.again():
            self.outputs = outputs_of(self._margin_fn(self._engine, self._batch))
        return super().as_loss(value, update)

    def _reshard(self) -> None:
        """Let go of every gathered parameter, the small ones that DeepSpeed keeps too: the next use gathers anew."""
        self._engine.optimizer.empty_partition_cache()

    def _recover(self) -> None:
        """DeepSpeed has no call for it: the weights are back, but a forward that failed ends its run."""


def is_engine(module: Any) -> bool:
    """Whether `module` is DeepSpeed's engine, of any stage."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine)


def is_zero3(module: nn.Module) -> bool:
    """Whether DeepSpeed has partitioned the parameters of `module`."""
    return any(hasattr(p, "ds_tensor") for p in module.parameters())


def _require_supported(name: str, p: Any) -> None:
    if p.ds_tensor.device != p.device or getattr(p, "ds_secondary_tensor", None) is not None:
        raise ValueError(
            f"the partition of {name!r} lies on {p.ds_tensor.device} or has a second copy: GAPO under DeepSpeed ZeRO-3 "
            "supports neither offload_param nor zero_hpz_partition_size; leave them out, or use FSDP2"
        )


def _keeper(grads: dict[str, Tensor], name: str) -> Any:
    """A hook that keeps this rank's part of the ranks' mean gradient, and lets go of the rest."""

    def keep(gradient: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Shard

        flat = gradient.detach().reshape(-1) / dist.get_world_size()
        part = DTensor.from_local(flat, _mesh(flat.device.type), [Partial()], run_check=False)
        grads[name] = part.redistribute(placements=[Shard(0)])
        return gradient.new_zeros(()).expand_as(gradient)

    return keep


def _partition(p: Any) -> Tensor:
    """The partitions of `p` over all ranks as one flat `DTensor`, without the last one's padding; memory is shared."""
    from torch.distributed.tensor import DTensor, Shard

    size, shape = p.ds_tensor.numel(), torch.Size([p.ds_numel])
    mine = max(0, min(size, p.ds_numel - dist.get_rank() * size))
    flat = p.ds_tensor.data[:mine]
    return DTensor.from_local(flat, _mesh(flat.device.type), [Shard(0)], run_check=False, shape=shape, stride=(1,))


@lru_cache
def _mesh(device: str) -> Any:
    """All ranks in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (dist.get_world_size(),))
