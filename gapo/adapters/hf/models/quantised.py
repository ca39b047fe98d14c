"""What quantised bases need, so that adapters over them can be trained."""

from __future__ import annotations

from typing import Any

from torch import nn


def stay_differentiable(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Keep bitsandbytes from packing 4-bit weights on a CPU; what was changed, as (module, attribute, old value).

    On processors with AVX512-BF16 the first forward in evaluation mode packs them for a kernel that has no backward:
    every later training step would get gradients of 0 from what lies below the layer, with no more than a warning.

    Raises:
        ValueError: such a forward has been run already, and the packing rounds.
    """
    changed = []
    for name, module in model.named_modules():
        flag = "support_avx512bf16_for_cpu"
        if not getattr(module, flag, False) or module.weight.device.type != "cpu":
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weights of {name} were packed for inference, by a forward in evaluation mode on the CPU, "
                "and give no gradients any more: load the model again, and make the trainer before its first use"
            )
        changed.append((module, flag, True))
        setattr(module, flag, False)
    return changed
