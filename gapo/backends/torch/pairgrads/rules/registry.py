"""Which rule stands for which type of layer, and what in a model no rule can stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from gapo.backends.torch.pairgrads.parts import Parts

# What a layer received, as tensors whose first axis is the rows'; (layer, args, kwargs) -> one tensor or several.
Reads = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Rule:
    """How one type of layer makes gradients group by group; see `register_rule` for the fields."""

    grads: Callable[[Any, Any, Tensor], Parts]
    fits: Callable[[Any], bool] = lambda layer: True
    reads: Reads | None = None
    flat: bool = False
    confirms: Callable[[Any, Tensor, Tensor], bool] | None = None


# By type or by "module.Class": the forward that the rule is for (None: the one of the type's own module), and the rule.
_RULES: dict[type | str, tuple[Any, Rule]] = {}


def register_rule(
    kind: type[nn.Module] | str,
    grads: Callable[[Any, Any, Tensor], Parts],
    *,
    fits: Callable[[Any], bool] = lambda layer: True,
    reads: Reads | None = None,
    flat: bool = False,
    confirms: Callable[[Any, Tensor, Tensor], bool] | None = None,
) -> None:
    """Add the rule of one type of layer, in place of an earlier one.

    Args:
        kind: the type; its subclasses are other types. A type of a library that need not be there is named by
            "module.Class".
        grads: `grads(layer, a, g)` yields (name of a parameter of the layer's own, its `Part`) for each one that is
            trained. `a` is the input by group, (blocks, N, tokens, in), or (blocks, N, tokens) where it is of integers;
            None where the layer trains nothing but a bias; a tuple of such where `reads` gives several. `g` is the
            gradient of the output, (blocks, N, tokens, out). Row r of a batch is block r // N of group r mod N.
        fits: asked of a layer at every step, from its attributes; where it says no the layer has no rule.
        reads: `reads(layer, args, kwargs)` picks the tensors out of what the layer was called with. Without it the
            layer takes one positional tensor.
        flat: the first axis may be rows times tokens, as experts of mixtures have it.
        confirms: `confirms(layer, a, output)`, asked once for each layer on what it computed: whether it does what the
            rule takes it for. For rules that stand for layers by more than their exact type.
    """
    library = isinstance(kind, str) or kind.__module__.startswith("torch.")  # may have been patched before this runs
    _RULES[kind] = (None if library else kind.forward, Rule(grads, fits, reads, flat, confirms))


def rule_for(layer: Any) -> Rule | None:
    """The rule for `layer`'s own parameters, or None. What computes something else than its class is known for, such
    as a subclass or an instance with a `forward` of its own, has none.
    """
    kind = type(layer)
    if "forward" in vars(layer):
        return None
    forward, rule = _RULES.get(kind) or _RULES.get(f"{kind.__module__}.{kind.__qualname__}") or (None, None)
    if rule is None:
        rule = next((r for test, r in _GENERAL if test(layer)), None)
    elif kind.forward is not forward and (forward is not None or kind.forward.__module__ != kind.__module__):
        return None  # patched
    return rule if rule is not None and rule.fits(layer) else None


_GENERAL: list[tuple[Callable[[Any], bool], Rule]] = []  # rules of families of types, which are asked on numbers


def register_family(belongs: Callable[[Any], bool], rule: Rule) -> None:
    """Add a rule of all layers of which `belongs(layer)` is true; it must have `confirms`."""
    _GENERAL.append((belongs, rule))


def unfit(module: nn.Module) -> str | None:
    """What in `module` no rule can stand for, or changes gradients and rows unseen by rules; None without."""
    without = {type(m).__name__ for m in module.modules() if trained(m) and rule_for(m) is None}
    if without:
        return f"no rule for layers of type {', '.join(sorted(without))}"
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
