"""The numbers of a DeepSpeed configuration that a Trainer has too; where they differ, DeepSpeed's silently win."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import TrainingArguments


def other_numbers(plugin: Any, args: TrainingArguments) -> Iterator[str]:
    """A line for each number of accelerate's `DeepSpeedPlugin` that differs from the run's; none without a plugin.

    accelerate puts `gradient_accumulation_steps` 1 into a configuration without it. Without `gradient_clipping`,
    DeepSpeed does not clip.
    """
    if plugin is None:
        return
    config = plugin.hf_ds_config.config
    pairs, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    together = args.world_size * pairs * accumulation
    own = {
        "gradient_accumulation_steps": ("gradient_accumulation_steps", accumulation, 1),
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", pairs, "auto"),
        "train_batch_size": ("processes x per_device_train_batch_size x gradient_accumulation_steps", together, "auto"),
        "gradient_clipping": ("max_grad_norm", args.max_grad_norm or 0.0, 0.0),
    }
    for key, (name, value, where_missing) in own.items():
        theirs = config.get(key, where_missing)
        if theirs not in ("auto", value):
            also = " (also where none is written)" if theirs == where_missing else ""
            yield (
                f"DeepSpeed's configuration has {key} {theirs}{also}, and the run has {name} {value}: let them agree, "
                f'or write "{key}": "auto" there'
            )
