"""A scalar whose backward hands out gradients that were computed before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def deposited(value: Tensor, grads: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """`value`, as a scalar whose backward gives each parameter its gradient; both by the same names, in one order.

    The gradients are let go of: they are changed in place.
    """
    deposit: Tensor = _Deposit.apply(value, list(grads.values()), *parameters.values())
    return deposit


class _Deposit(torch.autograd.Function):
    """A scalar whose backward gives each parameter the gradient that was computed for it already.

    Training loops call `loss.backward()`, and accelerate, DDP and gradient scalers hang on that call, so the gradients
    must arrive in it. The parameters are inputs of this function, which hands each one its gradient, times the factor
    by which the loop scaled the loss.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None  # in place and let go: a second copy of all gradients would cost memory
        return None, None, *(g.mul_(scale) for g in grads)
