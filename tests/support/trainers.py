"""A plain `transformers.Trainer` with `GAPOCallback` on a small model and few pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
from transformers import Trainer, TrainingArguments

from gapo import GAPOConfig
from gapo.adapters.hf import GAPOCallback, PreferenceCollator

CONFIG = GAPOConfig(rho=0.3)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": 1,
    }
    return TrainingArguments(**{**defaults, **options})


def make_trainer(
    folder: Path, model: Any = None, *, config: GAPOConfig = CONFIG, rows: Any = None, **options: Any
) -> Trainer:
    callback = GAPOCallback(config, **options.pop("callback", {}))
    collator = PreferenceCollator(hf_models.tokenizer(), max_length=64)
    return Trainer(
        hf_models.make("llama") if model is None else model,
        arguments(folder, **options),
        train_dataset=hf_models.pairs(8) if rows is None else rows,
        eval_dataset=hf_models.pairs(7, seed=5),
        data_collator=collator,
        callbacks=[callback],
    )


def callback_of(trainer: Trainer) -> GAPOCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, GAPOCallback))
