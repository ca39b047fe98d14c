"""Which rule stands for which type of layer, and what in a model the tape cannot stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from gapo.backends.torch.pairgrads.parts import Parts

Grads = Callable[[Any, Any, Any], Parts]
Reads = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
Confirms = Callable[[Any, Any, Any], "bool | Grads"]


def _always(layer: Any) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """How one type of layer makes gradients group by group; see `register_rule` for the fields."""

    grads: Grads
    fits: Callable[[Any], bool] = _always
    reads: Reads | None = None
    confirms: Confirms | None = None


# By type or by "module.Class": the forward that the rule is for (None: the one of the type's own module), and the rule.
_RULES: dict[Any, tuple[Any, Rule]] = {}
_FAMILIES: list[tuple[Callable[[Any], bool], Rule]] = []


def register_rule(
    kind: type[nn.Module] | str,
    grads: Grads,
    *,
    fits: Callable[[Any], bool] = _always,
    reads: Reads | None = None,
    confirms: Confirms | None = None,
) -> None:
    """Add the rule for one type of layer, in place of an earlier one.

    A rule need not be trusted: the tape compares its gradients with autograd's, and refuses those that differ.

    Args:
        kind: the type; its subclasses are other types. A string, "module.Class", names a type of a library that may not
            be installed.
        grads: `grads(layer, a, g)` yields `(name, Part)` for each parameter of the layer's own that is trained.
            `a` is the input by group, (blocks, N, tokens, in), or (blocks, N, tokens) where it is of integers; None
            where the layer trains a bias only. `g` is the gradient of the output, (blocks, N, tokens, out).
        fits: asked of a layer at every step, from its attributes. Where it says no, the layer has no rule.
        reads: `reads(layer, args, kwargs)` picks the tensors that `grads` needs from what the layer was called with;
            `grads` then gets them as they were passed. The first one tells the rows. Without `reads`, the layer takes
            one positional tensor.
        confirms: `confirms(layer, a, output)`, asked once for each layer and its code, on the tensors of one call:
            whether the layer computes what the rule takes it for. It may return another `grads` for this layer.

    >>> import torch
    >>> from torch import nn
    >>> from gapo.backends.torch.pairgrads import Explicit, register_rule
    >>> class Scale(nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.scale = nn.Parameter(torch.ones(width))
    ...     def forward(self, x):
    ...         return x * self.scale
    >>> def scale(layer, a, g):
    ...     yield "scale", Explicit((a * g).sum((0, 2)))
    >>> register_rule(Scale, scale)
    """
    library = isinstance(kind, str) or kind.__module__.startswith("torch.")  # it may have been patched before this runs
    forward = None if library else kind.forward  # type: ignore[union-attr]
    _RULES[kind] = forward, Rule(grads, fits, reads, confirms)


def register_family(belongs: Callable[[Any], bool], rule: Rule) -> None:
    """Add a rule for every layer of which `belongs(layer)` is true and that no type's rule stands for.

    What only looks like a member must be told apart by numbers: `rule.confirms`.
    """
    _FAMILIES.append((belongs, rule))


def rule_for(layer: Any) -> Rule | None:
    """The rule for `layer`'s own parameters, or None.

    None also for a layer that is not what its class is known for, such as an instance with a `forward` of its own.
    """
    kind = type(layer)
    if "forward" in vars(layer):
        return None
    forward, rule = _RULES.get(kind) or _RULES.get(f"{kind.__module__}.{kind.__qualname__}") or (None, None)
    if rule is None:
        return next((rule for belongs, rule in _FAMILIES if belongs(layer)), None)
    if forward is None and kind.forward.__module__ != kind.__module__:
        return None  # patched
    return rule if forward in (None, kind.forward) and rule.fits(layer) else None


def unfit(module: nn.Module) -> str | None:
    """What changes gradients or mixes rows unseen by the tape; None without."""
    hooks = torch_module._global_forward_hooks.values()  # PyTorch's own, its counters of flops, change nothing
    if any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks):
        return "a forward hook of all modules may change what layers give"
    for m in module.modules():
        if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None):
            return f"{type(m).__name__} mixes the rows of a batch"
        for part, p in trained(m).items():
            if p._backward_hooks:
                return f"the {part} of a {type(m).__name__} has a gradient hook"
            if hasattr(p, "full_tensor"):
                return f"the {part} of a {type(m).__name__} is a shard"
    return None


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of `module` itself that are trained."""
    return {part: p for part, p in module._parameters.items() if p is not None and p.requires_grad}


def owns(layer: nn.Module) -> set[str]:
    """Names of the parameters of `layer` itself, trained or not."""
    return {part for part, p in layer._parameters.items() if p is not None}
