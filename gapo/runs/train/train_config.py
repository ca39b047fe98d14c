"""The settings of `gapo train`: one flat set of fields, from YAML and from the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gapo.config import GAPOConfig, plain
from gapo.logp_options import LogpOptions
from gapo.runs.config_bases import TrainingConfig, require_not_negative, require_positive
from gapo.runs.errors import require_seed
from gapo.runs.train.loss_option import require_loss
from gapo.runs.train.model_options import ModelOptions

_POSITIVE = (
    "batch_size",
    "accumulation",
    "logging_steps",
    "epochs",
    "learning_rate",
    "drift_pairs",
    "drift_max_new_tokens",
)
_NOT_NEGATIVE = ("eval_steps", "save_steps", "weight_decay", "max_grad_norm", "lora_r", "drift_prompts")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelOptions, TrainingConfig):
    """The run: data, model and training loop. The fields of `gapo.GAPOConfig` are set beside these.

    Its fields are the short names of settings; `other_names.OTHER_NAMES` has those of TRL and transformers.

    Args:
        eval_fraction: share of the training pairs held out when eval_pairs is not given.
        strict: stop at the first bad row instead of counting it.
        flip_mode: how training labels are flipped on purpose: "random", or "length" to favour longer or shorter
            answers.
        flip_rate: share of the training labels to flip, 0 for none. Held-out pairs are never flipped.
        flip_seed: seed of the flips.
        flip_favour: which length flips of mode "length" favour.
        loss: "gapo", or "simpo" for the control without an anchor, or another objective to compare with: simper, amapo,
            alpha_dpo, dpo, ipo, sigmoid_norm, hypo, rpo, r_dpo, cal_dpo, cdpo, rdpo, dr_dpo, ropo, re_po, beta_dpo,
            sigmoid_loss, ramp, unhinged, hinge, discopop, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down,
            aot, aot_unpaired. Or MODULE:FUNCTION for one of your own, a function of gapo.objectives.LogProbs that
            returns (N,) losses.
        loss_settings: settings of the other objectives, such as {beta: 0.1}; those left out keep their defaults. "gapo"
            and "simpo" take theirs from the fields of GAPOConfig.
        ld_alpha: LD-DPO's alpha in [0, 1], how much the tail of a pair's longer answer counts in its log-probability,
            for policy and reference; none for 1.
        use_weighting: multiply each pair's loss by WPO's weight, how likely the policy is to have written both answers.
        trust_code: let a YAML file name a loss of its own code. It is accepted on the command line alone.
        backend: framework that trains.
        num_processes: processes to start, one to a device; none for as many as there are GPUs (backend torch).
        accelerate_config: how they share the work, a file of `accelerate config` or one of gapo's own: fsdp2, single,
            zero2, zero3; none for DDP.
        output_dir: folder for checkpoints, model, metrics.jsonl and report.html.
        resume: resume from the last checkpoint in output_dir, if there is one.
        seed: of the shuffling, the initial weights and the held-out split.
        epochs: passes over the training pairs.
        max_steps: stop after so many steps; -1 for all epochs.
        batch_size: pairs in a micro-batch, which share an anchor.
        accumulation: micro-batches in a step.
        learning_rate: peak learning rate; the command line takes 1e-3 for a tiny model and 5e-6 for LoRA adapters where
            it is not set.
        warmup_ratio: share of the steps in which the learning rate rises.
        scheduler: shape of the learning rate afterwards (names of transformers).
        weight_decay: strength of the weight decay of AdamW.
        max_grad_norm: gradient clipping.
        eval_steps: evaluate every so many steps; 0 for ten times a run.
        save_steps: checkpoint every so many steps; 0 with each evaluation.
        logging_steps: log every so many steps.
        bf16: train under bfloat16 autocast; none for "on a GPU that has it, unless the model is tiny".
        gradient_checkpointing: trade time for memory; none for "on a GPU, unless the model is tiny".
        dataset_num_proc: processes that tokenise; none for one. Tokens are kept in cache_dir for the next run.
        report_to: trackers of transformers, comma separated, or "none".
        training_arguments: other fields of `transformers.TrainingArguments`, by their names.
        drift: measure the drift from the starting policy at each checkpoint.
        drift_pairs: training and held-out pairs to measure it on, so many of each.
        drift_prompts: held-out prompts to generate responses for; 0 for none.
        drift_max_new_tokens: most tokens of a generated response.
    """

    eval_fraction: float = 0.05
    strict: bool = False
    flip_mode: Literal["random", "length"] = "random"
    flip_rate: float = 0.0
    flip_seed: int = 0
    flip_favour: Literal["longer", "shorter"] = "longer"
    loss: str = "gapo"
    loss_settings: dict[str, float] = field(default_factory=dict)
    ld_alpha: float | None = None
    use_weighting: bool = False
    trust_code: bool = False
    backend: Literal["torch", "jax", "mlx"] = "torch"
    num_processes: int | None = None
    accelerate_config: str | None = None
    output_dir: str = "runs/gapo"
    resume: bool = True
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 5e-7
    warmup_ratio: float = 0.1
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_steps: int = 0
    save_steps: int = 0
    logging_steps: int = 10
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
    dataset_num_proc: int | None = None
    report_to: str | list[str] = "none"
    training_arguments: dict[str, Any] = field(default_factory=dict, metadata={"option": False})
    drift: bool = False
    drift_pairs: int = 32
    drift_prompts: int = 16
    drift_max_new_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_consistent()
        require_positive(self, _POSITIVE)
        require_not_negative(self, _NOT_NEGATIVE)
        for name in ("flip_rate", "eval_fraction", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        require_seed("flip_seed", self.flip_seed)
        if self.dataset_num_proc is not None and self.dataset_num_proc < 1:
            raise ValueError(f"dataset_num_proc must be >= 1, or none for one process; got {self.dataset_num_proc}")
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes must be >= 1, got {self.num_processes}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps must be >= 1, or -1 for all epochs; got {self.max_steps}")
        if self.evaluated is None and (self.mixture or self.pairs != "demo") and not 0 < self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction must be in (0, 1) without eval_pairs, to leave pairs on both sides; "
                f"got {self.eval_fraction!r}"
            )
        require_loss(self.loss)
        self.logp_options  # noqa: B018  # raises for what they do not take

    @property
    def logp_options(self) -> LogpOptions:
        """How log-probabilities are measured, and pairs weighted."""
        return LogpOptions(self.ld_alpha, self.use_weighting)


def as_dict(config: TrainConfig, step_config: GAPOConfig) -> dict[str, Any]:
    """Both configurations as one flat dict, without `trust_code`, which is of the call and not of the run."""
    settings = {**asdict(config), **plain(step_config)}
    others = settings.pop("training_arguments")
    del settings["trust_code"]
    return settings | others
