"""Whether two sets of gradients are the same, parameter by parameter: one norm of all hides what a small one does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)

# What may multiply float32 matrices faster and coarser, by device.
_backends: Any = torch.backends
_PRODUCTS = {"cuda": _backends.cuda.matmul, "cpu": _backends.mkldnn.matmul}

# Relative error of a parameter's gradient, and what rounding adds to that of a small one, as a share of all gradients.
_WIDE, _COARSE = (1e-3, 3e-6), (5e-2, 2.0**-8)


def compared(
    gradient: Callable[[str], Tensor], expected: dict[str, Any], *, than: str, coarse: bool
) -> tuple[bool | None, str]:
    """(True, ""), or (False, what differs from `than`); (None, "") where zeros or what is not finite prove nothing.

    `gradient(name)` is asked for one parameter at a time. `coarse` allows for 16-bit arithmetic.

    A parameter's error is held against its own gradient, and against a small share of all gradients: what rounding
    alone leaves in a gradient that is nearly 0, such as that of a key's bias in attention.
    """
    relative, floor = _COARSE if coarse else _WIDE
    sizes = torch.stack([_norm(x) for x in expected.values()]).cpu()
    errors = torch.stack([_norm(gradient(name).to(x.dtype) - x) for name, x in expected.items()]).cpu()
    scale = float(sizes.norm())
    if not 0 < scale < float("inf"):
        return None, ""
    wrong = ~(errors <= relative * sizes + floor * scale)  # NaN is wrong
    if not bool(wrong.any()):
        return True, ""
    if not float(errors.norm()) <= relative * scale:
        return False, f"its gradients differ from {than} by {float(errors.norm()) / scale:.1%}"
    worst = int(torch.where(wrong, errors / sizes, -1.0).argmax())
    share = f"{float(errors[worst] / sizes[worst]):.1%}"
    return False, f"its gradient of {list(expected)[worst]!r} differs from {than} by {share}"


def _norm(x: Any) -> Tensor:
    norm = torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32))
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole.double() if whole.device.type != "mps" else whole


def coarse_arithmetic(tensors: Iterable[Tensor], device: str) -> bool:
    """Whether gradients are of 16-bit arithmetic, or of products as coarse."""
    return torch.is_autocast_enabled(device) or coarse_products(device) or any(x.dtype in HALVES for x in tensors)


def coarse_products(device: str) -> bool:
    """Whether matrices of float32 are multiplied faster and coarser on `device`, by TF32 or bfloat16."""
    products = _PRODUCTS.get(device)
    return products is not None and products.fp32_precision in ("tf32", "bf16")
