"""Whether two sets of gradients are the same, parameter by parameter: one norm of all hides what a small one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Relative error of a parameter's gradient, and what rounding adds to that of a small one, as a share of all gradients.
_WIDE, _COARSE = (1e-3, 3e-6), (5e-2, 2.0**-8)


def compared(
    found: Callable[[str], Tensor], expected: dict[str, Any], *, than: str, coarse: bool
) -> tuple[bool | None, str]:
    """(True, ""), or (False, what differs from `than`); (None, "") where zeros or what is not finite prove nothing.

    `found(name)` is asked for one parameter at a time. `coarse` allows for 16-bit arithmetic.
    """
    relative, floor = _COARSE if coarse else _WIDE
    sizes = torch.stack([_norm(x) for x in expected.values()]).cpu()
    errors = torch.stack([_norm(found(name).to(x.dtype) - x) for name, x in expected.items()]).cpu()
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
