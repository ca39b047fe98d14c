"""The one-pass forward: a single backward, of input gradients alone, serves the probe, the gaps and the update.

Each layer that owns trainable parameters gets an identity node behind it, where the backward hands over the gradient of
its output beside the input it saved. From these two come, pair by pair, the layer's weight gradients (`rules`). The
weighted sum of the second pullback then needs no second propagation, and the first-order gap no perturbed forward.

Nothing is taken on trust. A model takes the two-pass step where one of these does not hold:

at every step
- a rule says what each layer does: by its class, its own parameters and its `forward`; a norm is asked (`rules`);
- nothing changes gradients or mixes pairs unseen: gradient hooks on parameters, batch norm in training (`rules.unfit`);
- every use of a parameter passes its layer: autograd's graph (`rows.uses`);
- row r of what the model gives belongs to pair r mod N: the margins' derivatives by those rows (`rows.odd_rows`);
- each layer receives a row for each answer: its shape;

once
- so does row r of what each layer receives: all gradients are compared with autograd's (`agreement`).

The comparison is made anew for each margin function, kind of layout and mode of the model (`verdicts`), parameter by
parameter, under another weight for each pair. What is proved on one pair is not taken to hold for more.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gapo.backends.base import LeafRule, MarginFn, on_outputs
from gapo.backends.torch.forward import HALVES, TorchForward, no_grads_left
from gapo.backends.torch.pairgrads.agreement import compared
from gapo.backends.torch.pairgrads.parts import PairGrads
from gapo.backends.torch.pairgrads.rows import odd_rows, uses
from gapo.backends.torch.pairgrads.rules import Rule, rule_for, trained, unfit
from gapo.backends.torch.pairgrads.verdicts import Verdicts
from gapo.config import GAPOConfig

logger = logging.getLogger(__name__)

_proved = Verdicts()  # that the gradients are autograd's
_refused = Verdicts()  # that they are not, or that the rows are not those of pairs
_told = Verdicts()

# The hook on each layer. That of a step which failed is there as long as something holds its traceback.
_hooks: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


class OnePassForward(TorchForward):
    """A clean forward that keeps what its backward passes through.

    It is a `TorchForward` all the same: where the one pass does not apply, autograd does the work.
    """

    def __init__(self, margin_fn: MarginFn, module: nn.Module, batch: Any, config: GAPOConfig) -> None:
        self._parts: dict[str, list[PairGrads]] = defaultdict(list)
        self._collecting = self._collected = False
        # Types of layers, and the shape of what they received; None where that is not one positional input.
        self._seen: set[tuple[str, tuple[int, ...] | None]] = set()
        self._uses: Counter[str] = Counter()  # of each parameter, by layers with a rule
        self._odd: str | None = None  # what a layer was found to do
        self._half = False  # whether a layer computed in 16 bits, as under autocast within the model's forward
        self._root = torch.zeros((), requires_grad=True)  # what the backward is asked for: it lies behind every layer
        self._handles: list[RemovableHandle] = []
        self.one_pass = True
        try:
            super().__init__(margin_fn, module, batch, config)
        except BaseException:
            self._untap()
            raise
        if self.one_pass and (odd := self._odd or self._not_by_rows()):
            self._refuse(odd)

    def _prepare(self) -> None:
        if _refused.get(self._module, self._basis):
            self.one_pass = False
        elif why := unfit(self._module):  # asked at every step, since it may be mended
            self._give_up(why)
        else:
            self._tap_layers()

    def _tap_layers(self) -> None:
        names = {id(p): name for name, p in self.parameters.items()}
        for layer in self._module.modules():
            own = {part: names[id(p)] for part, p in trained(layer).items()}
            rule = rule_for(layer) if own else None
            if rule is None:
                continue
            if layer in _hooks:
                _hooks.pop(layer).remove()
            # First of the layer's hooks: what others make of its output is not the rule's affair.
            _hooks[layer] = layer.register_forward_hook(self._tap(rule, own), prepend=True, with_kwargs=True)
            self._handles.append(_hooks[layer])
        # The hooks must outlive the forward: a checkpointed layer runs again in the backward. They go with this object.
        weakref.finalize(self, _remove, self._handles)

    def _tap(self, rule: Rule, own: dict[str, str]) -> Any:
        # Held weakly: the graph hangs on this object's outputs, and a cycle through it would never be collected.
        forward = weakref.ref(self)

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            alive = forward()
            if alive is None or not alive.one_pass or not torch.is_grad_enabled():
                return None
            alive._uses.update(own.values())
            alive._half = alive._half or output.dtype in HALVES
            kind = type(layer).__name__
            if len(args) != 1 or kwargs:
                alive._seen.add((kind, None))
                return None
            shape = tuple(args[0].shape)
            alive._seen.add((kind, (*shape, 1) if isinstance(layer, nn.Embedding) else shape))
            if rule.confirms is not None and not rule.confirms(layer, args[0], output):
                alive._odd = f"{kind} is not linear in its weight, token by token"

            def collect(a: Tensor | None, g: Tensor) -> None:
                alive = forward()
                if alive is not None and alive._collecting:  # other backwards pass here too, to compare
                    alive._collect(layer, rule, own, a, g)

            # A bias needs no input, and autograd keeps none for it: the model may write to it.
            return _Tap.apply(output, alive._root, args[0] if set(own) != {"bias"} else None, collect)

        return hook

    def _not_by_rows(self) -> str | None:
        """What is wrong where a layer did not get one row of tokens for each answer: (N or 2N, seq, ...)."""
        pairs = self._pairs
        for kind, shape in sorted(self._seen, key=str):
            if shape is None:
                return f"{kind} is called by keyword, or with more than one input"
            if len(shape) < 3 or shape[0] not in (pairs, 2 * pairs):
                return f"{kind} receives {shape}: not one row for each answer of {pairs} pairs"
        return None

    @property
    def _pairs(self) -> int:
        return int(self.outputs[0].shape[0])

    def _collect(self, layer: nn.Module, rule: Rule, own: dict[str, str], a: Tensor | None, g: Tensor) -> None:
        """Keep what the rule makes of one layer's A and G; rows are (blocks, N): chosen ones, then rejected."""
        if a is not None:
            ids = not a.is_floating_point()
            a = self._by_pairs(a.detach()[..., None] if ids else a.detach())
            a = a[..., 0] if ids else a
        with torch.no_grad():
            for part, grads in rule.grads(layer, a, self._by_pairs(g)):
                self._parts[own[part]].append(grads)

    def _by_pairs(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self._pairs, x[0, ..., 0].numel(), x.shape[-1])

    def pullback(self, cotangents: Sequence[Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        if self.one_pass and not self._collected:
            self._propagate()
        if not self.one_pass:
            return super().pullback(cotangents, names)
        weights = cotangents[0].to(torch.float32 if cotangents[0].dtype != torch.float64 else torch.float64)
        grads = {}
        for name in self.parameters if names is None else names:
            grads[name] = self._weighted(name, weights)
            if names is None:  # spent: what is no longer needed goes as soon as it can
                self._parts.pop(name, None)
        return grads

    def as_loss(self, value: Tensor, cotangents: Sequence[Tensor]) -> Tensor:
        if not self.one_pass:
            return super().as_loss(value, cotangents)
        grads = self.pullback(cotangents)
        return _Deposit.apply(value, list(grads.values()), *self.parameters.values())

    def _propagate(self) -> None:
        """The one backward, seeded with dM_i; before it, where nothing is proved yet, autograd's own, to compare."""
        layouts = frozenset((kind, len(shape), shape[0] // self._pairs) for kind, shape in self._seen if shape)
        key = (self._basis, layouts, min(self._pairs, 2))
        proved = _proved.get(self._module, key)
        odd = odd_rows(self.outputs, self._coarse())
        if proved and odd:
            self._refuse(odd)
            return
        if missed := uses(self.outputs, self.parameters) - self._uses:
            odd = odd or f"{next(iter(missed))} is used outside of its layer too"
        try:
            if proved:
                self._collect_all()
            else:
                self._prove(key)
            if self.one_pass and odd:
                self._refuse(odd)
        finally:
            self._untap()

    def _prove(self, key: Any) -> None:
        """Propagate, and compare with autograd's own gradients."""
        weights = self._unequal()
        expected = self._gradients(weights, list(self.parameters), keep=True)
        if self._spent:  # the graph could not be kept
            self._run_again()
        self._collect_all()
        same, why = self._compare(weights, expected)
        if same is False:  # or the graph does not last for a second backward, and one pass needs only one
            self._run_again()
            self._collect_all()
            same, why = self._compare(weights, expected)
        if same:
            _proved.keep(self._module, key, True)
        elif same is False:
            self._refuse(why)
        else:  # gradients of 0, say: autograd's are taken, and the next step is asked again
            self._leave()

    def _collect_all(self) -> None:
        seeds = [torch.ones_like(output) * sign for output, sign in zip(self.outputs, (1, -1), strict=False)]
        self._parts.clear()
        try:
            self._collecting = True
            with no_grads_left(self.parameters):
                torch.autograd.grad(self.outputs, self._root, seeds, allow_unused=True)
            self._collected = self._spent = True
        finally:
            self._collecting = False

    def _coarse(self) -> bool:
        return self._half or super()._coarse()

    def _unequal(self) -> tuple[Tensor, ...]:
        """A weight for each pair: under equal ones, such as the probe's can be, a wrong order of the rows is unseen."""
        weights = 0.5 + torch.rand(self.outputs[0].shape, generator=torch.Generator().manual_seed(0))
        return on_outputs(weights.to(self.outputs[0].device), self.outputs, xp)

    def _compare(self, weights: Sequence[Tensor], expected: dict[str, Tensor]) -> tuple[bool | None, str]:
        return compared(
            lambda name: self.pullback(weights, [name])[name], expected, than="autograd's", coarse=self._coarse()
        )

    def _refuse(self, why: str) -> None:
        """Give up for good: for this margin function on this module as it is."""
        _refused.keep(self._module, self._basis, why)
        self._give_up(why)

    def _give_up(self, why: str) -> None:
        self._leave()
        if not _told.get(self._module, why):
            _told.keep(self._module, why, True)
            logger.warning(
                "the one-pass step does not apply to this model (%s): the slower step is used, which propagates twice, "
                'and for anchor="first_order" once for each pair',
                why,
            )

    def _leave(self) -> None:
        self.one_pass = False
        self._parts.clear()
        self._untap()

    def _weighted(self, name: str, weights: Tensor) -> Tensor:
        theta = self.parameters[name]
        total: Tensor | None = None
        for part in self._parts.get(name, ()):
            gradient = part.weighted(weights).to(theta.dtype)
            total = gradient if total is None else total + gradient
        return torch.zeros_like(theta) if total is None else total

    def directional(self, delta: LeafRule, names: Iterable[str]) -> Tensor:
        if not self.one_pass:
            return super().directional(delta, names)
        along = torch.zeros_like(self.outputs[0], dtype=torch.float32, requires_grad=False)
        along = along.double() if self.outputs[0].dtype == torch.float64 else along
        for name in names:
            moved = delta(name, self.parameters[name].detach())
            for part in self._parts.get(name, ()):
                along = along + part.along(moved)
        return along.detach()

    def _untap(self) -> None:
        _remove(self._handles)


class _Tap(torch.autograd.Function):
    """The identity, whose backward hands the gradient of its output over, beside the input that was saved."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, root: Tensor, a: Tensor | None, collect: Any) -> Tensor:
        if a is not None:
            ctx.save_for_backward(a)  # as saved, so that a checkpointed layer's comes from its second run
        ctx.collect = collect
        return output.detach()  # the same memory, but no view: models may write to it

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.collect(*(ctx.saved_tensors or (None,)), g)
        return g, None, None, None


class _Deposit(torch.autograd.Function):
    """A scalar whose backward gives each parameter the gradient that was computed for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        return None, None, *(g.mul_(scale) for g in grads)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
