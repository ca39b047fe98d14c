"""Defaults of `gapo train` that fit the kind of a run: a tiny model, LoRA adapters, or all weights of a model.

The learning rates of LoRA and of all weights are those of TRL's DPO script; that of all weights is the authors' too.
Those of a tiny model were chosen on the generated pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gapo.config import GAPOConfig
from gapo.objectives import OBJECTIVES, resolve
from gapo.runs.errors import ConfigError

_PEFT = {"lora_r": 16, "lora_alpha": 32}  # TRL's, for use_peft alone
_RATES = {"a tiny model": 1e-3, "LoRA adapters": 5e-6, "all weights": 5e-7}
_TINY_RHO = 0.3


def with_defaults(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings with defaults for those that are not there, and one line that states these.

    Args:
        values: settings by their short names, "use_peft" among them.

    Raises:
        ConfigError: use_peft and lora_r contradict each other.
    """
    settings = {name: value for name, value in values.items() if name != "use_peft"}
    adapters = values.get("use_peft")
    if adapters is False and settings.get("lora_r"):
        raise ConfigError(f"use_peft is false and lora_r is {settings['lora_r']}: leave one of them out")
    if adapters and settings.get("lora_r") == 0:
        raise ConfigError("use_peft is true and lora_r is 0: leave one of them out")
    defaults: dict[str, Any] = dict(_PEFT) if adapters and "lora_r" not in settings else {}
    kind = "all weights"
    if settings.get("model", "tiny") == "tiny":
        kind = "a tiny model"
        defaults |= {"rho": _TINY_RHO} if _reads_rho(settings) else {}
    elif settings.get("lora_r") or adapters:
        kind = "LoRA adapters"
    defaults = {"learning_rate": _RATES[kind], **defaults}
    defaults = {name: value for name, value in defaults.items() if name not in settings}
    listed = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
    return {**defaults, **settings}, f"defaults for {kind}: {listed}" if defaults else ""


def _reads_rho(settings: Mapping[str, Any]) -> bool:
    """Whether the run's objective has an anchor at the distance `rho`."""
    loss = settings.get("loss", "gapo")
    if settings.get("target_gap") is not None or loss not in OBJECTIVES:
        return False
    return resolve(loss, GAPOConfig(), None).needs_anchor
