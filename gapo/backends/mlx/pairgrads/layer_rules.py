"""How each type of layer adds to the gradients of its own parameters, given what it received and returned.

A rule belongs to the function that runs the layer. A subclass with another `__call__` is another layer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from gapo.backends.mlx.pairgrads.contributions import Contribution, Experts, Lookup, Owners, matrix, vector


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        layer: the module.
        function: the class's function that ran, of (layer, ...).
        args: what it received, the layer aside.
        is_sorted: whether experts were called on entries in the order of the experts.
        y: what it returned.
        dropped: its input after its own dropout; None where it has none.
        rows: the row of each entry, where experts were called on sorted ones; None elsewhere.
        groups: how many groups there are.
    """

    layer: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]
    is_sorted: bool
    y: mx.array
    dropped: mx.array | None
    rows: mx.array | None
    groups: int = 0


Contributions = Iterator[tuple[str, Contribution]]


class Rule(NamedTuple):
    """How a layer's call adds to the gradients of `parameters`, its own entries of these names."""

    parameters: frozenset[str]
    contributions: Callable[[Call, mx.array], Contributions]


def rule_of(layer: nn.Module, function: Callable[..., Any]) -> Rule | None:
    """The rule of a layer that is called by `function` of its class; None where there is none."""
    if (rule := _RULES.get(function) or _of_mlx_lm().get(function)) is not None:
        return rule
    if _NORM.search(type(layer).__name__) and "weight" in layer and function is type(layer).__call__:
        return Rule(frozenset({"weight", "bias"}), _affine_norm)
    return None


_NORM = re.compile(r"(RMS|Layer)Norm$")


def sorts_entries(function: Callable[..., Any]) -> bool:
    """Whether `function(module, x, indices)` calls its experts on entries sorted by expert, as mlx-lm's mixtures do."""
    layers = sys.modules.get("mlx_lm.models.switch_layers")
    return layers is not None and function in (layers.SwitchGLU.__call__, layers.SwitchMLP.__call__)


def rows_when_sorted(indices: mx.array) -> mx.array:
    """The row of each entry after mlx-lm sorted them by expert: indices (rows, ..., choices)."""
    return mx.argsort(indices.flatten()) // (indices.size // indices.shape[0])


def _linear(call: Call, g: mx.array) -> Contributions:
    yield "weight", matrix(g, call.args[0], call.groups)
    yield "bias", vector(g, call.groups)


def _embedding(call: Call, g: mx.array) -> Contributions:
    yield "weight", Lookup(call.args[0], g, Owners(call.groups), call.layer.weight.shape)


def _rms_norm(call: Call, g: mx.array) -> Contributions:
    yield "weight", vector(g * mx.fast.rms_norm(call.args[0], None, call.layer.eps), call.groups)


def _layer_norm(call: Call, g: mx.array) -> Contributions:
    yield "weight", vector(g * mx.fast.layer_norm(call.args[0], None, None, call.layer.eps), call.groups)
    yield "bias", vector(g, call.groups)


def _affine_norm(call: Call, g: mx.array) -> Contributions:
    """Of a norm that is affine in its weight: what multiplies it is the norm at 1 less the norm at 0."""
    weight = call.layer.weight
    try:
        results = []
        for fill in (mx.ones_like, mx.zeros_like):
            call.layer["weight"] = fill(weight)
            results.append(call.function(call.layer, *call.args))
    finally:
        call.layer["weight"] = weight
    yield "weight", vector(g * (results[0] - results[1]), call.groups)
    yield "bias", vector(g, call.groups)


def _lora(call: Call, g: mx.array) -> Contributions:
    """y = linear(x) + scale x A B."""
    yield from _low_rank(call, call.layer.scale * g)


def _low_rank(call: Call, g: mx.array) -> Contributions:
    layer, x = call.layer, call.args[0] if call.dropped is None else call.dropped
    yield "lora_a", matrix(x, g @ layer.lora_b.T, call.groups)
    yield "lora_b", matrix(x @ layer.lora_a, g, call.groups)


def _dora(call: Call, g: mx.array) -> Contributions:
    """y = m / d (x W^T + scale x A B) + bias, with d the norms of the adapted rows, a constant."""
    layer = call.layer
    adapted = layer._dequantized_weight() + (layer.scale * layer.lora_b.T) @ layer.lora_a.T
    factor = layer.m / mx.linalg.norm(adapted, axis=1)
    scaled = call.y - layer.linear.bias if "bias" in layer.linear else call.y
    yield "m", vector(g * scaled / layer.m, call.groups)
    yield from _low_rank(call, layer.scale * (g * factor.astype(g.dtype)))


def _switch(call: Call, g: mx.array) -> Contributions:
    """y = x W[indices]^T + bias[indices]."""
    x, indices = call.args[:2]
    owners = Owners(call.groups, call.rows)
    yield "weight", Experts(x, g, indices, call.is_sorted, owners, call.layer.weight.shape)
    if "bias" in call.layer:
        yield "bias", Lookup(indices, g.squeeze(-2), owners, call.layer.bias.shape)


def _lora_switch(call: Call, g: mx.array) -> Contributions:
    """y = switch(x) + scale x A[indices]^T B[indices]^T."""
    layer, indices, owners = call.layer, call.args[1], Owners(call.groups, call.rows)
    x = call.args[0] if call.dropped is None else call.dropped
    g = (layer.scale * g).astype(layer.lora_b.dtype)
    into_a = mx.gather_mm(g, layer.lora_b, rhs_indices=indices, sorted_indices=call.is_sorted)
    a = Experts(x, into_a, indices, call.is_sorted, owners, layer.lora_a.shape)
    yield "lora_a", a
    yield "lora_b", Experts(a._product(layer.lora_a), g, indices, call.is_sorted, owners, layer.lora_b.shape)


def _lora_embedding(call: Call, g: mx.array) -> Contributions:
    """y = table[ids] + scale A[ids] B."""
    layer, ids, g = call.layer, call.args[0], call.layer.scale * g
    yield "lora_a", Lookup(ids, g @ layer.lora_b.T, Owners(call.groups), layer.lora_a.shape)
    yield "lora_b", matrix(layer.lora_a[ids], g, call.groups)


def _lora_unembedding(call: Call, g: mx.array) -> Contributions:
    """y = x table^T + scale x B^T A^T."""
    layer, x, g = call.layer, call.args[0] if call.dropped is None else call.dropped, call.layer.scale * g
    yield "lora_a", matrix(g, x @ layer.lora_b.T, call.groups)
    yield "lora_b", matrix(g @ layer.lora_a, x, call.groups)


_RULES: dict[Any, Rule] = {
    nn.Linear.__call__: Rule(frozenset({"weight", "bias"}), _linear),
    nn.Embedding.__call__: Rule(frozenset({"weight"}), _embedding),
    nn.Embedding.as_linear: Rule(frozenset({"weight"}), _linear),
    nn.RMSNorm.__call__: Rule(frozenset({"weight"}), _rms_norm),
    nn.LayerNorm.__call__: Rule(frozenset({"weight", "bias"}), _layer_norm),
}


def _of_mlx_lm() -> dict[Any, Rule]:
    """The rules of mlx-lm's layers, as far as it was imported."""
    rules = {}
    for name, method, parameters, rule in (
        ("mlx_lm.tuner.lora", "LoRALinear.__call__", ("lora_a", "lora_b"), _lora),
        ("mlx_lm.tuner.lora", "LoRASwitchLinear.__call__", ("lora_a", "lora_b"), _lora_switch),
        ("mlx_lm.tuner.lora", "LoRAEmbedding.__call__", ("lora_a", "lora_b"), _lora_embedding),
        ("mlx_lm.tuner.lora", "LoRAEmbedding.as_linear", ("lora_a", "lora_b"), _lora_unembedding),
        ("mlx_lm.tuner.dora", "DoRALinear.__call__", ("m", "lora_a", "lora_b"), _dora),
        ("mlx_lm.models.switch_layers", "SwitchLinear.__call__", ("weight", "bias"), _switch),
    ):
        if (module := sys.modules.get(name)) is not None:
            rules[attrgetter(method)(module)] = Rule(frozenset(parameters), rule)
    return rules
