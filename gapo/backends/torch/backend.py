"""The `Backend` verbs on PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapo import geometry
from gapo.backends.base import MarginFn
from gapo.backends.torch.forward import TorchForward
from gapo.backends.torch.onepass import OnePassForward
from gapo.backends.torch.pairgrads import Verdicts
from gapo.backends.torch.plain import PlainForward
from gapo.backends.torch.sharded import PlainShardedForward, ShardedForward, by_rank, fsdp_units, is_shard, like_shard
from gapo.backends.torch.token_logps import token_logps  # noqa: F401  (takes its place in gapo.logps)
from gapo.backends.torch.zero3 import Zero3Forward, is_engine, is_zero3
from gapo.config import GAPOConfig
from gapo.mask import Mask

# Entries of a block for each thread: several arrays of them fit a core's cache, and a call costs little beside them.
_BLOCK = 2**16
# Norms of a float32 block whose squares neither vanish nor overflow, but for entries too small to count.
_LEAST, _MOST = 1e-15, 1e15


class TorchBackend:
    """The `Backend` verbs on PyTorch. Ranks are those of `torch.distributed`'s default group, if initialised.

    With `one_pass` the backward runs once, where a model's layers allow it (`onepass`); else it runs twice.

    What is proved about a model at its first step is proved for this object. Another backend proves it anew.
    """

    xp = xp

    def __init__(self, one_pass: bool = True) -> None:
        self._one_pass = one_pass
        self._verdicts = Verdicts()

    def forward(
        self,
        margin_fn: MarginFn,
        params: Any,
        batch: Any,
        config: GAPOConfig,
        *,
        anchor: bool = True,
        by_side: bool = False,
        wrapper: nn.Module | None = None,
    ) -> PlainForward:
        """The clean forward by the way that fits the module: without an anchor; ZeRO-3; FSDP2; one pass or two.

        Args:
            margin_fn, params, batch, config, anchor, by_side: as the protocol has them.
            wrapper: the module around `params` whose forward prepares the update's backward, such as
                `DistributedDataParallel` or DeepSpeed's engine; `params` itself where nothing wraps it. The update's
                forward goes through it, every other one through `params`. Its caller takes the update by `as_loss`.
        """
        if not isinstance(params, nn.Module):
            raise TypeError(f'params must be a torch.nn.Module for backend="torch", got {type(params).__name__}')
        if not anchor and wrapper is not None:
            return PlainForward(margin_fn, params, batch, wrapper)
        at_anchor = anchor and config.updates_at_anchor
        shards = fsdp_units(params)
        if anchor and (shards or is_zero3(params)):
            _refuse_on_shards(config)
        if is_zero3(params):
            if wrapper is None:
                raise ValueError(
                    "DeepSpeed has partitioned the parameters (ZeRO-3): train with gapo.adapters.hf.GAPOCallback in a "
                    "Trainer, or shard with FSDP2 in a loop of your own"
                )
            return Zero3Forward(margin_fn, wrapper, batch, config, self._verdicts)
        if is_engine(wrapper):  # up to ZeRO-2 it would take the probe's backward for the update's
            wrapper = None
        for unit in shards:  # after a forward without backward its parameters are gathered, and no shards
            unit.reshard()
        if not anchor:
            return (PlainShardedForward if shards else PlainForward)(margin_fn, params, batch)
        options: dict[str, Any] = {"verdicts": self._verdicts, "wrapper": wrapper}
        if shards:
            return ShardedForward(margin_fn, params, batch, config, **options)
        # float16's gradient scaler must see the backward. Where autocast is within the model's forward, as accelerate
        # puts it, its maker says one_pass=False.
        float16 = any(
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
            for kind in ("cuda", "cpu")
        )
        # An update at the anchor is another backward, of other weights: one pass would save nothing.
        if self._one_pass and not float16 and not at_anchor:
            return OnePassForward(margin_fn, params, batch, config, by_side=by_side, **options)
        return TorchForward(margin_fn, params, batch, config, **options)

    def differentiate(
        self, losses: Callable[[tuple[Tensor, ...]], Tensor], values: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_() for x in values)
            by_pair = losses(leaves)
            if not by_pair.requires_grad:
                raise ValueError(
                    "the losses carry no gradient: the objective must not detach them, nor use torch.no_grad"
                )
            slopes = torch.autograd.grad(by_pair.mean(), leaves, materialize_grads=True, allow_unused=True)
        return by_pair.detach(), slopes

    def norm(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        if is_shard(x):
            return self.norm(by_rank(x, self.norm))
        if x.dtype == torch.float64 or x.device.type == "mps":
            return geometry.norm(x, xp, size)
        if _has_cache(x):  # float32's own kernel is four times as fast, and right unless squares vanish or overflow
            norms = torch.stack([torch.linalg.vector_norm(block) for (block,) in self.blocks(x)])
            if float(norms.min()) > _LEAST and float(norms.max()) < _MOST:
                return torch.linalg.vector_norm(norms)
        # One fused pass; the square of a float32 can neither vanish nor overflow in float64.
        return torch.linalg.vector_norm(x, dtype=torch.float64).to(x.dtype)

    def share_nonzero(self, x: Tensor) -> Tensor:
        count = by_rank(x, torch.count_nonzero).sum() if is_shard(x) else torch.count_nonzero(x)
        return count.to(x.dtype) / x.numel()

    def blocks(self, *arrays: Tensor) -> Iterable[tuple[Tensor, ...]]:
        size = _BLOCK * torch.get_num_threads()
        if arrays[0].numel() <= size or not all(map(_has_cache, arrays)):
            return [arrays]
        return zip(*(x.view(-1).split(size) for x in arrays), strict=True)

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        if is_shard(x):  # reduced as it came to be one
            return x
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return x
        reduced = x.clone()
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return reduced / dist.get_world_size() if op == "mean" else reduced

    def normal(self, names: Iterable[str], parameters: dict[str, Tensor], rng: Any) -> dict[str, Tensor]:
        if rng is None:  # a seed from the global stream, the same on all ranks
            seed = self.all_reduce(torch.randint(2**53, ()), "max")
            rng = torch.Generator().manual_seed(int(seed))
        draws = {}
        for name in names:
            p = parameters[name]
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            draw = torch.randn(p.shape, generator=rng, dtype=dtype, device=rng.device).to(p.device)
            draws[name] = like_shard(draw, p) if is_shard(p) else draw
        return draws

    def call_back(self, condition: Tensor, tell: Callable[..., None], *values: Tensor) -> bool:
        return False

    def pack(self, forward: Any, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return grads


def _refuse_on_shards(config: GAPOConfig) -> None:
    """Raise ValueError for what a step cannot do where ranks hold parts of the parameters."""
    where = "is not supported on sharded parameters (FSDP2, DeepSpeed ZeRO-3): train with DDP or up to ZeRO-2"
    if config.updates_at_anchor:
        raise ValueError(f"update='anchor' {where}, or set update='policy'")
    if isinstance(config.perturb, Mask):
        raise ValueError(f"perturb with masks {where}, or name whole parameters")


def _has_cache(x: Tensor) -> bool:
    """Whether blocks of `x` are views, and repay the calls: on a CPU, where nothing compiles them into one pass."""
    plain = x.device.type == "cpu" and x.is_contiguous() and not is_shard(x)
    return plain and not torch.compiler.is_compiling()


def make_backend(one_pass: bool = True) -> TorchBackend:
    """The PyTorch backend; `one_pass=False` always propagates twice, which is slower and asks nothing of the layers."""
    return TorchBackend(one_pass)
