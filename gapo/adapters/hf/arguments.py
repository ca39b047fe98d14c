"""`GAPOConfig` of this adapter: `TrainingArguments` that also carry the settings of the step, as TRL's users expect."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

import gapo
from gapo._fields import carried
from gapo.logp_options import LogpOptions
from gapo.objectives import OBJECTIVES, resolve
from gapo.objectives.loss import require_own_settings


@dataclass
class GAPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the fields of the core's `gapo.GAPOConfig`, and what pairs need.

    Usable with `transformers.HfArgumentParser`, `trl.TrlParser` and YAML. Where a default differs from that of
    `TrainingArguments`, it is the authors' recipe (learning rate 5e-7, cosine, a tenth of the steps to warm up), what
    pairs need (`remove_unused_columns=False`), or TRL's (`bf16` and `gradient_checkpointing`, on a GPU alone).

    Raises:
        ValueError: a value is out of its range. The message names the argument, the value and what is accepted.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "objective_settings"]  # noqa: RUF012

    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate of the optimizer."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate after the warm-up."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps in which the learning rate rises; below 1, the share of all steps."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1, a share of all."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the model's forward does not name the pairs' columns."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bfloat16. None for True on a GPU that has it, unless fp16 is set, as in TRL."},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Trade time for memory. None for True on a GPU, for models that support it, as in TRL."},
    )

    # The settings of the step: default, help and choices are those of the core's fields.
    beta: float = carried(gapo.GAPOConfig, "beta")
    gamma: float = carried(gapo.GAPOConfig, "gamma")
    rho: float = carried(gapo.GAPOConfig, "rho")
    target_gap: float | None = carried(gapo.GAPOConfig, "target_gap")
    adaptive: bool = carried(gapo.GAPOConfig, "adaptive")
    probe: str = carried(gapo.GAPOConfig, "probe")
    direction: str = carried(gapo.GAPOConfig, "direction")
    anchor: str = carried(gapo.GAPOConfig, "anchor")
    perturb: str = carried(gapo.GAPOConfig, "perturb")
    last_layers: int | None = carried(gapo.GAPOConfig, "last_layers")
    update: str = carried(gapo.GAPOConfig, "update")
    loss_type: str = carried(gapo.GAPOConfig, "loss_type")
    label_smoothing: float = carried(gapo.GAPOConfig, "label_smoothing")
    sft_weight: float = carried(gapo.GAPOConfig, "sft_weight")

    objective: str = field(
        default="gapo",
        metadata={
            "help": "gapo, simpo for the control without an anchor, or another objective of gapo.objectives. Those "
            "that compare with a reference need its log-probabilities in the data set: see with_reference_logps.",
            "choices": OBJECTIVES,
        },
    )
    objective_settings: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Settings of the other objectives, such as {"beta": 0.1}; their defaults without.'},
    )

    ld_alpha: float | None = carried(LogpOptions, "ld_alpha")
    use_weighting: bool = carried(LogpOptions, "use_weighting")

    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of prompt and answer together; None for no limit."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Most tokens of the prompt, from its end."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Round the length of batches up to this."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set all dropout to 0, as TRL does."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of AutoModelForCausalLM.from_pretrained, for a model by path or id. dtype is float32 "
            "unless said otherwise: 16-bit weights lose small updates (bf16=True computes in 16 bits all the same). "
            "use_safetensors is True: other files of weights are pickles."
        },
    )

    def __post_init__(self) -> None:
        self._take_defaults_of_device()
        super().__post_init__()
        settings: Any = self.objective_settings  # text was parsed above
        loss = resolve(self.objective, self.step_config(), settings)
        require_own_settings(loss, self.step_config(), settings or {}, "objective_settings={{{name!r}: {value!r}}}")
        LogpOptions(self.ld_alpha, self.use_weighting).require_weightable(loss.name, loss.objective.coupled)
        for name in ("max_length", "max_prompt_length", "pad_to_multiple_of"):
            _require_count(name, getattr(self, name))
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # old and new name of the same
            if getattr(self, name, False):  # torch's checkpoint is re-entrant where it is not told
                options: Any = getattr(self, f"{name}_kwargs") or {}
                setattr(self, f"{name}_kwargs", {"use_reentrant": False, **options})

    def _take_defaults_of_device(self) -> None:
        """TRL's defaults where there is a GPU; on a CPU they would cost accuracy and time."""
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        new = "activation_checkpointing"  # the name since transformers 5.20; the old one would warn
        name = new if hasattr(self, new) else "gradient_checkpointing"
        if getattr(self, name) is None:
            setattr(self, name, self.gradient_checkpointing)
        self.checkpointing_by_default = getattr(self, name) is None
        if self.checkpointing_by_default:
            setattr(self, name, not self.use_cpu and torch.cuda.is_available())
        if name == new:
            self.gradient_checkpointing = None

    def turn_checkpointing_off(self) -> None:
        """For a model that does not support it."""
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if hasattr(self, name):
                setattr(self, name, False)

    def to_dict(self) -> dict[str, Any]:
        """As the base class's, with masks of `perturb` as their description, since JSON holds no arrays."""
        return {**super().to_dict(), "perturb": gapo.config.plain(self.step_config())["perturb"]}

    def step_config(self) -> gapo.GAPOConfig:
        """The settings of the step alone, checked."""
        return gapo.GAPOConfig(**{f.name: getattr(self, f.name) for f in fields(gapo.GAPOConfig)})


def _require_count(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} must be a whole number >= 1, or None, got {value!r}")
