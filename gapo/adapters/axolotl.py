"""GAPO in Axolotl: a plugin for `rl: simpo`, whose trainer's batches are pairs.

    plugins: [gapo.adapters.axolotl.GAPOPlugin]
    rl: simpo
    gapo: {rho: 0.05, gamma: 0.25}

`gapo` takes the fields of `gapo.GAPOConfig`, and "objective", "objective_settings", "disable_dropout", "ld_alpha" and
"use_weighting" of `gapo.adapters.hf.GAPOCallback`. Axolotl's `BasePlugin` is documented in its integrations/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from gapo.adapters.hf import GAPOCallback
from gapo.config import GAPOConfig

_OF_CALLBACK = ("objective", "objective_settings", "disable_dropout", "ld_alpha", "use_weighting")
# Axolotl's own settings of the loss that GAPO's replaces, and where GAPO has them.
_OF_SIMPO = {"rl_beta": "beta", "simpo_gamma": "gamma", "cpo_alpha": "sft_weight"}


class GAPOArgs(BaseModel):
    """The key that the plugin adds to Axolotl's configuration.

    Attributes:
        gapo: settings of GAPO; None or {} for its defaults.
    """

    gapo: dict[str, Any] | None = None

    @field_validator("gapo")
    @classmethod
    def check(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Raise ValueError for a setting that GAPO has not, or a value that it does not take."""
        callback_of(value or {})
        return value


class GAPOPlugin(BasePlugin):
    """Axolotl's hook: the trainer of `rl: simpo` gets a `GAPOCallback`; loss, evaluation and logs are GAPO's."""

    def get_input_args(self) -> str:
        """The class of the plugin's key in the configuration."""
        return "gapo.adapters.axolotl.GAPOArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[GAPOCallback]:
        """The callback, from the key `gapo` of `cfg`.

        Raises:
            ValueError: `rl` is not simpo, or a setting of SimPO's loss is set, which would have no effect.
        """
        rl = cfg.get("rl")
        if getattr(rl, "value", rl) != "simpo":
            raise ValueError(
                f"the plugin {type(self).__name__} trains under rl: simpo, got rl: {getattr(rl, 'value', rl)}"
            )
        for name, own in _OF_SIMPO.items():
            if cfg.get(name) is not None:
                raise ValueError(
                    f"{name} has no effect, since the loss is GAPO's: give {own} under gapo, and no {name}"
                )
        if (cfg.get("trl") or {}).get("beta") is not None:
            raise ValueError("trl.beta has no effect, since the loss is GAPO's: give beta under gapo, and no trl.beta")
        return [callback_of(cfg.get("gapo") or {})]


def callback_of(settings: Mapping[str, Any]) -> GAPOCallback:
    """The callback of these settings. Raises ValueError, naming it, for one that there is not."""
    of_step = {f.name for f in fields(GAPOConfig)}
    if unknown := [name for name in settings if name not in {*of_step, *_OF_CALLBACK}]:
        raise ValueError(f"gapo has no setting {unknown[0]!r}; it has {', '.join([*sorted(of_step), *_OF_CALLBACK])}")
    config = GAPOConfig(**{name: value for name, value in settings.items() if name in of_step})
    return GAPOCallback(config, **{name: value for name, value in settings.items() if name in _OF_CALLBACK})
