"""The plugin for Axolotl. Axolotl itself is in a row of `.ci/extras`; elsewhere its base class is a bare one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import hf_models
import pytest
from frameworks import require

from gapo.adapters.hf import GAPOCallback

ValidationError = require("pydantic").ValidationError


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


# Reads a configuration as `axolotl train` does, and asks the plugins for what they add to the trainer.
READ = """
import json, sys
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
cfg = load_cfg(sys.argv[1])
callbacks = PluginManager.get_instance().add_callbacks_pre_trainer(cfg, None)
print(json.dumps([[type(callback).__name__, callback.config.rho, callback.objective] for callback in callbacks]))
"""


def test_axolotl_itself_reads_the_file_and_takes_the_callback(tmp_path: Path) -> None:
    pytest.importorskip("axolotl")
    hf_models.make("llama").save_pretrained(tmp_path / "model")
    hf_models.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}')
    fields = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
    fields |= {f"{name}_format": f"{{{name}}}" for name in ("prompt", "chosen", "rejected")}
    cfg = {
        "base_model": str(tmp_path / "model"),
        "plugins": ["gapo.adapters.axolotl.GAPOPlugin"],
        "rl": "simpo",
        "datasets": [{"path": str(tmp_path / "pairs.jsonl"), "ds_type": "json", "split": "train", "type": fields}],
        "output_dir": str(tmp_path / "out"),
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "num_epochs": 1,
    }
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    for settings, code, said in (
        ({"rho": 0.5, "objective": "gapo+dpo"}, 0, '[["GAPOCallback", 0.5, "gapo+dpo"]]'),
        ({"roh": 0.5}, 1, "gapo has no setting 'roh'"),
    ):
        file = tmp_path / "cfg.yaml"
        file.write_text(json.dumps({**cfg, "gapo": settings}))  # JSON is YAML
        done = subprocess.run([sys.executable, "-c", READ, file], capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stderr[-2000:]
        assert said in done.stdout + done.stderr
