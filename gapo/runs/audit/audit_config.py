"""The settings of `gapo audit`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gapo._fields import choice, choices_of
from gapo.config import GAPOConfig
from gapo.objectives import OBJECTIVES, resolve
from gapo.runs.config_bases import PairSource, TinyPolicy, require_not_negative, require_positive
from gapo.runs.errors import require_seed
from gapo.runs.output.tables import ENDINGS, require_ending

TABLES = (*ENDINGS, ".csv")


@dataclass(frozen=True, kw_only=True)
class AuditConfig(TinyPolicy, PairSource):
    """Which pairs are audited, by which policies, and what is written.

    Args:
        pairs: a file (.json, .jsonl, .csv, .tsv, each also .gz, .parquet), a data set's folder or Hub name, or "demo"
            for generated ones.
        output: table to write, most suspicious pair first: .jsonl, .jsonl.gz, .csv or .parquet. The page, the settings
            and the folder of measurements lie beside it, named after it.
        model: "tiny" for a small Llama that is warmed up on the texts of the pairs; or the folder or Hub name of a
            causal language model, whose last layers are tuned.
        tokenizer: another tokenizer than the model's: a Hub name or folder.
        train_layers: last layers to tune; none for all of "tiny" and the last two of another model. What the layers
            below say of each pair is computed once.
        objective: what the policies are tuned with, a name of `gapo.objectives.OBJECTIVES`.
        objective_settings: settings of the objective and of its step, such as {beta: 0.1}.
        learning_rate: peak learning rate; none for what suits the model.
        epochs: passes over the training pairs of each policy.
        batch_size: pairs in a step.
        warmup_ratio: share of the steps in which the learning rate rises; a cosine follows.
        folds: parts that the pairs are divided into by prompt; a policy trains on all but one, and judges that one.
        seeds: how often the pairs are divided anew; each pair is judged by as many policies.
        rho: radius of the anchor at which a trained policy's gaps are measured.
        limit: audit only so many pairs.
        demo_size: number of generated pairs, for pairs "demo".
        seed: of everything that is drawn.
        strict: stop at the first bad row instead of leaving it out.
        workers: processes that train at the same time, one thread each; 0 for one per core.
        overwrite: forget the measurements beside the output and start anew.
        drop: share of the pairs, the most suspicious, to leave out of the cleaned pairs; "auto" for the share of labels
            that the audit takes to be wrong.
        flip: share of the pairs, the most suspicious, whose answers are swapped in the cleaned pairs. With drop too,
            pairs are flipped first, and the next ones are dropped until the share of both is that of drop.
        threshold: least probability of a wrong label at which a pair is touched; without drop and flip, all such pairs
            are dropped.
        apply: marks.json that the page has saved. Pairs marked right stay as they are; those marked wrong are
            treated as `marked` says.
        marked: what happens to pairs marked wrong: "flip", "drop" or "leave".
        clean_output: file of the cleaned pairs, in their own order, with all columns: .jsonl, .jsonl.gz or .parquet.

    Raises:
        ValueError: a value is out of its range, or options contradict each other.
    """

    output: str = "runs/audit/audit.jsonl"
    model: str = "tiny"
    tokenizer: str | None = None
    train_layers: int | None = None
    objective: str = "sigmoid_loss"
    objective_settings: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    epochs: int = 3
    batch_size: int = 16
    warmup_ratio: float = 0.1
    folds: int = 5
    seeds: int = 3
    rho: float = 0.25
    demo_size: int = 2000
    seed: int = 0
    strict: bool = False
    max_length: int = 512
    tiny_hidden_size: int = 64
    tiny_vocab: int = 2048
    tiny_answer_steps: int = 1000
    workers: int = 0
    overwrite: bool = False
    drop: float | str | None = None
    flip: float | None = None
    threshold: float | None = None
    apply: str | None = None
    marked: str = choice("flip", "drop", "leave")
    clean_output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seed("seed", self.seed)
        require_positive(self, ("epochs", "batch_size", "seeds", "demo_size", "rho"))
        require_not_negative(self, ("workers", "warmup_ratio"))
        if self.learning_rate is not None:
            require_positive(self, ("learning_rate",))
        if self.tokenizer is not None and self.model == "tiny":
            raise ValueError("tokenizer is for a model of your own, and model 'tiny' makes its own: give model too")
        if self.train_layers is not None:
            require_positive(self, ("train_layers",))
        if self.folds < 2:
            raise ValueError(f"folds must be >= 2, so that a policy can train on other pairs; got {self.folds}")
        if self.warmup_ratio > 1:
            raise ValueError(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio!r}")
        if not self.output.endswith(TABLES):
            raise ValueError(f"output must end in {', '.join(TABLES)}, got {self.output!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        try:
            resolve(self.objective, *self.step_settings())
        except (TypeError, ValueError) as error:
            raise ValueError(f"objective_settings: {error}") from error
        self._check_cleaning()

    def step_settings(self) -> tuple[GAPOConfig, dict[str, Any]]:
        """`objective_settings` and `rho` as the step takes them: those of `GAPOConfig`, and the objective's own."""
        objective = OBJECTIVES[self.objective]
        of_step = {name for name, field in objective.step_settings.items() if name == field}
        own = {name: x for name, x in self.objective_settings.items() if name in objective.defaults.keys() - of_step}
        rest = {name: x for name, x in self.objective_settings.items() if name not in own}
        return GAPOConfig(**{"rho": self.rho, **rest}), own

    def _check_cleaning(self) -> None:
        for name in ("drop", "flip", "threshold"):
            value, other = getattr(self, name), " or 'auto'" if name == "drop" else ""
            is_number = not isinstance(value, (bool, str))
            if value is not None and not (is_number and 0 <= value <= 1) and not (other and value == "auto"):
                raise ValueError(f"{name} must be in [0, 1]{other}, got {value!r}")
        if not isinstance(self.drop, str) and self.drop is not None and self.flip is not None and self.drop < self.flip:
            raise ValueError(
                f"drop is the share of pairs that are flipped or dropped, and must be >= flip; got drop={self.drop!r} "
                f"and flip={self.flip!r}"
            )
        if self.marked not in (ways := choices_of(AuditConfig)["marked"]):
            raise ValueError(f"marked must be one of {', '.join(ways)}, got {self.marked!r}")
        if self.cleans and self.clean_output is None:
            raise ValueError("drop, flip, threshold and apply need clean_output, the file of the cleaned pairs")
        if self.clean_output is not None:
            if not self.cleans:
                raise ValueError("clean_output needs drop, flip, threshold or apply: what is to be cleaned")
            require_ending("clean_output", self.clean_output)
        named = {name: getattr(self, name) for name in ("pairs", "output", "clean_output", "apply")}
        paths = [Path(value).resolve() for value in named.values() if value is not None]
        if len(set(paths)) < len(paths):
            shown = ", ".join(f"{name}={value!r}" for name, value in named.items() if value is not None)
            raise ValueError(f"these must be different files: {shown}")

    @property
    def cleans(self) -> bool:
        """Whether cleaned pairs are asked for."""
        return any(value is not None for value in (self.drop, self.flip, self.threshold, self.apply))

    def measured(self) -> dict[str, Any]:
        """The settings that a measurement depends on, besides the pairs and the seeds beyond its own."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


# Settings that no measurement of a policy depends on, or whose content is compared in place of their name.
_FREE = {
    *("pairs", "split", "columns", "preference", "encoding", "dataset_config", "dataset_revision", "streaming"),
    *("limit", "demo_size", "strict", "output", "seeds", "workers", "overwrite", "cache_dir"),
    *("drop", "flip", "threshold", "apply", "marked", "clean_output"),
}
