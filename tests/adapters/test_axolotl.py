"""The plugin for Axolotl. Axolotl itself is a row of `.ci/extras`; here its base class is a bare one."""

import sys
from collections.abc import Iterator
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from gapo.adapters.hf import GAPOCallback


class RLType(str, Enum):
    SIMPO = "simpo"
    DPO = "dpo"


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with Axolotl's base class where Axolotl is absent."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name, module in {
        "axolotl": ModuleType("axolotl"),
        "axolotl.integrations": ModuleType("x"),
        base.__name__: base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "gapo.adapters.axolotl", raising=False)
    import gapo.adapters.axolotl as module

    yield module
    sys.modules.pop("gapo.adapters.axolotl", None)


def test_the_callback_has_the_settings_of_the_file(adapter: Any) -> None:
    settings = {"rho": 0.5, "anchor": "exact", "objective": "gapo+dpo", "objective_settings": {"beta": 0.1}}
    (callback,) = adapter.GAPOPlugin().add_callbacks_pre_trainer({"rl": RLType.SIMPO, "gapo": settings}, None)
    assert isinstance(callback, GAPOCallback)
    assert (callback.config.rho, callback.config.anchor, callback.objective) == (0.5, "exact", "gapo+dpo")
    assert callback.loss.settings["beta"] == 0.1
    (plain,) = adapter.GAPOPlugin().add_callbacks_pre_trainer({"rl": "simpo"}, None)
    assert plain.config == GAPOCallback().config
    module, _, name = adapter.GAPOPlugin().get_input_args().rpartition(".")
    assert getattr(sys.modules[module], name) is adapter.GAPOArgs


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"rl": RLType.DPO}, "trains under rl: simpo, got rl: dpo"),
        ({}, "got rl: None"),
        ({"rl": "simpo", "rl_beta": 0.1}, "rl_beta has no effect, since the loss is GAPO's: give beta under gapo"),
        ({"rl": "simpo", "simpo_gamma": 0.5}, "give gamma under gapo"),
        ({"rl": "simpo", "cpo_alpha": 1.0}, "give sft_weight under gapo"),
        ({"rl": "simpo", "trl": {"beta": 0.1}}, "trl.beta has no effect"),
    ],
)
def test_what_would_have_no_effect_is_refused(adapter: Any, cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.GAPOPlugin().add_callbacks_pre_trainer(cfg, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"roh": 0.1}, "gapo has no setting 'roh'; it has adaptive"), ({"rho": -1.0}, "rho must be")],
)
def test_the_file_is_checked_when_it_is_read(adapter: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        adapter.GAPOArgs(gapo=settings)
    assert adapter.GAPOArgs(gapo={"rho": 0.1}).gapo == {"rho": 0.1}
    assert adapter.GAPOArgs().gapo is None
