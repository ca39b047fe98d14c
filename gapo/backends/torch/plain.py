"""The forward of an objective without an anchor: one graph, one backward, and nothing that only an anchor needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.base import MarginFn, outputs_of, require_real
from gapo.backends.torch.pairgrads.graph import no_grads_left


class PlainForward:
    """The clean forward of a module, to be pulled back once."""

    def __init__(self, margin_fn: MarginFn, module: nn.Module, batch: Any, wrapper: nn.Module | None = None) -> None:
        self._margin_fn, self._module, self._batch, self._wrapper = margin_fn, module, batch, wrapper
        self.parameters: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        require_real({name: p.is_complex() for name, p in self.parameters.items()})
        self._prepare()
        with torch.enable_grad():
            self.outputs = self._run_clean()
        if self.parameters and not all(output.requires_grad for output in self.outputs):
            raise ValueError(
                "the outputs of margin_fn carry no gradient: it must not detach them or run under torch.no_grad"
            )

    def _prepare(self) -> None:
        """What is to be done before the clean forward."""

    def _run_clean(self) -> tuple[Tensor, ...]:
        """The forward that the update goes back through: by the wrapper, in which DDP prepares its reduction."""
        return self._run(self._wrapper)

    def _run(self, wrapper: nn.Module | None = None) -> tuple[Tensor, ...]:
        """A forward through `wrapper`, or through the module alone."""
        outputs: tuple[Tensor, ...] = outputs_of(
            self._margin_fn(self._module if wrapper is None else wrapper, self._batch)
        )
        return outputs

    def pullback(self, cotangents: Sequence[Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Gradients of `sum_j <cotangents[j], outputs[j]>` by the parameters; the graph is spent."""
        return self._gradients(cotangents, list(self.parameters if names is None else names), keep=False)

    def _gradients(self, cotangents: Sequence[Tensor], wanted: list[str], keep: bool) -> dict[str, Tensor]:
        """The gradients by the parameters `wanted`; with `keep` the graph lives on."""
        inputs = [self.parameters[name] for name in wanted]
        with no_grads_left(self.parameters):
            grads = torch.autograd.grad(
                self.outputs, inputs, list(cotangents), retain_graph=keep, materialize_grads=True
            )
        return dict(zip(wanted, grads, strict=True))

    def as_loss(self, value: Tensor, update: Any) -> Tensor:
        """A scalar of this value whose `backward()` gives the gradients of `update`: the way of training loops.

        Here `update` holds cotangents on the outputs; a forward of which an anchor is asked takes gradients too.
        """
        pull = torch.stack([torch.sum(c * y) for c, y in zip(update, self.outputs, strict=True)]).sum()
        return value + (pull - pull.detach())
