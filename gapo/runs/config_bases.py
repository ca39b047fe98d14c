"""Fields that the commands share: where pairs come from, the tiny policy, the folder of results.

`TrainConfig`, `StudyConfig` and `ScoreConfig` inherit these data classes. So a setting has one name, one help and one
check in every command; a command may still have its own default for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gapo.runs.errors import require_limit, require_seed


def require_positive(config: Any, names: Sequence[str]) -> None:
    """Raise ValueError unless each of these fields is greater than 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(config, name)!r}")


def require_not_negative(config: Any, names: Sequence[str]) -> None:
    """Raise ValueError if one of these fields is less than 0."""
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be >= 0, got {getattr(config, name)!r}")


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """The end of the chain: every class checks its own fields, then hands on with `super().__post_init__()`."""

    def __post_init__(self) -> None:
        """Nothing is left to check."""


@dataclass(frozen=True, kw_only=True)
class PairSource(_Checked):
    """Where pairs come from.

    Args:
        pairs: a file (.json, .jsonl, each also .gz, .csv, .parquet), a data set's folder or Hub name.
        split: split of a data set.
        limit: use only so many pairs.
        max_length: most tokens of prompt and answer.
    """

    pairs: str
    split: str = "train"
    limit: int | None = None
    max_length: int = 1024

    def __post_init__(self) -> None:
        require_limit(self.limit)
        if self.max_length < 2:
            raise ValueError(f"max_length must be >= 2, one token of prompt and one of answer; got {self.max_length}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class EvaluatedPairs(PairSource):
    """Pairs to train on, and pairs to evaluate on.

    Args:
        pairs: training pairs: a file (.json, .jsonl, each also .gz, .csv, .parquet), a data set's folder or Hub name,
            or "demo" for generated ones.
        eval_pairs: pairs to evaluate on, likewise; none to hold out a share of the training pairs. Pairs with
            is_flipped are evaluated on their true labels.
        split: split of a data set to train on.
        eval_split: split of the data set eval_pairs; none for the only one named test, validation, eval or the like.
        limit: use only so many training pairs.
        demo_size: number of generated training pairs, for pairs "demo".
        seed: of everything that is drawn.
    """

    pairs: str = "demo"
    eval_pairs: str | None = None
    eval_split: str | None = None
    demo_size: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        require_positive(self, ("demo_size",))
        if self.eval_pairs is None and self.eval_split is not None:
            raise ValueError(f"eval_split={self.eval_split!r} is a split of eval_pairs: give eval_pairs too")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TinyPolicy(_Checked):
    """A small Llama, trained on the spot.

    Args:
        tiny_hidden_size: width of the tiny model.
        tiny_layers: number of its layers.
        tiny_heads: number of its attention heads.
        tiny_vocab: most tokens of its tokenizer.
        tiny_text: plain text (.txt, .txt.gz) to warm it up on, before the answers; none to use the answers alone.
        tiny_text_steps: steps of warm-up on the plain text.
        tiny_answer_steps: steps of warm-up on prompts with either answer, chosen and rejected alike.
        tiny_batch_size: sequences of 128 tokens in a warm-up step.
        tiny_learning_rate: peak learning rate of the warm-up.
        cache_dir: folder of warmed-up tiny models.
    """

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

    def __post_init__(self) -> None:
        require_positive(self, ("tiny_hidden_size", "tiny_layers", "tiny_heads", "tiny_vocab", "tiny_batch_size"))
        require_not_negative(self, ("tiny_text_steps", "tiny_answer_steps", "tiny_learning_rate"))
        if self.tiny_hidden_size % (2 * self.tiny_heads):
            raise ValueError(
                f"tiny_hidden_size must be an even multiple of tiny_heads={self.tiny_heads}, "
                f"got {self.tiny_hidden_size}"
            )
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class RunFolder(_Checked):
    """Where a run leaves its files.

    Args:
        output_dir: folder for everything that the run writes.
        overwrite: start anew in a folder that holds a finished run.
    """

    output_dir: str
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunFolder, TinyPolicy, EvaluatedPairs):
    """The fields that `gapo train` and `gapo study` share."""
