"""The experts of a mixture, as transformers 5 writes them: one 3-D parameter holds the matrices of all experts.

    y[t] = sum_k scores[t, k] * down[e] @ gate(up[e] @ x[t]),    e = index[t, k]

The call itself names the expert of each slot (t, k). A slot belongs to the group of token t, so the group travels along
when slots are sorted by expert. A hook sees nothing between the two products. The rule therefore computes that again
and propagates the output's gradient to it, which costs about one forward of this layer.

Few slots of one group meet in one expert, so gradients by group would be larger than A and G. `Routed` keeps A and G.
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

# What transformers' decorator `use_experts_implementation` writes on a layer, and what every layer has.
_CONVENTION = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "num_experts")


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
    """Slots sorted by expert: their places in (t, k), their tokens, and the span of each expert that has any."""

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

    `owners` (slots,) numbers the group of each slot, out of `groups`. Without A, theta is a bias (experts, out).
    """

    a: _Slots | None
    g: _Slots
    owners: Tensor
    groups: int
    spans: list[tuple[int, slice]]
    shape: torch.Size
    transposed: bool

    def weighted(self, weights: Tensor) -> Tensor:
        total = self.g.values.new_zeros(self.shape)
        for expert, span in self.spans:
            g = self.g.of(span) * weights[self.owners[span], None].to(total.dtype)
            if self.a is None:
                total[expert] = g.sum(0)
            else:
                a = self.a.of(span).to(g.dtype)
                total[expert] = a.T @ g if self.transposed else g.T @ a
        return total

    def along(self, delta: Tensor) -> Tensor:
        total = delta.new_zeros(self.groups)
        for expert, span in self.spans:
            g, moved = self.g.of(span), delta[expert]
            if self.a is not None:
                moved = self.a.of(span).to(g.dtype) @ (moved if self.transposed else moved.T).to(g.dtype)
            total.index_add_(0, self.owners[span], (moved.to(delta.dtype) * g.to(delta.dtype)).sum(-1))
        return total


def experts(layer: Any, inputs: tuple[Tensor, Tensor, Tensor], g: Tensor) -> Parts:
    """`inputs`: x (tokens, in), index and scores (tokens, k); `g`: (blocks, N, tokens of a row, in)."""
    x, index, scores = inputs
    routing = _Routing.of(index, layer.num_experts)
    if not routing.spans:
        return
    groups = g.shape[1]
    owners = torch.arange(groups, device=g.device)[:, None].expand(g.shape[:-1]).flatten()[routing.tokens]
    entered = _Slots(x, routing.tokens)
    returned = _Slots(g.flatten(0, 2), routing.tokens, scores.flatten()[routing.order])
    with torch.enable_grad():
        inner = _product(layer, _first(layer), entered, routing).to(g.dtype).requires_grad_()
        hidden = _activated(layer, inner)
    hidden_g = torch.cat([returned.of(s) @ _matrix(layer, "down_proj", e).to(g.dtype) for e, s in routing.spans])
    (inner_g,) = torch.autograd.grad(hidden, inner, hidden_g.to(hidden.dtype))
    products = {_first(layer): (entered, _Slots(inner_g)), "down_proj": (_Slots(hidden.detach()), returned)}
    for name, (a, output_g) in products.items():
        for part, factor in ((name, a), (f"{name}_bias", None)):
            theta = layer._parameters.get(part)
            if theta is not None and theta.requires_grad:
                shape, transposed = theta.shape, layer.is_transposed
                yield part, Routed(factor, output_g, owners, groups, routing.spans, shape, transposed)


@torch.no_grad()
def are_as_understood(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> bool:
    """Whether the formula at the top of this file gives what the layer gave."""
    if len(inputs) != 3 or any(x.ndim != 2 for x in inputs) or inputs[1].shape != inputs[2].shape:
        return False
    x, index, scores = inputs
    if index.is_floating_point() or not scores.is_floating_point():
        return False
    routing = _Routing.of(index, layer.num_experts)
    if not routing.spans:
        return False
    hidden = _activated(layer, _product(layer, _first(layer), _Slots(x, routing.tokens), routing))
    y = _product(layer, "down_proj", _Slots(hidden), routing) * scores.flatten()[routing.order, None]
    again = torch.zeros_like(output, dtype=y.dtype).index_add_(0, routing.tokens, y)
    return agrees(again, output, output.norm())


def _reads(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    # By any name: `are_as_understood` sees it where their order is another.
    return tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _belongs(layer: Any) -> bool:
    """Whether `layer` follows transformers' convention for experts."""
    if not type(layer).__name__.endswith("Experts") or not all(hasattr(layer, name) for name in _CONVENTION):
        return False
    names = {"gate_up_proj" if layer.has_gate else "up_proj", "down_proj"}
    names |= {f"{name}_bias" for name in names} if layer.has_bias else set()
    further = layer._is_expert_parallel or layer.has_post_expert_norm  # parts of the layer that the formula leaves out
    return owns(layer) == names and not further and from_transformers(layer)


register_family(_belongs, Rule(experts, reads=_reads, confirms=are_as_understood))


def _first(layer: Any) -> str:
    return "gate_up_proj" if layer.has_gate else "up_proj"


def _matrix(layer: Any, name: str, expert: int) -> Tensor:
    """(out, in) of one expert."""
    weight: Tensor = getattr(layer, name)[expert].detach()
    return weight.T if layer.is_transposed else weight


def _product(layer: Any, name: str, a: _Slots, routing: _Routing) -> Tensor:
    """(slots, out): each slot through the matrix and bias of its expert."""
    return torch.cat(list(_products(layer, name, a, routing)))


def _products(layer: Any, name: str, a: _Slots, routing: _Routing) -> Iterator[Tensor]:
    for expert, span in routing.spans:
        weight = _matrix(layer, name, expert)
        bias = getattr(layer, f"{name}_bias")[expert].detach() if layer.has_bias else None
        yield torch.nn.functional.linear(a.of(span).to(weight.dtype), weight, bias)


def _activated(layer: Any, inner: Tensor) -> Tensor:
    output: Tensor = layer._apply_gate(inner) if layer.has_gate else layer.act_fn(inner)
    return output
