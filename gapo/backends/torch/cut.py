"""The cut below the first perturbed layer: the anchor forward starts there, from the clean forward's hidden state.

What lies below computes the same with the anchor's weights as with the policy's. So its layers are passed over, and the
layer above the cut receives what it received in the clean forward. Where a model has other ways around the cut (a skip
from a layer below to one above), the first step finds out: there both forwards run, and must agree.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.torch.random_state import RandomState

logger = logging.getLogger(__name__)

# Whether a model's outputs from the cut were found to be those of its whole forward, by module and cut.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


class Cut:
    """The layers below the cut, and what the last of them gave in the clean forward, call by call."""

    def __init__(self, module: nn.Module, name: str, below: Sequence[nn.Module]) -> None:
        self._module, self._name, self._below = module, name, below
        self._kept: list[tuple[Any, RandomState]] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep, during the clean forward, the hidden state that leaves the last layer below the cut."""
        known = _verdicts.get(self._module, {}).get(self._name)
        if known is False:
            yield
            return
        last = self._below[-1]
        handle = last.register_forward_hook(
            lambda layer, args, output: self._kept.append((_detached(output), RandomState(self._module)))
        )
        try:
            yield
        finally:
            handle.remove()

    def outputs(self, forward: Callable[[], tuple[Tensor, ...]], start: RandomState) -> tuple[Tensor, ...]:
        """What `forward()` gives, started from the cut where that is the same; without gradient."""
        if not self._kept:
            return forward()
        try:
            with self._passed_over():
                short = forward()
        except StopIteration:  # more calls than in the clean forward: layers were left out at random
            with start.replayed():
                return forward()
        found = _verdicts.setdefault(self._module, {})
        if self._name not in found:
            with start.replayed():
                whole = forward()
            found[self._name] = all(
                torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
                for a, b in zip(short, whole, strict=True)
            )
            if not found[self._name]:
                logger.warning("something besides %s passes the cut: the anchor forward runs whole", self._name)
                self._kept.clear()
            return whole
        return short

    @contextmanager
    def _passed_over(self) -> Iterator[None]:
        """Let every layer below the cut return what was kept, its calls in their order."""
        own = [layer.__dict__.get("forward") for layer in self._below]
        try:
            for layer in self._below:
                layer.forward = self._return_kept(layer is self._below[-1])
            yield
        finally:
            for layer, forward in zip(self._below, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward

    def _return_kept(self, last: bool) -> Callable[..., Any]:
        calls = iter(self._kept)

        def forward(*args: Any, **kwargs: Any) -> Any:
            output, state = next(calls)
            if last:  # the layers above draw as they did
                state.restore()
            return output

        return forward


def cut_below(module: nn.Module, names: Iterable[str]) -> Cut | None:
    """The cut of `module` where only the parameters `names` move; None where they reach down to the first layer.

    All of them must lie in the numbered layers of one `nn.ModuleList`, as language models have them.
    """
    names = list(names)
    for path, layers in module.named_modules():
        if not isinstance(layers, nn.ModuleList) or not all(name.startswith(f"{path}.") for name in names):
            continue
        first = min(int(name[len(path) + 1 :].partition(".")[0]) for name in names)
        if first:
            return Cut(module, f"{path}.{first - 1}", list(layers)[:first])
    return None


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if type(output) in (tuple, list):
        return type(output)(_detached(part) for part in output)
    return output
