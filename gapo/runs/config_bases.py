"""Fields that the commands share: where pairs come from, the tiny policy, the folder of results.

`TrainConfig`, `StudyConfig` and `ScoreConfig` inherit these data classes. So a setting has one name, one help and one
check in every command; a command may still have its own default for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from gapo.data.layouts import Layout, parse_columns
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
        pairs: a file (.json, .jsonl, .csv, .tsv, each also .gz, .parquet), a data set's folder or Hub name.
        split: split of a data set, such as train_prefs or train[:1000].
        columns: other names of columns, prompt=question,chosen=good,rejected=bad, or a mapping in YAML. Upper and lower
            case are alike.
        preference: column that says which of output_a and output_b is preferred: a or b, 1 or 2, the output's column;
            ties are dropped.
        encoding: of a file of text, such as cp1252.
        dataset_config: configuration (subset) of a data set on the Hub.
        dataset_revision: its branch, tag or commit.
        streaming: read a data set of the Hub without saving it; with limit, only its start.
        limit: use only so many pairs.
        max_length: most tokens of prompt and answer.
    """

    pairs: str
    split: str = "train"
    columns: dict[str, str] | str | None = None
    preference: str | None = None
    encoding: str = "utf-8"
    dataset_config: str | None = None
    dataset_revision: str | None = None
    streaming: bool = False
    limit: int | None = None
    max_length: int = 1024

    def __post_init__(self) -> None:
        require_limit(self.limit)
        if self.max_length < 2:
            raise ValueError(f"max_length must be >= 2, one token of prompt and one of answer; got {self.max_length}")
        object.__setattr__(self, "columns", parse_columns(self.columns))
        Layout(self.columns, self.preference)  # type: ignore[arg-type]
        super().__post_init__()


# The fields that say how pairs are read. What was read is compared by its content.
READING = ("columns", "preference", "encoding", "dataset_config", "dataset_revision", "streaming")


@dataclass(frozen=True, kw_only=True)
class EvaluatedPairs(PairSource):
    """Pairs to train on, and pairs to evaluate on.

    Args:
        pairs: training pairs: a file (.json, .jsonl, .csv, .tsv, each also .gz, .parquet), a data set's folder or Hub
            name, or "demo" for generated ones.
        mixture: several sources in place of pairs, each a mapping of pairs and, as they differ, split, columns,
            preference, encoding, dataset_config, dataset_revision, streaming; with weight, its share of the training
            pairs. Without weights, all pairs of all sources.
        eval_pairs: pairs to evaluate on, likewise; none to hold out a share of the training pairs. Pairs with
            is_flipped are evaluated on their true labels.
        split: split of a data set to train on, such as train_prefs or train[:1000].
        eval_split: split to evaluate on, of eval_pairs or else of pairs; none for the only one of eval_pairs named
            test, validation, eval or the like.
        limit: use only so many training pairs.
        demo_size: number of generated training pairs, for pairs "demo".
        seed: of everything that is drawn.
    """

    pairs: str = "demo"
    mixture: list[dict[str, Any]] = field(default_factory=list)
    eval_pairs: str | None = None
    eval_split: str | None = None
    demo_size: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        require_positive(self, ("demo_size",))
        if self.evaluated == "demo":
            raise ValueError(f"eval_split={self.eval_split!r} is a split of eval_pairs: give eval_pairs too")
        if self.mixture and self.pairs != "demo":
            raise ValueError(f"mixture and pairs={self.pairs!r} exclude each other: name that source in the mixture")
        if self.mixture and (self.dataset_config is not None or self.dataset_revision is not None):
            raise ValueError(
                "dataset_config and dataset_revision are of one data set: name them at a source of mixture"
            )
        super().__post_init__()
        own = [f.name for f in fields(self) if f.name in READING and getattr(self, f.name) != f.default]
        if own and self.pairs == "demo" and not self.mixture and self.evaluated is None:
            raise ValueError(
                f"{own[0]} says how pairs are read, and pairs='demo' generates them: give pairs, or no {own[0]}"
            )
        for part in self.mixture:
            source_of(self, part)

    @property
    def evaluated(self) -> str | None:
        """The source of the pairs to evaluate on; None to hold out training pairs."""
        return self.eval_pairs if self.eval_pairs is not None or self.eval_split is None else self.pairs


def source_of(config: EvaluatedPairs, part: dict[str, Any]) -> PairSource:
    """One source of the mixture of `config`, with the settings of `config` where it has none of its own.

    Raises:
        ValueError: a key or a value is not accepted.
    """
    accepted = ("pairs", "weight", "split", *READING)
    if unknown := [key for key in part if key not in accepted]:
        raise ValueError(f"a source of mixture has the key {unknown[0]!r}; accepted are {', '.join(accepted)}")
    if not isinstance(part.get("pairs"), str):
        raise ValueError(f"a source of mixture needs pairs, the name of a file or data set; got {part!r}")
    weights = [source.get("weight") for source in config.mixture]
    if any(weight is not None for weight in weights):
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                raise ValueError(f"each source of mixture needs a weight > 0, or none of them; got {weight!r}")
    own = {key: value for key, value in part.items() if key != "weight"}
    shared = {name: getattr(config, name) for name in ("split", "columns", "preference", "encoding", "streaming")}
    if "columns" in own or "preference" in own:  # the two describe one table
        shared |= {"columns": None, "preference": None}
    return PairSource(**{**shared, **own})


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
