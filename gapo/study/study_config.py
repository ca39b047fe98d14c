"""The settings of `gapo study`: one flat set of fields, from YAML and from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gapo.runs.config_bases import TrainingConfig
from gapo.study.arms import ARMS, arm_of

NOISES = ("random", "length", "judge")
TUNE_SEED = 1000  # the first seed of the tries; the study's own count from 0
_LISTS = (
    *("flip_rates", "control_flip_rates", "learning_rates", "curve_rhos", "curve_anchor_pairs", "valuation_rates"),
)


@dataclass(frozen=True, kw_only=True)
class StudyConfig(TrainingConfig):
    """The study: pairs, policy, arms (the objectives), noise, budgets.

    Args:
        eval_pairs: pairs to test on, likewise; none to hold out a share of the training pairs.
        model: the policy that every run starts from: a Hub name, a local folder, or "tiny" for a small Llama trained on
            the spot.
        train_layers: train only the last so many layers, with those below frozen and computed once; none for all
            weights.
        arms: the objectives to compare, comma separated, or "all". Any objective may stand behind "gapo+", which
            weights its pairs by the anchor gap, or behind "gapo-drop+", "margin+", "margin-drop+". One with an anchor
            has controls, such as "gapo-rho0", "gapo-gaussian", "gapo-margin", "gapo-l2", "gapo-first-order". Any, such
            as "dpo-sam", may take its update's gradient at the anchor; "dpo-sam-gaussian" is the control.
        settings: settings of an arm by its name, such as {gapo+dpo: {learning_rate: 1e-3, beta: 0.1}}, for all of its
            runs. Such an arm has no tries; what is left out has gapo's default.
        baseline: the arm to which a table gives the paired differences of the others; none for no such table.
        flip_modes: which labels are flipped, comma separated: "random"; "length" to favour longer answers; "judge" for
            those that the policy before training gets wrong, the surest first.
        flip_rates: shares of the training labels to flip. A share that a mode cannot reach is left out and named.
        control_flip_rates: shares for the controls of GAPO, fewer to save time; empty for all of flip_rates.
        control_seeds: seeds of the controls, the curves and the valuation, fewer to save time; 0 for all of them.
        seeds: number of seeds. A seed draws the training pairs, their order and the flips, the same for every arm.
        train_pairs: pairs of one training run, drawn by its seed.
        validation_pairs: clean pairs held out by prompt, on which the settings of every arm are chosen.
        test_pairs: clean pairs on which all results are measured.
        epochs: passes over the training pairs.
        batch_size: pairs in a step; they share an anchor.
        warmup_ratio: share of the steps in which the learning rate rises; a cosine follows.
        learning_rates: the coarse grid of peak learning rates that every arm tries.
        tune_flip_rate: share of the training labels flipped at random while settings are chosen.
        tune_seeds: runs of each try, on seeds that the study itself does not use.
        tune_rounds: 1 to try the grid of learning rates alone; 2 to try four values of each arm's second setting after
            it, such as beta; 3 for two more learning rates.
        rho_scale: factor on the radii that arms try or hold. They suit the tiny policy; a larger one bears less.
        transfer_pairs: a file or data set of pairs of another kind; the trained policies are tested on its first
            check_pairs pairs.
        plain_text: plain text (.txt, .txt.gz) on whose end their perplexity is measured.
        checks: evaluations during a run, evenly spread, on check_pairs test pairs; 0 for none.
        check_pairs: pairs of each such evaluation.
        validation_labels: "clean" to choose settings on the true labels of validation pairs, as nobody with noisy
            labels can; "noisy" for labels of which tune_flip_rate are flipped; "both" for the two beside each other.
        curve_rhos: radii of the figure accuracy against rho, empty for none.
        curve_anchor_pairs: pairs sharing an anchor, for the figure against them; each must divide batch_size. Empty
            for none.
        curve_flip_rate: share of the labels flipped at random in both figures.
        valuation_rates: shares of labels flipped at random at which SimPO is trained on the pairs with the lowest, the
            highest and random gaps; empty for none.
        valuation_share: share of the training pairs that are kept there.
        cache_dir: folder where warmed-up policies and their log-probabilities are kept.
        output_dir: folder of the study.
        overwrite: forget the finished runs in output_dir and start anew.
        workers: processes that train at the same time, one thread each; 0 for one per core.
        seed: of the policy and of the held-out split.
    """

    demo_size: int = 2000
    model: str = "tiny"
    train_layers: int | None = None
    arms: str = "all"
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    baseline: str | None = None
    flip_modes: str = "random,length"
    flip_rates: list[float] | tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    control_flip_rates: list[float] | tuple[float, ...] = ()
    control_seeds: int = 0
    seeds: int = 5
    train_pairs: int = 1000
    validation_pairs: int = 300
    test_pairs: int = 500
    epochs: int = 1
    batch_size: int = 32
    warmup_ratio: float = 0.1
    max_length: int = 96
    learning_rates: list[float] | tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    tune_flip_rate: float = 0.2
    tune_seeds: int = 1
    tune_rounds: int = 3
    rho_scale: float = 1.0
    transfer_pairs: str | None = None
    plain_text: str | None = None
    checks: int = 0
    check_pairs: int = 200
    validation_labels: Literal["clean", "noisy", "both"] = "clean"
    curve_rhos: list[float] | tuple[float, ...] = ()
    curve_anchor_pairs: list[int] | tuple[int, ...] = ()
    curve_flip_rate: float = 0.2
    valuation_rates: list[float] | tuple[float, ...] = ()
    valuation_share: float = 0.3
    tiny_hidden_size: int = 64
    output_dir: str = "runs/study"
    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = ("seeds", "train_pairs", "validation_pairs", "test_pairs", "epochs", "batch_size")
        for name in (*whole, "tune_seeds", "check_pairs"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")
        for name in ("workers", "control_seeds", "checks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}")
        for name in (
            "flip_rates",
            "control_flip_rates",
            "valuation_rates",
            "tune_flip_rate",
            "curve_flip_rate",
            "warmup_ratio",
        ):
            rates = getattr(self, name)
            if not all(0 <= rate <= 1 for rate in (rates if isinstance(rates, (list, tuple)) else [rates])):
                raise ValueError(f"{name} must be in [0, 1], got {rates!r}")
        if not 0 < self.valuation_share < 1:
            raise ValueError(f"valuation_share must be in (0, 1), got {self.valuation_share!r}")
        for name in ("learning_rates", "flip_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got none")
        if not 1 <= self.tune_rounds <= 3:
            raise ValueError(f"tune_rounds must be 1, 2 or 3, got {self.tune_rounds!r}")
        if not 0 < self.rho_scale < float("inf"):
            raise ValueError(f"rho_scale must be > 0 and finite, got {self.rho_scale!r}")
        if not all(rate > 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be > 0, got {self.learning_rates!r}")
        if not all(rho >= 0 for rho in self.curve_rhos):
            raise ValueError(f"curve_rhos must be >= 0, got {self.curve_rhos!r}")
        for pairs in self.curve_anchor_pairs:
            if pairs < 1 or self.batch_size % pairs:
                raise ValueError(f"curve_anchor_pairs must divide batch_size={self.batch_size}, got {pairs!r}")
        if self.train_layers is not None and self.train_layers < 1:
            raise ValueError(f"train_layers must be >= 1, or none for all weights; got {self.train_layers!r}")
        _require_among("flip_modes", self.modes, NOISES)
        self._check_arms()
        self._check_lists()

    def _check_arms(self) -> None:
        """Refuse arms that do not exist, settings that are not theirs, and those of an arm that does not run."""
        if not self.arm_names:
            raise ValueError("arms must name at least one, or be 'all'; got none")
        for name in self.arm_names:
            arm_of(name)
        for name, settings in self.settings.items():
            if name not in self.arm_names:
                raise ValueError(f"settings are of {name!r}, which is not among arms: {', '.join(self.arm_names)}")
            if not isinstance(settings, dict):
                raise ValueError(f"settings of {name!r} must be a mapping such as {{beta: 0.1}}, got {settings!r}")
            ARMS[name].given(settings)
        if self.baseline is not None:
            _require_among("baseline", [self.baseline], self.arm_names)

    def _check_lists(self) -> None:
        """Refuse a value that stands twice, which would count a run twice, and parts that lack an arm or pairs."""
        for name in _LISTS:
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must not name a value twice, got {values!r}")
        unknown = [rate for rate in self.control_flip_rates if rate not in self.flip_rates]
        if unknown and any(ARMS[name].control for name in self.arm_names):
            raise ValueError(f"control_flip_rates must be among flip_rates={self.flip_rates!r}, got {unknown!r}")
        needs = {"curve_rhos": ("gapo",), "curve_anchor_pairs": ("gapo",), "valuation_rates": ("gapo", "simpo")}
        for name, arms in needs.items():
            missing = [arm for arm in arms if arm not in self.arm_names]
            if getattr(self, name) and missing:
                raise ValueError(f"{name} needs {' and '.join(missing)} among arms, or leave {name} empty")
        if self.valuation_rates and round(self.valuation_share * self.train_pairs) < 1:
            raise ValueError(
                f"valuation_share={self.valuation_share} of train_pairs={self.train_pairs} is no pair: raise it"
            )
        if self.curve_anchor_pairs and self.batch_size > self.train_pairs:
            raise ValueError(
                f"curve_anchor_pairs needs whole batches: batch_size={self.batch_size} must be <= train_pairs="
                f"{self.train_pairs}"
            )
        if self.seeds > TUNE_SEED:
            raise ValueError(f"seeds must be <= {TUNE_SEED}, where those of the tries begin; got {self.seeds}")

    @property
    def modes(self) -> list[str]:
        """The flip modes, one by one."""
        return list(dict.fromkeys(_words(self.flip_modes)))

    @property
    def arm_names(self) -> list[str]:
        """The arms, one by one, in the order of the registry for "all"."""
        return list(ARMS) if self.arms == "all" else list(dict.fromkeys(_words(self.arms)))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _require_among(name: str, words: Sequence[str], accepted: Sequence[str]) -> None:
    unknown = [word for word in words if word not in accepted]
    if unknown or not words:
        raise ValueError(f"{name} must be among {', '.join(accepted)}, got {', '.join(map(repr, unknown)) or 'none'}")


def as_dict(config: StudyConfig) -> dict[str, Any]:
    """Every field, lists as lists."""
    return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
