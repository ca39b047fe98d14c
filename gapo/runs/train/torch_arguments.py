"""The `gapo.adapters.hf.GAPOConfig` of a run of `gapo train`: its settings, and other fields of `TrainingArguments`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from gapo.adapters.hf import GAPOConfig as Arguments
from gapo.adapters.hf.deepspeed_config import other_numbers
from gapo.config import GAPOConfig
from gapo.runs import ranks
from gapo.runs.errors import ConfigError
from gapo.runs.train.loss_option import is_own
from gapo.runs.train.model_options import names_in
from gapo.runs.train.schedule import steps_between_evaluations, total_steps
from gapo.runs.train.train_config import TrainConfig
from gapo.runs.train.trainer_fields import typed_values


def arguments_of(config: TrainConfig, step_config: GAPOConfig, checkpoints: Path, pairs: int) -> Arguments:
    """The arguments of the Trainer.

    Args:
        config: the run; the fields of `TrainingArguments` in it win over what follows from the others.
        step_config: settings of the step.
        checkpoints: folder of the checkpoints.
        pairs: number of training pairs.

    Raises:
        ConfigError: a value is of another type than its field.
        ValueError: a value is not accepted.
    """
    steps = total_steps(config, pairs, ranks.count())
    eval_steps = steps_between_evaluations(config, steps)
    tiny = False if config.model == "tiny" else None  # None is left to the arguments, which know the device
    objective = {} if is_own(config.loss) else {"objective": config.loss, "objective_settings": config.loss_settings}
    settings: dict[str, Any] = {
        **asdict(step_config),
        **objective,
        **asdict(config.logp_options),
        "output_dir": str(checkpoints),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": 4 * config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": round(config.warmup_ratio * steps),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "eval_strategy": "steps",
        "eval_steps": eval_steps,
        "save_steps": config.save_steps or eval_steps,
        "save_total_limit": 2,
        "logging_steps": config.logging_steps,
        "bf16": tiny if config.bf16 is None else config.bf16,
        "gradient_checkpointing": tiny if config.gradient_checkpointing is None else config.gradient_checkpointing,
        "disable_dropout": config.disable_dropout,
        "max_length": config.max_length,
        "seed": config.seed,
        "report_to": names_in(config.report_to) or ["none"],
        "use_cpu": ranks.count() > 1 and not torch.accelerator.is_available(),  # without it, each would train alone
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    others = typed_values(config.training_arguments)
    if others.get("push_to_hub"):  # else it would be called as the folder of checkpoints
        settings["hub_model_id"] = Path(config.output_dir).resolve().name
    return Arguments(**settings | others)


def require_arguments(config: TrainConfig, step_config: GAPOConfig) -> Arguments:
    """Like `arguments_of`, on the device and in the group of processes. Raises ConfigError for what cannot be used."""
    try:
        arguments = arguments_of(config, step_config, Path(config.output_dir, "checkpoints"), 1)
        arguments.device  # noqa: B018  # set up now, with the processes
        weight = torch.zeros(1, requires_grad=True)
        get_scheduler(
            config.scheduler,
            torch.optim.SGD([weight]),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    for message in other_numbers(arguments.deepspeed_plugin, arguments):
        raise ConfigError(message)
    return arguments
