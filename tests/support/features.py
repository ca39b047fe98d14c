"""A policy of a dozen numbers. Each answer is a row of features; no parameter enters its log-probability linearly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import numpy as np
import torch
from frameworks import Library

Sides = tuple[torch.Tensor, torch.Tensor]

RNG = np.random.default_rng(3)
FEATURES = {side: 0.7 * RNG.normal(size=(3, 4)) for side in ("chosen", "rejected")}
PARAMS = {name: 0.5 * RNG.normal(size=4) for name in ("up", "down", "lm_head")}
LENGTHS = {"chosen": np.array([3, 2, 6]), "rejected": np.array([5, 4, 2])}
REFERENCE = {"ref_chosen_logps": np.array([-5.0, -2.5, -7.0]), "ref_rejected_logps": np.array([-6.0, -2.0, -4.0])}


def averages(p: Any, x: Any, exp: Any) -> Any:
    """Log-probability of each response (N,), nats per token: a function that no parameter enters linearly."""
    return -exp(x @ p["up"] + (x * x) @ p["down"] / 2) - (x @ p["lm_head"]) ** 2


def sides(params: dict[str, torch.Tensor]) -> Sides:
    chosen, rejected = (averages(params, torch.tensor(x), torch.exp) for x in FEATURES.values())
    return chosen, rejected


def margin_fn(backend: Library) -> Callable[[Any, Any], Any]:
    def logps(params: Any, batch: Any) -> Any:
        by_name, exp = models.flat(backend, params), models.namespace_of(backend).exp
        return tuple(averages(by_name, batch[side], exp) for side in FEATURES)

    return logps


def batch_of(backend: Library) -> dict[str, Any]:
    lengths = {f"{side}_lengths": n for side, n in LENGTHS.items()}
    return {name: backend.asarray(x) for name, x in {**FEATURES, **lengths, **REFERENCE}.items()}
