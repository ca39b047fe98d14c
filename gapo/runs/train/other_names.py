"""Names that TRL and transformers have for settings of `gapo train`, and those of theirs that it cannot take.

`gapo train` understands both names of a setting. In the settings that it saves, and in its messages, stands the short
one. The fields of `transformers.TrainingArguments` that have no short name keep their own.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gapo.runs.errors import ConfigError
from gapo.runs.train.train_config import TrainConfig
from gapo.runs.train.trainer_fields import accepted_values, declared_fields

OTHER_NAMES = {
    "model_name_or_path": "model",
    "tokenizer_name_or_path": "tokenizer",
    "torch_dtype": "dtype",
    "dataset_name": "pairs",
    "dataset_train_split": "split",
    "dataset_test_split": "eval_split",
    "dataset_streaming": "streaming",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "lr_scheduler_type": "scheduler",
    "activation_checkpointing": "gradient_checkpointing",
    "lora_target_modules": "lora_targets",
    "objective": "loss",
    "objective_settings": "loss_settings",
}

_NO_REFERENCE = "GAPO has no reference model: leave it out"
REFUSED = {
    "auto_find_batch_size": "the pairs of a batch share an anchor, so its size is a setting: lower batch_size yourself",
    "hub_token": "it would stand in the run's files: log in with `hf auth login`, or set HF_TOKEN",
    "label_smoothing_factor": "GAPO's own is label_smoothing",
    "model_init_kwargs": "give dtype, attn_implementation and model_revision by their names",
    "precompute_ref_log_probs": _NO_REFERENCE,
    "ref_model": _NO_REFERENCE,
    "resume_from_checkpoint": "a run resumes from the last checkpoint in its output_dir; --resume false starts anew",
    "sync_ref_model": _NO_REFERENCE,
    "trust_remote_code": "code that comes with a model is never run",
}


LISTS = ("lora_targets", "lora_target_modules", "lora_modules_to_save", "report_to")


def add_other_names(parser: Any) -> None:
    """Let a parser of the fields of `TrainConfig` and `gapo.GAPOConfig` take the other names too.

    Their help stands with the short names. Values of fields of `TrainingArguments` are read as YAML, and checked later.
    """
    own = parser._option_string_actions
    types = typing.get_type_hints(TrainConfig)
    for name, short in OTHER_NAMES.items():
        parser.add_argument(f"--{name}", type=types[short], help=argparse.SUPPRESS)
        own[f"--{short}"].help += f". Also --{name}"
    parser.add_argument("--use_peft", type=bool, help=argparse.SUPPRESS)
    for name, annotation in {**dict.fromkeys(REFUSED, ""), **declared_fields()}.items():
        if f"--{name}" not in own:
            is_text = annotation in ("str", "str | None") and name != "fsdp"  # which may be true, too
            parser.add_argument(f"--{name}", type=str | None if is_text else Any, help=argparse.SUPPRESS)


def other_switches() -> set[str]:
    """The other names, and fields of `TrainingArguments`, that are true or false."""
    types = {f.name: str(f.type) for f in fields(TrainConfig)}
    annotations = declared_fields() | {name: types[short] for name, short in OTHER_NAMES.items()}
    return {
        "use_peft",
        "trust_remote_code",
        *(name for name, text in annotations.items() if text in ("bool", "bool | None")),
    }


def other_fields() -> dict[str, str]:
    """The fields of `TrainingArguments` that `gapo train` takes besides its own, each with its choices or its type."""
    own = {f.name for f in fields(TrainConfig)}
    names = sorted(set(declared_fields()) - set(OTHER_NAMES) - set(REFUSED) - own)
    accepted = accepted_values()
    return {name: accepted[name] for name in names}


def help_on_other_fields() -> str:
    """The lines of `gapo train --help` on them."""
    lines = [f"  --{name} {accepted}" for name, accepted in other_fields().items()]
    wrapped = [textwrap.fill(line, 79, subsequent_indent=" " * 6) for line in lines]
    return "\n".join(["with backend torch also the fields of transformers.TrainingArguments:", *wrapped])


def with_short_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under their short names, other fields of `TrainingArguments` in "training_arguments".

    Raises:
        ConfigError: both names of a setting are there, with different values; or one that cannot be taken is set.
    """
    others = set(other_fields())
    settings = {n: v for n, v in values.items() if n not in others and n not in OTHER_NAMES and n not in REFUSED}
    for name, value in values.items():
        if name in REFUSED and value not in (None, False):
            raise ConfigError(f"{name} is not accepted: {REFUSED[name]}")
        short = OTHER_NAMES.get(name, name)
        if short != name and short in settings and settings[short] != value:
            raise ConfigError(
                f"{short}={settings[short]!r} and {name}={value!r} are two names of one setting: give one of them"
            )
        if short != name:
            settings[short] = value
    arguments = {name: value for name, value in values.items() if name in others}
    if "warmup_steps" in arguments and "warmup_ratio" in settings:
        raise ConfigError("warmup_steps and warmup_ratio are two forms of one setting: give one of them")
    for name, value in arguments.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name} cannot be {value!r}: {error}") from error
    return settings | ({"training_arguments": arguments} if arguments else {})
