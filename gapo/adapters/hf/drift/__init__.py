"""How far a policy has moved from where it started: `DriftCallback`, and the parts that it is made of."""

from gapo.adapters.hf.drift.drift import DriftCallback

__all__ = ["DriftCallback"]
