"""The one-pass forward: a single backward, of input gradients alone, serves the probe, the gaps and the update.

Each layer that owns trainable parameters gets an identity node behind it, where the backward hands over the gradient of
its output beside the input it saved. From these two come, pair by pair, the layer's weight gradients (`rules`). The
weighted sum of the second pullback then needs no second propagation, and the first-order gap no perturbed forward.

Two things are not taken on trust at a model's first step. That its layers see to every use of their parameters is read
off autograd's graph. That row r belongs to pair r mod N is what a `by_pairs` margin function declares; for any other,
and where the graph leaves a doubt, the gradients are compared with autograd's own.
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
from gapo.backends.torch.forward import TorchForward
from gapo.backends.torch.rules import PairGrads, Rule, rule_for
from gapo.config import GAPOConfig

logger = logging.getLogger(__name__)

# What the first step of a model found, by module and by what was run on it.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()

# The hook on each layer. That of a step which failed is there as long as something holds its traceback.
_hooks: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


class OnePassForward(TorchForward):
    """A clean forward that keeps what its backward passes through.

    It is a `TorchForward` all the same: where a layer has no rule, or the comparison fails, autograd does the work.
    """

    def __init__(self, margin_fn: MarginFn, module: nn.Module, batch: Any, config: GAPOConfig) -> None:
        self._parts: dict[str, list[PairGrads]] = defaultdict(list)
        self._collected = False
        # Types of layers, and the shape of what they received; None where that is not one positional input.
        self._seen: set[tuple[str, tuple[int, ...] | None]] = set()
        self._uses: Counter[str] = Counter()  # of each parameter, by layers with a rule
        self._declared = bool(getattr(margin_fn, "by_pairs", False))
        self._root = torch.zeros((), requires_grad=True)  # what the backward is asked for: it lies behind every layer
        self._handles: list[RemovableHandle] = []
        self._key = (
            getattr(margin_fn, "__code__", margin_fn),
            tuple(n for n, p in module.named_parameters() if p.requires_grad),
        )
        self.one_pass = _verdicts.get(module, {}).get(self._key, True)
        if self.one_pass:
            self._tap_layers(module)
        try:
            super().__init__(margin_fn, module, batch, config)
        except BaseException:
            self._untap()
            raise
        if self.one_pass and (odd := self._not_by_rows()):
            self._give_up(module, odd)

    def _tap_layers(self, module: nn.Module) -> None:
        owners = [m for m in module.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        rules = {id(m): rule for m in owners if (rule := rule_for(m)) is not None}
        without = sorted({type(m).__name__ for m in owners if id(m) not in rules})
        if without:
            self._give_up(module, f"no rule for layers of type {', '.join(without)}")
            return
        names = {id(p): name for name, p in module.named_parameters()}
        for layer in owners:
            own = {part: names[id(p)] for part, p in layer.named_parameters(recurse=False) if p.requires_grad}
            if layer in _hooks:
                _hooks.pop(layer).remove()
            # First of the layer's hooks: what others make of its output is not the rule's affair.
            _hooks[layer] = layer.register_forward_hook(
                self._tap(rules[id(layer)], own), prepend=True, with_kwargs=True
            )
            self._handles.append(_hooks[layer])
        # The hooks must outlive the forward: a checkpointed layer runs again in the backward. They go with this object.
        weakref.finalize(self, _remove, self._handles)

    def _tap(self, rule: Rule, own: dict[str, str]) -> Any:
        # Held weakly: the graph hangs on this object's outputs, and a cycle through it would never be collected.
        forward = weakref.ref(self)

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            alive = forward()
            if alive is None or not torch.is_grad_enabled():
                return None
            alive._uses.update(own.values())
            kind = type(layer).__name__
            if len(args) != 1 or kwargs:
                alive._seen.add((kind, None))
                return None
            shape = tuple(args[0].shape)
            alive._seen.add((kind, (*shape, 1) if isinstance(layer, nn.Embedding) else shape))

            def collect(a: Tensor, g: Tensor) -> None:
                alive = forward()
                if alive is not None and alive.one_pass and not alive._collected:  # it may run again, to compare
                    alive._collect(layer, rule, own, a, g)

            return _Tap.apply(output, alive._root, args[0], collect)

        return hook

    def _not_by_rows(self) -> str | None:
        """What is wrong where a layer did not get one row of tokens for each answer: (N or 2N, seq, ...)."""
        pairs = self.outputs[0].shape[0]
        for kind, shape in sorted(self._seen, key=str):
            if shape is None:
                return f"{kind} is called by keyword, or with more than one input"
            if len(shape) < 3 or shape[0] not in (pairs, 2 * pairs):
                return f"{kind} receives {shape}: not one row for each answer of {pairs} pairs"
        return None

    def _collect(self, layer: nn.Module, rule: Rule, own: dict[str, str], a: Tensor, g: Tensor) -> None:
        """Keep what the rule makes of one layer's A and G; rows are (blocks, N): chosen ones, then rejected."""
        pairs = self.outputs[0].shape[0]
        a = a.detach()[..., None] if isinstance(layer, nn.Embedding) else a.detach()
        a, g = (x.reshape(-1, pairs, x[0, ..., 0].numel(), x.shape[-1]) for x in (a, g))
        with torch.no_grad():
            for part, grads in rule(layer, a, g):
                self._parts[own[part]].append(grads)

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
        """The one backward, seeded with dM_i; where there is a doubt also autograd's own, to compare."""
        known = self._key in _verdicts.get(self._module, {})
        if not known and self._declared and _uses(self.outputs, self.parameters) == self._uses:
            known = _verdicts.setdefault(self._module, {})[self._key] = True
        seeds = [torch.ones_like(output) * sign for output, sign in zip(self.outputs, (1, -1), strict=False)]
        try:
            torch.autograd.grad(self.outputs, self._root, seeds, retain_graph=not known, allow_unused=True)
            self._collected = True
            if not known:
                self._compare()
        finally:
            if self.one_pass:
                self._untap()

    def _compare(self) -> None:
        # One weight for each pair: under equal ones, such as the probe's can be, a wrong order of the rows is unseen.
        weights = 0.5 + torch.rand(self.outputs[0].shape, generator=torch.Generator().manual_seed(0))
        cotangents = on_outputs(weights.to(self.outputs[0].device), self.outputs, xp)
        expected = super().pullback(cotangents, list(self.parameters))
        found = self.pullback(cotangents, list(self.parameters))
        scale = torch.stack([x.float().norm() for x in expected.values()]).norm()
        error = torch.stack([(found[name] - x).float().norm() for name, x in expected.items()]).norm()
        coarse = any(x.dtype in (torch.float16, torch.bfloat16) for x in (*expected.values(), *self.outputs))
        coarse = coarse or torch.is_autocast_enabled(self.outputs[0].device.type)
        if bool(torch.isfinite(scale)) and float(error) > (0.05 if coarse else 1e-3) * float(scale):
            self._give_up(self._module, f"its gradients differ from autograd's by {float(error / scale):.1%}")
        elif bool(torch.isfinite(scale)) and float(scale) > 0:
            _verdicts.setdefault(self._module, {})[self._key] = True

    def _give_up(self, module: nn.Module, reason: str) -> None:
        self.one_pass = False
        self._parts.clear()
        _verdicts.setdefault(module, {})[self._key] = False
        logger.warning(
            "the one-pass step does not apply to this model (%s): the slower step is used, which propagates twice, and "
            'for anchor="first_order" once for each pair',
            reason,
        )

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
    def forward(ctx: Any, output: Tensor, root: Tensor, a: Tensor, collect: Any) -> Tensor:
        ctx.save_for_backward(a)  # as saved, so that a checkpointed layer's comes from its second run
        ctx.collect = collect
        return output.detach()  # the same memory, but no view: models may write to it

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.collect(*ctx.saved_tensors, g)
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


def _uses(outputs: Sequence[Tensor], parameters: dict[str, Tensor]) -> Counter[str]:
    """How often each parameter enters the graph behind `outputs`."""
    names = {id(p): name for name, p in parameters.items()}
    found: Counter[str] = Counter()
    stack = [output.grad_fn for output in outputs]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for parent, _ in node.next_functions if node is not None else ():
            name = names.get(id(getattr(parent, "variable", None)))
            if name is not None:
                found[name] += 1
            elif parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return found


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
