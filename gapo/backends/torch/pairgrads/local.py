"""The fallback for a layer without a rule: it runs again on its saved inputs, and autograd gives the gradients.

    for each group i:   y = layer(rows of group i);   grad_i = vjp of y by the layer's own parameters, at G of its rows

Together the groups' reruns cost about one forward of the layer and one backward by its parameters; the model around it
keeps its single backward. Where N gradients would be more numbers than the layer's inputs and outputs, they are not
kept: a weighted sum then takes one rerun of all rows, and an inner product one rerun for each group.

A layer whose output for a row depends on other rows, or on chance, gives something else when its groups run alone. So
sums over each row of the output are compared, at every rerun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from gapo.backends.torch.pairgrads.parts import Explicit, Parts
from gapo.backends.torch.pairgrads.refused import Refused

_SMALL = 2**16  # entries of a buffer that is put back after a rerun


class Snapshot:
    """A layer's call: the layer as it was, its arguments' structure, its autocast, and a print of what it gave."""

    def __init__(self, layer: nn.Module, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> None:
        leaves, self._structure = tree_flatten((args, kwargs))
        self._others = [None if isinstance(x, Tensor) else x for x in leaves]
        self._places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        self.kind = type(layer).__name__
        self._twin = object.__new__(type(layer))  # what the model sets on the layer before each call stays as it is now
        self._twin.__dict__.update(layer.__dict__)
        device = outputs[0].device.type
        self._autocast: dict[str, Any] = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": False,  # its copies of weights may be another forward's
        }
        self.prints = [_print(y) for y in outputs]

    @staticmethod
    def tensors(args: Any, kwargs: Any) -> list[Tensor]:
        """The tensors among the arguments, in the order in which `run` takes them."""
        return [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The differentiable outputs for these tensors in place of those it was called with."""
        leaves = list(self._others)
        for place, x in zip(self._places, tensors, strict=True):
            leaves[place] = x
        args, kwargs = tree_unflatten(leaves, self._structure)
        with torch.enable_grad(), torch.autocast(**self._autocast), _buffers_aside(self._twin):
            return differentiable(self._twin.forward(*args, **kwargs))


@dataclass
class Rerun:
    """One call with its saved tensors and the gradients of its outputs.

    `split` makes (blocks, N, ...) of a tensor of the call's rows and None of any other one.
    """

    snapshot: Snapshot
    tensors: Sequence[Tensor]
    grads: Sequence[Tensor]
    split: Callable[[Tensor], Tensor | None]
    coarse: bool

    def of_group(self, i: int, parameters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Group i's gradients by the layer's `parameters`, and whether its outputs are not those of the call."""
        pick = _Picker(self.split, i)
        return self._vjp([pick(x) for x in self.tensors], [pick(g) for g in self.grads], parameters, pick)

    def weighted(self, weights: Tensor, parameter: Tensor) -> Tensor:
        """The weighted sum over groups, by one rerun of all rows."""
        grads = []
        for g in self.grads:
            by_group = self.split(g)
            assert by_group is not None
            shape = (1, -1, *[1] * (by_group.ndim - 2))
            grads.append((by_group * weights.to(g.dtype).reshape(shape)).reshape(g.shape))
        (total,), differs = self._vjp(self.tensors, grads, [parameter], lambda x: x)
        self.require_same(differs)
        return total

    def require_same(self, differs: Tensor) -> None:
        """Raise where a rerun gave something else."""
        if bool(differs):
            raise Refused(f"{self.snapshot.kind} has no rule, and gives something else when it runs again")

    def _vjp(
        self, tensors: Sequence[Tensor], grads: Sequence[Tensor], parameters: Sequence[Tensor], pick: Callable[..., Any]
    ) -> tuple[list[Tensor], Tensor]:
        try:
            outputs = self.snapshot.run(tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Refused(f"{self.snapshot.kind} has no rule, and cannot run again on fewer rows: {error}") from error
        if [y.shape for y in outputs] != [g.shape for g in grads]:
            raise Refused(f"{self.snapshot.kind} has no rule, and gives other shapes for fewer rows")
        differs = torch.stack(
            [
                _differ(_print(y), pick(p), y.dtype, self.coarse)
                for y, p in zip(outputs, self.snapshot.prints, strict=True)
            ]
        ).any()
        gradients = torch.autograd.grad(
            outputs, list(parameters), list(grads), materialize_grads=True, allow_unused=True
        )
        return [x.detach() for x in gradients], differs


@dataclass
class Lazy:
    """The gradients by one large parameter, never kept."""

    rerun: Rerun
    parameter: Tensor
    groups: int

    def weighted(self, weights: Tensor) -> Tensor:
        return self.rerun.weighted(weights, self.parameter)

    def along(self, delta: Tensor) -> Tensor:
        along = []
        for i in range(self.groups):
            (gradient,), differs = self.rerun.of_group(i, [self.parameter])
            self.rerun.require_same(differs)
            along.append(torch.sum(gradient.to(delta.dtype) * delta))
        return torch.stack(along)


def local_vjp(rerun: Rerun, parameters: dict[str, Tensor], groups: int, differs: list[tuple[str, Tensor]]) -> Parts:
    """The parts of a layer's own `parameters`; `differs` is told, group by group, whether the rerun was another."""
    numbers = sum(x.numel() for x in (*rerun.tensors, *rerun.grads))
    small = {name: p for name, p in parameters.items() if groups * p.numel() <= numbers}
    for name, p in parameters.items():
        if name not in small:
            yield name, Lazy(rerun, p, groups)
    if small:
        rows = []
        for i in range(groups):
            row, other = rerun.of_group(i, list(small.values()))
            rows.append(row)
            differs.append((rerun.snapshot.kind, other))
        for name, grads in zip(small, zip(*rows, strict=True), strict=True):
            yield name, Explicit(torch.stack(grads))


class _Picker:
    """One group's rows of a tensor, or the whole of one that has no rows."""

    def __init__(self, split: Callable[[Tensor], Tensor | None], i: int) -> None:
        self._split, self._i = split, i

    def __call__(self, x: Tensor) -> Tensor:
        by_group = self._split(x)
        if by_group is None:
            return x
        own = by_group[:, self._i]
        return own.reshape(-1, *x.shape[1:]).contiguous()  # as the whole was, which a `view` relies on


def differentiable(output: Any) -> list[Tensor]:
    """The tensors of an output that gradients can come back through."""
    return [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.requires_grad]


def _print(y: Tensor) -> Tensor:
    """(rows, 2): the sum of each row, and that of its entries' sizes."""
    wide = y.detach().to(torch.promote_types(y.dtype, torch.float32)).flatten(1)
    return torch.stack([wide.sum(1), wide.abs().sum(1)], 1)


def _differ(again: Tensor, expected: Tensor, dtype: torch.dtype, coarse: bool) -> Tensor:
    share = 2e-2 if coarse or dtype.itemsize < 4 else 1e-3 if dtype == torch.float32 else 1e-6
    return ~((again - expected).abs() <= share * expected[:, 1:]).all()


@contextmanager
def _buffers_aside(layer: nn.Module) -> Iterator[None]:
    """Let a rerun write to copies of buffers."""
    owners = [(m, name, x) for m in layer.modules() for name, x in m._buffers.items() if x is not None]
    versions = [(x, x._version) for _, _, x in owners if x.numel() > _SMALL and not x.is_inference()]
    try:
        for m, name, x in owners:
            if x.numel() <= _SMALL:
                m._buffers[name] = x.clone()
        yield
    finally:
        for m, name, x in owners:
            m._buffers[name] = x
    if any(x._version != version for x, version in versions):
        raise Refused(f"{type(layer).__name__} has no rule, and writes to a large buffer")
