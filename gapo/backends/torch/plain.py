"""The forward of an objective without an anchor: one graph, one backward, and nothing that only an anchor needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.base import MarginFn, outputs_of, require_real
from gapo.backends.torch.forward import no_grads_left, require_graph


class PlainForward:
    """The clean forward of a module, to be pulled back once."""

    def __init__(self, margin_fn: MarginFn, module: nn.Module, batch: Any, wrapper: nn.Module | None = None) -> None:
        self._module = module
        with torch.enable_grad():
            self.outputs: tuple[Tensor, ...] = outputs_of(margin_fn(module if wrapper is None else wrapper, batch))
        require_graph(self.outputs, any(p.requires_grad for p in module.parameters()))

    @property
    def parameters(self) -> dict[str, Any]:
        """Every trainable parameter by name."""
        parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        require_real({name: p.is_complex() for name, p in parameters.items()})
        return parameters

    def pullback(self, cotangents: Sequence[Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Gradients of `sum_j <cotangents[j], outputs[j]>` by the parameters; the graph is spent."""
        parameters = self.parameters
        wanted = list(parameters if names is None else names)
        with no_grads_left(parameters):
            grads = torch.autograd.grad(
                self.outputs, [parameters[name] for name in wanted], list(cotangents), materialize_grads=True
            )
        return dict(zip(wanted, grads, strict=True))

    def as_loss(self, value: Tensor, cotangents: Sequence[Tensor]) -> Tensor:
        """A scalar of this value whose `backward()` gives the pullback of `cotangents`."""
        return linear_loss(value, cotangents, self.outputs)


def linear_loss(value: Tensor, cotangents: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """A scalar of this value, linear in `outputs`, with `cotangents` for its derivatives."""
    pull = torch.stack([torch.sum(c * y) for c, y in zip(cotangents, outputs, strict=True)]).sum()
    return value + (pull - pull.detach())
