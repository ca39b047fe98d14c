"""The experts of a mixture, as transformers 5 writes them: one 3-D parameter for the matrices of all experts.

    y[t] = sum_k scores[t, k] * down[e] @ gate(up[e] @ x[t]),    e = index[t, k]

The call itself says which expert each token goes to. A slot (t, k) belongs to the pair of token t, so the pair travels
along when slots are sorted by expert. What lies between the two products is out of reach of a hook: the rule computes
it again and propagates the output's gradient to it, which costs about one forward of this layer.

Few slots of one pair meet in one expert, so the gradients per pair would be larger than what implies them. They are
never formed: `Routed` keeps A and G of all slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gapo.backends.torch.pairgrads.parts import Parts
from gapo.backends.torch.pairgrads.rules.library import agrees, from_transformers
from gapo.backends.torch.pairgrads.rules.registry import Rule, owns, register_family

# What transformers' decorator `use_experts_implementation` says of a class, and what every class has.
_SAID = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "num_experts")


@dataclass
class _Slots:
    """Numbers of each slot: `values` in order, or the rows of it that `rows` names, times `scale`."""

    values: Tensor
    rows: Tensor | None = None
    scale: Tensor | None = None

    def of(self, span: slice) -> Tensor:
        x = self.values[span] if self.rows is None else self.values[self.rows[span]]
        return x if self.scale is None else x * self.scale[span, None].to(x.dtype)


@dataclass
class _Routing:
    """Which slots go to which expert, sorted by expert: `order` (slots,) and the span of each expert that has some."""

    order: Tensor
    tokens: Tensor
    spans: list[tuple[int, slice]]

    @classmethod
    def of(cls, index: Tensor, experts: int) -> _Routing:
        slots = index.flatten()
        ends = [0, *accumulate(torch.bincount(slots, minlength=experts)[:experts].tolist())]
        order = slots.argsort(stable=True)[: ends[-1]]  # an index past the last expert stands for no expert
        spans = [(e, slice(*ends)) for e, ends in enumerate(pairwise(ends)) if ends[0] < ends[1]]
        return cls(order, order // index.shape[-1], spans)


@dataclass
class Routed:
    """A and G of each expert's slots, for theta (experts, out, in), or (experts, in, out) if transposed.

    `pairs` (slots,) says whose slot each is, of `n` pairs. Without A, theta is a bias (experts, out).
    """

    a: _Slots | None
    g: _Slots
    pairs: Tensor
    n: int
    spans: list[tuple[int, slice]]
    shape: torch.Size
    transposed: bool

    def weighted(self, weights: Tensor) -> Tensor:
        total = self.g.values.new_zeros(self.shape)
        for expert, span in self.spans:
            g = self.g.of(span) * weights[self.pairs[span], None].to(total.dtype)
            if self.a is None:
                total[expert] = g.sum(0)
            else:
                a = self.a.of(span).to(g.dtype)
                total[expert] = a.T @ g if self.transposed else g.T @ a
        return total

    def along(self, delta: Tensor) -> Tensor:
        total = delta.new_zeros(self.n)
        for expert, span in self.spans:
            g, moved = self.g.of(span), delta[expert]
            if self.a is not None:
                moved = self.a.of(span).to(g.dtype) @ (moved if self.transposed else moved.T).to(g.dtype)
            total.index_add_(0, self.pairs[span], (moved.to(delta.dtype) * g.to(delta.dtype)).sum(-1))
        return total


def experts(module: Any, inputs: tuple[Tensor, Tensor, Tensor], g: Tensor) -> Parts:
    """`inputs`: x (tokens, in), index and scores (tokens, k); `g`: (blocks, N, tokens of an answer, in)."""
    x, index, scores = inputs
    n, flat = g.shape[1], g.flatten(0, 2)
    owner = torch.arange(n, device=g.device)[:, None].expand(g.shape[:-1]).flatten()
    routing = _Routing.of(index, module.num_experts)
    gave = _Slots(flat, routing.tokens, scores.flatten()[routing.order])
    enters = _Slots(x, routing.tokens)
    with torch.enable_grad():
        inner = _product(module, _first(module), enters, routing).to(g.dtype).requires_grad_()
        hidden = _activated(module, inner)
    back = torch.cat([gave.of(s) @ _matrix(module, "down_proj", e).to(g.dtype) for e, s in routing.spans])
    (inner_g,) = torch.autograd.grad(hidden, inner, back.to(hidden.dtype))
    matrices = {
        _first(module): (enters, _Slots(inner_g)),
        "down_proj": (_Slots(hidden.detach()), gave),
    }
    for name, (a, slots_g) in matrices.items():
        for part, received in ((name, a), (f"{name}_bias", None)):
            theta = module._parameters.get(part)
            if theta is not None and theta.requires_grad:
                pairs = owner[routing.tokens]
                yield part, Routed(received, slots_g, pairs, n, routing.spans, theta.shape, module.is_transposed)


@torch.no_grad()
def are_as_understood(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> bool:
    """Whether the formula at the top of this file gives what the layer gave."""
    if len(inputs) != 3 or any(x.ndim != 2 for x in inputs) or inputs[1].shape != inputs[2].shape:
        return False
    x, index, scores = inputs
    if index.is_floating_point() or not scores.is_floating_point():
        return False
    routing = _Routing.of(index, module.num_experts)
    hidden = _activated(module, _product(module, _first(module), _Slots(x, routing.tokens), routing))
    y = _product(module, "down_proj", _Slots(hidden), routing) * scores.flatten()[routing.order, None]
    again = torch.zeros_like(output, dtype=y.dtype).index_add_(0, routing.tokens, y)
    return agrees(again, output, output.norm())


def _reads(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    # By any name: `are_as_understood` sees it where their order is another.
    return tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _belongs(layer: Any) -> bool:
    """Whether `layer` follows transformers' convention for experts, whose decorator says on the layer how."""
    if not type(layer).__name__.endswith("Experts") or not all(hasattr(layer, name) for name in _SAID):
        return False
    names = {"gate_up_proj" if layer.has_gate else "up_proj", "down_proj"}
    names |= {f"{name}_bias" for name in names} if layer.has_bias else set()
    elsewhere = layer._is_expert_parallel or layer.has_post_expert_norm
    return owns(layer) == names and not elsewhere and from_transformers(layer)


register_family(_belongs, Rule(experts, reads=_reads, confirms=are_as_understood))


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _matrix(module: Any, name: str, expert: int) -> Tensor:
    """(out, in) of one expert."""
    weight: Tensor = getattr(module, name)[expert].detach()
    return weight.T if module.is_transposed else weight


def _product(module: Any, name: str, a: _Slots, routing: _Routing) -> Tensor:
    """(slots, out): each slot through the matrix and bias of its expert."""
    return torch.cat(list(_products(module, name, a, routing)))


def _products(module: Any, name: str, a: _Slots, routing: _Routing) -> Iterator[Tensor]:
    for expert, span in routing.spans:
        weight = _matrix(module, name, expert)
        bias = getattr(module, f"{name}_bias")[expert].detach() if module.has_bias else None
        yield torch.nn.functional.linear(a.of(span).to(weight.dtype), weight, bias)


def _activated(module: Any, inner: Tensor) -> Tensor:
    output: Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return output
