"""What `gapo train` can be told: one flat set of fields, from YAML and from the command line."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gapo.config import GAPOConfig
from gapo.objectives import OBJECTIVES, without_anchor
from gapo.runs.errors import ConfigError, require_limit, require_seed

_POSITIVE = (
    *("demo_size", "batch_size", "accumulation", "logging_steps", "epochs", "learning_rate", "drift_pairs"),
    *("drift_max_new_tokens", "tiny_hidden_size", "tiny_layers", "tiny_heads", "tiny_vocab", "tiny_batch_size"),
)
_NOT_NEGATIVE = (
    *("eval_steps", "save_steps", "weight_decay", "max_grad_norm", "lora_r", "drift_prompts"),
    *("tiny_text_steps", "tiny_answer_steps", "tiny_learning_rate"),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: data, model and training loop. The fields of `gapo.GAPOConfig` stand beside these.

    Args:
        pairs: training pairs: a file (.json, .jsonl, each also .gz, .csv, .parquet), a data set's folder or Hub name,
            or "demo" for generated ones.
        eval_pairs: pairs to evaluate on, likewise; none to hold out a share of the training pairs. Those that say
            is_flipped are evaluated on their true labels.
        eval_fraction: share of the training pairs held out when eval_pairs is not given.
        split: split of a data set to train on.
        eval_split: split of the data set eval_pairs; none for the only one named test, validation, eval or the like.
        limit: use only so many training pairs.
        demo_size: number of generated training pairs, for pairs "demo".
        strict: stop at the first bad row instead of counting it.
        flip_mode: how training labels are flipped on purpose: "random", or "length" to favour longer or shorter
            answers.
        flip_rate: share of the training labels to flip, 0 for none. Held-out pairs are never flipped.
        flip_seed: seed of the flips.
        flip_favour: which length flips of mode "length" favour.
        model: a Hub name, a local folder, or "tiny" for a small Llama trained on the spot.
        tokenizer: another tokenizer than the model's: a Hub name or folder.
        tiny_hidden_size: width of the tiny model.
        tiny_layers: number of layers of the tiny model.
        tiny_heads: its number of attention heads.
        tiny_vocab: most tokens of its tokenizer.
        tiny_text: plain text (.txt, .txt.gz) to warm it up on, before the answers; none to use the answers alone.
        tiny_text_steps: steps of warm-up on the plain text.
        tiny_answer_steps: steps of warm-up on prompts with either answer, chosen and rejected alike.
        tiny_batch_size: sequences of 128 tokens in a warm-up step.
        tiny_learning_rate: peak learning rate of the warm-up.
        cache_dir: folder where warmed-up tiny models are kept.
        lora_r: rank of LoRA adapters (peft); 0 trains all weights.
        lora_alpha: scale of the adapters.
        lora_targets: names of the modules that get them, comma separated; none for peft's default.
        loss: "gapo", or "simpo" for the control without an anchor, or another objective to compare with: amapo, dpo,
            cdpo, rdpo, dr_dpo, ipo, ropo, hypo, rpo, sigmoid_loss, ramp, unhinged.
        loss_settings: settings of the other objectives, such as {beta: 0.1}; those left out keep their defaults. "gapo"
            and "simpo" take theirs from the fields of GAPOConfig.
        backend: framework that trains.
        output_dir: folder for checkpoints, model, metrics.jsonl and report.html.
        overwrite: start anew in a folder that holds a finished run.
        resume: go on from the last checkpoint in output_dir, if there is one.
        seed: of the shuffling, the initial weights and the held-out split.
        epochs: passes over the training pairs.
        max_steps: stop after so many steps; -1 for all epochs.
        batch_size: pairs in a micro-batch, which share an anchor.
        accumulation: micro-batches in a step.
        learning_rate: peak learning rate.
        warmup_ratio: share of the steps in which the learning rate rises.
        scheduler: shape of the learning rate afterwards (names of transformers).
        weight_decay: strength of the weight decay of AdamW.
        max_grad_norm: gradient clipping.
        max_length: most tokens of prompt and answer.
        eval_steps: evaluate every so many steps; 0 for ten times a run.
        save_steps: checkpoint every so many steps; 0 with each evaluation.
        logging_steps: log every so many steps.
        bf16: train under bfloat16 autocast.
        gradient_checkpointing: trade time for memory.
        report_to: trackers of transformers, comma separated, or "none".
        drift: measure the drift from the starting policy at each checkpoint.
        drift_pairs: training and held-out pairs to measure it on, so many of each.
        drift_prompts: held-out prompts to generate responses for; 0 for none.
        drift_max_new_tokens: most tokens of a generated response.
    """

    pairs: str = "demo"
    eval_pairs: str | None = None
    eval_fraction: float = 0.05
    split: str = "train"
    eval_split: str | None = None
    limit: int | None = None
    demo_size: int = 4000
    strict: bool = False
    flip_mode: Literal["random", "length"] = "random"
    flip_rate: float = 0.0
    flip_seed: int = 0
    flip_favour: Literal["longer", "shorter"] = "longer"
    model: str = "tiny"
    tokenizer: str | None = None
    tiny_hidden_size: int = 128
    tiny_layers: int = 2
    tiny_heads: int = 4
    tiny_vocab: int = 1024
    tiny_text: str | None = None
    tiny_text_steps: int = 300
    tiny_answer_steps: int = 150
    tiny_batch_size: int = 16
    tiny_learning_rate: float = 2e-3
    cache_dir: str = "runs/cache"
    lora_r: int = 0
    lora_alpha: int = 16
    lora_targets: str | None = None
    loss: str = "gapo"
    loss_settings: dict[str, float] = field(default_factory=dict)
    backend: Literal["torch", "jax", "mlx"] = "torch"
    output_dir: str = "runs/gapo"
    overwrite: bool = False
    resume: bool = True
    seed: int = 0
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 5e-7
    warmup_ratio: float = 0.1
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    eval_steps: int = 0
    save_steps: int = 0
    logging_steps: int = 10
    bf16: bool = False
    gradient_checkpointing: bool = False
    report_to: str = "none"
    drift: bool = False
    drift_pairs: int = 32
    drift_prompts: int = 16
    drift_max_new_tokens: int = 64

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        for name in _NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}")
        for name in ("flip_rate", "eval_fraction", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        for name in ("seed", "flip_seed"):
            require_seed(name, getattr(self, name))
        require_limit(self.limit)
        if self.max_length < 2:
            raise ValueError(f"max_length must be >= 2, one token of prompt and one of answer; got {self.max_length}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps must be >= 1, or -1 for all epochs; got {self.max_steps}")
        if self.tiny_hidden_size % (2 * self.tiny_heads):
            raise ValueError(
                f"tiny_hidden_size must be an even multiple of tiny_heads={self.tiny_heads}, "
                f"got {self.tiny_hidden_size}"
            )
        if self.eval_pairs is None and self.eval_split is not None:
            raise ValueError(f"eval_split={self.eval_split!r} is a split of eval_pairs: give eval_pairs too")
        if self.eval_pairs is None and self.pairs != "demo" and not 0 < self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction must be in (0, 1) without eval_pairs, to leave pairs on both sides; "
                f"got {self.eval_fraction!r}"
            )
        if self.loss not in OBJECTIVES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, OBJECTIVES))}, got {self.loss!r}")


def require_loss_settings(run: TrainConfig, step: GAPOConfig) -> None:
    """Raise ConfigError for settings that the loss does not take, or that were given where it does not look."""
    try:
        objective, settings = without_anchor(run.loss, step, run.loss_settings)
    except ValueError as error:
        raise ConfigError(f"loss_settings: {error}") from error
    if objective.name == "simpo":
        return
    for name in settings:
        elsewhere = getattr(step, name, None)
        if name not in run.loss_settings and elsewhere != getattr(GAPOConfig(), name, None):
            raise ConfigError(
                f"{name}={elsewhere!r} is a setting of gapo and simpo, and loss {run.loss!r} has its own: give "
                f"loss_settings: {{{name}: {settings[name]}}}, or --loss_settings.{name} {settings[name]}"
            )


def as_dict(run: TrainConfig, step: GAPOConfig) -> dict[str, Any]:
    """Both configurations as one flat dict."""
    return {**asdict(run), **asdict(step)}
