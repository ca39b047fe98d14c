"""Rules for types of layers, one file for each kind; importing them registers them."""

from gapo.backends.torch.pairgrads.rules import (  # noqa: F401  (they register their rules)
    dora,
    embedding,
    experts,
    linear,
    lookup,
    norm,
)
from gapo.backends.torch.pairgrads.rules.registry import Rule, register_rule, rule_for, trained, unfit

__all__ = ["Rule", "register_rule", "rule_for", "trained", "unfit"]
