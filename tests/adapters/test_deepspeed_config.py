"""A DeepSpeed configuration whose numbers are not the run's is refused, by a Trainer and by `gapo train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import pytest
from accelerate.utils import DeepSpeedPlugin
from frameworks import require
from transformers import Trainer, TrainingArguments

from gapo import GAPOConfig
from gapo.adapters.hf import GAPOCallback, PreferenceCollator
from gapo.adapters.hf import GAPOConfig as Arguments
from gapo.adapters.hf.deepspeed_config import other_numbers
from gapo.runs.errors import ConfigError
from gapo.runs.train.torch_arguments import require_arguments
from gapo.runs.train.train_config import TrainConfig

RUN = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
OWN = {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}


def plugin(**config: Any) -> Any:
    """accelerate's own, which fills in a missing accumulation and needs no DeepSpeed."""
    return DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, **config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**OWN}, None),
        ({"gradient_accumulation_steps": 2, "gradient_clipping": 1, "train_batch_size": 8}, None),
        ({**OWN, "train_micro_batch_size_per_gpu": 4, "train_batch_size": "auto"}, None),
        ({**OWN, "gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4, and the run has gradient_acc"),
        (
            {"gradient_clipping": "auto"},
            r"steps 1 \(also where none is written\), and the run has gradient_acc",
        ),
        ({**OWN, "train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu 8, and the run has per_device"),
        ({**OWN, "train_batch_size": 4}, r"train_batch_size 4, and the run has processes x .* 8: let them agree, or w"),
        ({**OWN, "gradient_clipping": 0.5}, "gradient_clipping 0.5, and the run has max_grad_norm 1.0"),
        (
            {"gradient_accumulation_steps": 2},
            r"clipping 0.0 \(also where none is written\), and the run has max_grad",
        ),
    ],
)
def test_numbers_that_differ(tmp_path: Path, config: dict[str, Any], message: str | None) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **RUN)
    lines = list(other_numbers(plugin(**config), args))
    if message is None:
        assert lines == []
    else:
        (line,) = lines
        with pytest.raises(ValueError, match=message):
            raise ValueError(line)


def test_a_trainer_and_a_run_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("jsonargparse")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **RUN)
    collator = PreferenceCollator(hf_models.tokenizer())
    trainer = Trainer(hf_models.make("llama"), args, train_dataset=hf_models.pairs(4), data_collator=collator)
    other = property(lambda _: plugin(**{**OWN, "gradient_accumulation_steps": 4}), lambda *_: None)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", other)
    with pytest.raises(ValueError, match="DeepSpeed's configuration has gradient_accumulation_steps 4"):
        GAPOCallback(GAPOConfig()).attach(trainer)
    monkeypatch.setattr(Arguments, "deepspeed_plugin", other, raising=False)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps 4, and the run has gradient_accumulation_steps"):
        require_arguments(TrainConfig(output_dir=str(tmp_path)), GAPOConfig())
