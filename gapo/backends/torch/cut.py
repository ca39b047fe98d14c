"""The cut below the first perturbed layer: the anchor forward starts there, from the clean forward's hidden states.

    clean forward     embed ─ layer 0 ─ layer 1 ─┬─ layer 2 ─ layer 3 ─ head
                                          saved  │
    anchor forward    (embed and layers return   └─ layer 2'─ layer 3'─ head     only layers 2 and 3 are perturbed
                       what they returned)

Layers below the cut compute the same with the anchor's weights as with the policy's. The anchor forward passes them
over: each returns its output of the clean forward, call by call. That is right only if nothing but these outputs leads
from inside the layers to the model's outputs, such as a cache or an attribute that a later layer reads. The cut checks

- at every step, in autograd's graph: every way from the outputs to the layers' parameters passes a saved output, and
  the layers leave nothing in their arguments or attributes;
- once for a model and margin function: the anchor forward from the cut equals the whole one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.torch.pairgrads import Verdicts
from gapo.backends.torch.pairgrads.graph import walk
from gapo.backends.torch.random_state import RandomState

logger = logging.getLogger(__name__)

_OF_MODULES = frozenset(vars(nn.Module()))  # hooks, parameters, the mode: what PyTorch keeps


class Cut:
    """The layers below the cut, and what each of them returned in the clean forward, call by call."""

    def __init__(self, module: nn.Module, name: str, below: Sequence[nn.Module], verdicts: Verdicts) -> None:
        self._module, self._name, self._below, self._verdicts = module, name, below, verdicts
        self._key: Hashable = None
        self._returned: list[list[Any]] = [[] for _ in below]  # layer by layer, call by call, without its graph
        # Random streams as the last of the layers left them: layers above draw their dropout masks from there.
        self._states: list[RandomState] = []
        self._tensors: list[tuple[Tensor, int]] = []  # what was returned, with its graph and version
        self._arguments: list[Any] = []  # a stack: what the layers that are running could leave something in
        self._wrote = False  # whether one of them did
        self._whole = False

    @contextmanager
    def kept(self, basis: Hashable) -> Iterator[None]:
        """Save, during the clean forward, what each layer below the cut returns. Verdicts rest on `basis`."""
        self._key = (self._name, basis)
        self._whole = self._verdicts.get("cut", self._module, self._key) is False
        if self._whole:
            yield
            return
        handles = [
            # Before the hooks of others, which run again on the saved output.
            layer.register_forward_hook(
                self._keeper(returned, layer is self._below[-1]), prepend=True, with_kwargs=True
            )
            for layer, returned in zip(self._below, self._returned, strict=True)
        ]
        handles += [layer.register_forward_pre_hook(self._see_arguments, with_kwargs=True) for layer in self._below]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(self, returned: list[Any], last: bool) -> Callable[..., None]:
        def keep(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._arguments.pop() != _left(layer, args, kwargs):
                self._wrote = True
            self._tensors.extend((x, x._version) for x in _tensors(output))
            returned.append(_detached(output))
            if last:
                self._states.append(RandomState(self._module))

        return keep

    def _see_arguments(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self._arguments.append(_left(layer, args, kwargs))

    def see(self, outputs: Sequence[Tensor]) -> None:
        """Check that the graph of `outputs` does not go around the saved outputs, and that no one wrote to them."""
        nodes = {x.grad_fn for x, _ in self._tensors if x.grad_fn is not None}
        if not self._whole and _reaches(outputs, self._below, nodes):
            self._refuse("autograd's graph has another way to a parameter below it")
        if not self._whole and any(x._version != version for x, version in self._tensors):
            self._refuse("the forward writes to what a layer below it returned")
        if not self._whole and self._wrote:
            self._refuse("a layer below it leaves something in its arguments or attributes")
        self._tensors.clear()

    def _refuse(self, why: str) -> None:
        self._whole = True
        for returned in self._returned:
            returned.clear()
        if self._verdicts.first("told of the cut", self._module, (self._name, why)):
            logger.warning("something besides %s passes the cut (%s): the anchor forward runs whole", self._name, why)

    def outputs(
        self, forward: Callable[[], tuple[Tensor, ...]], again: Callable[[], AbstractContextManager[None]]
    ) -> tuple[Tensor, ...]:
        """The outputs of `forward()`, started from the cut where that is proved to be the same; without gradient.

        `again()` makes a forward start from the clean one's random numbers and buffers.
        """
        if self._whole or not self._states:
            return forward()
        proved = self._verdicts.get("cut", self._module, self._key)
        short: tuple[Tensor, ...] = ()
        try:
            with self._passed_over():
                short = forward()
        except StopIteration:  # more calls than in the clean forward, which left layers out at random
            with again():
                return forward()
        except Exception:  # such as of code that looks for what a layer leaves in its arguments
            if proved:
                raise
        if proved:
            return short
        with again():
            whole = forward()
        same = bool(short) and all(
            torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
            for a, b in zip(short, whole, strict=True)
        )
        self._verdicts.keep("cut", self._module, self._key, same)
        if not same:
            self._refuse("its outputs differ from those of the whole forward")
        return whole

    @contextmanager
    def _passed_over(self) -> Iterator[None]:
        """Let every layer below the cut return its saved outputs, in the order of its calls."""
        own = [layer.__dict__.get("forward") for layer in self._below]
        try:
            for layer, returned in zip(self._below, self._returned, strict=True):
                layer.forward = self._passed(returned, layer is self._below[-1])
            yield
        finally:
            for layer, forward in zip(self._below, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward

    def _passed(self, returned: list[Any], last: bool) -> Callable[..., Any]:
        calls, states = iter(returned), iter(self._states)

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = next(calls)
            if last:
                next(states).restore()
            return output

        return forward


def cut_below(module: nn.Module, names: Iterable[str], verdicts: Verdicts) -> Cut | None:
    """The cut of `module` where only the parameters `names` move; None where they reach down to the first layer.

    All of them must lie in the numbered layers of one `nn.ModuleList`, as language models have them. `verdicts` hold
    what earlier steps found out.
    """
    names = list(names)
    for path, layers in module.named_modules():
        if not isinstance(layers, nn.ModuleList) or not all(name.startswith(f"{path}.") for name in names):
            continue
        first = min(int(name[len(path) + 1 :].partition(".")[0]) for name in names)
        if first:
            return Cut(module, f"{path}.{first - 1}", list(layers)[:first], verdicts)
    return None


def _reaches(outputs: Sequence[Tensor], below: Sequence[nn.Module], stops: set[Any]) -> bool:
    """Whether autograd's graph leads from `outputs` to a parameter of `below` other than through `stops`."""
    parameters = {id(p) for layer in below for p in layer.parameters()}
    return any(
        id(getattr(parent, "variable", None)) in parameters
        for node in walk(outputs, stops.__contains__)
        if node not in stops
        for parent, _ in node.next_functions
    )


def _left(layer: nn.Module, *arguments: Any) -> Any:
    """What others could take from the arguments of `layer` and from its and its submodules' own attributes."""
    own = [{name: x for name, x in vars(m).items() if name not in _OF_MODULES} for m in layer.modules()]
    return _contents(arguments), _contents(own, depth=3)


def _contents(thing: Any, depth: int = 4) -> Any:
    """What `thing` holds, by identity: lists, dicts, caches as far as `depth`, tensors with their version."""
    if isinstance(thing, Tensor):
        return id(thing), thing._version
    if depth and isinstance(thing, dict):
        return tuple((key, _contents(x, depth - 1)) for key, x in thing.items())
    if depth and isinstance(thing, (tuple, list)):
        return tuple(_contents(x, depth - 1) for x in thing)
    own = None if isinstance(thing, (type, nn.Module)) or callable(thing) else getattr(thing, "__dict__", None)
    return (id(thing), _contents(own, depth - 1)) if depth and own else id(thing)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if type(output) in (tuple, list):
        return type(output)(_detached(part) for part in output)
    return output
