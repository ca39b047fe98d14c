"""One run of a study: a policy trained on noisy pairs with one objective, and its measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import gapo
from gapo.data import flip_pairs
from gapo.data.flip import swapped
from gapo.data.streams import stream
from gapo.objectives import OBJECTIVES, Objective
from gapo.runs.policy.aside import drift, perplexity
from gapo.runs.policy.fit import bucketed, fit
from gapo.runs.policy.pair_batches import Batch, length, pair_logps
from gapo.study.arms import ARMS
from gapo.study.cells import Cell
from gapo.study.material import Material
from gapo.study.study_config import StudyConfig
from gapo.study.weight_log import WeightLog

_TRUE_LABELS = 250  # training pairs on whose true labels the trained policy is judged
_DRIFT = 64  # test pairs on which the divergence from the policy at the start is measured


@dataclass(frozen=True)
class Draw:
    """What a seed draws, the same for every arm: training pairs, their flips, and the batches in their order.

    Attributes:
        rows: (n,) indices into the pool.
        is_flipped: (n,) bool.
        order: for each step the indices among the n, in the order of training.
        seed: what drew them, and draws the gaussian directions.
    """

    rows: np.ndarray
    is_flipped: np.ndarray
    order: list[np.ndarray]
    seed: int


def draw(material: Material, config: StudyConfig, mode: str, rate: float, seed: int) -> Draw:
    """Training pairs, flips and order of `seed`. The pairs do not depend on mode and rate.

    Raises:
        ValueError: more flips are asked for than the mode can give.
    """
    rng = np.random.default_rng([seed, 1])
    rows = rng.permutation(len(material.split.pool))[: config.train_pairs]
    if mode == "judge":
        is_flipped = _judged_wrong(-np.subtract(*material.start["pool"][rows].T), rate)
    else:
        noisy = flip_pairs([material.split.pool[i] for i in rows], mode=mode, rate=rate, seed=seed)
        is_flipped = np.array([row["is_flipped"] for row in noisy])
    lengths = np.array([length(material.tokens["pool"][i]) for i in rows])
    order = [batch for _ in range(config.epochs) for batch in bucketed(lengths, config.batch_size, rng)]
    return Draw(rows, is_flipped, order, seed)


def _judged_wrong(doubt: np.ndarray, rate: float) -> np.ndarray:
    """(n,) bool: the share `rate` of the pairs with the largest `doubt`, which is above 0 where the judge is wrong.

    Raises:
        ValueError: the judge is wrong on fewer pairs.
    """
    count, wrong = round(rate * len(doubt)), int((doubt > 0).sum())
    if count > wrong:
        raise ValueError(
            f"rate={rate} asks for {count} flips, but the policy before training gets only {wrong} of {len(doubt)} "
            f"pairs wrong: the greatest rate here is {wrong / len(doubt):.4g}"
        )
    is_flipped = np.zeros(len(doubt), dtype=bool)
    is_flipped[np.argsort(-doubt, kind="stable")[:count]] = True
    return is_flipped


def train(
    material: Material,
    config: StudyConfig,
    arm: str,
    settings: Mapping[str, Any],
    drawn: Draw,
    anchor_pairs: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> WeightLog:
    """Train the policy from its first weights; `material.model` is the trained one afterwards.

    Args:
        material: the policy and the pairs.
        config: epochs, batch size, schedule.
        arm: name of the arm.
        settings: the learning rate, and settings of the objective.
        drawn: pairs, flips and order.
        anchor_pairs: pairs that share an anchor; 0 for the whole batch. A batch is then several micro-batches.
        after_step: called with the number of the step, from 1.
    """
    objective, step = step_of(arm, settings)
    tokens = [
        swapped(material.tokens["pool"][row]) if swap else material.tokens["pool"][row]
        for row, swap in zip(drawn.rows, drawn.is_flipped, strict=True)
    ]
    log = WeightLog(drawn.is_flipped)

    def note(share: float, batch: Batch, result: Any) -> None:
        # How hard the objective pulls at what it compares: at a margin per token, or at a log-ratio of sums.
        weights = result.weights if objective.average else result.weights / batch["rejected_lengths"]
        gaps = None if result.anchor_gaps is None else result.anchor_gaps.numpy()
        log.add(share, batch["index"], result.margins.numpy(), weights.numpy(), gaps)

    fit(
        material,
        tokens,
        drawn.order,
        step,
        learning_rate=settings["learning_rate"],
        warmup_ratio=config.warmup_ratio,
        anchor_pairs=anchor_pairs,
        seed=drawn.seed,
        on_batch=note,
        after_step=after_step,
    )
    return log


def step_of(arm: str, settings: Mapping[str, Any]) -> tuple[Objective, Callable[..., Any]]:
    """The objective of an arm and its training step."""
    objective = OBJECTIVES[ARMS[arm].objective]
    config, own = ARMS[arm].divided(settings)
    return objective, gapo.value_and_grad(pair_logps, config, objective, backend="torch", objective_settings=own)


def evaluate(material: Material, tokens: list[dict[str, Any]]) -> dict[str, float]:
    """Reward accuracy, mean margin and mean log-probabilities of `tokens` under the model now, nats per token.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    return rewards(finite(material.logps(tokens)))


def finite(logps: np.ndarray) -> np.ndarray:
    """`logps`. Raises FloatingPointError where one of them is not finite."""
    if not np.isfinite(logps).all():
        raise FloatingPointError("log-probabilities after the training are not finite")
    return logps


def rewards(logps: np.ndarray) -> dict[str, float]:
    """The same from (n, 2) log-probabilities per token."""
    chosen, rejected = logps.T
    return {
        "accuracy": float((chosen > rejected).mean()),
        "margin": float((chosen - rejected).mean()),
        "chosen_logp": float(chosen.mean()),
        "rejected_logp": float(rejected.mean()),
    }


def before(material: Material, part: str) -> dict[str, float]:
    """`evaluate` of the policy before any training, from its cached log-probabilities."""
    return rewards(material.start[part])


def measure(material: Material, config: StudyConfig, cell: Cell) -> dict[str, Any]:
    """Run one cell: its record, or {"failed": why} where log-probabilities stop being finite."""
    try:
        return _value(material, config, cell) if cell.valuation else _measure(material, config, cell)
    except FloatingPointError as error:
        return {"failed": str(error)}


def _measure(material: Material, config: StudyConfig, cell: Cell) -> dict[str, Any]:
    drawn = draw(material, config, cell.mode, cell.rate, cell.seed)
    is_test = cell.judged_on == "test"
    course = Course(material, config, len(drawn.order)) if is_test and config.checks else None
    began = time.process_time()  # of one thread: what else runs on the machine hardly counts
    log = train(
        material, config, cell.arm, dict(cell.settings), drawn, cell.anchor_pairs, course.check if course else None
    )
    seconds = time.process_time() - began - (course.seconds if course else 0.0)
    judged = finite(material.logps(material.tokens[cell.judged_on]))
    record = {
        "steps": len(drawn.order),
        "flipped": int(drawn.is_flipped.sum()),
        "cpu_seconds": round(seconds, 3),
        "evaluation": rewards(judged),
        **log.summary(),
    }
    if not is_test:
        return {**record, "noisy_accuracy": _noisy_accuracy(judged, config)}
    truth = finite(material.logps([material.tokens["pool"][i] for i in drawn.rows[:_TRUE_LABELS]]))
    record["train_true"] = rewards(truth)
    is_flipped = drawn.is_flipped[:_TRUE_LABELS]
    is_right = truth[:, 0] > truth[:, 1]
    if is_flipped.any() and not is_flipped.all():
        fitted = (~is_right[is_flipped], is_right[~is_flipped])  # as they are labelled
        record["fitted"] = {name: float(x.mean()) for name, x in zip(("flipped", "clean"), fitted, strict=True)}
    record["drift"] = drift(material, material.tokens["test"][:_DRIFT])
    if "transfer" in material.tokens:
        record["transfer"] = evaluate(material, material.tokens["transfer"])
    if material.text:
        record["perplexity"] = perplexity(material, material.text)
    if course:
        record["course"] = course.points
    return record


def _noisy_accuracy(logps: np.ndarray, config: StudyConfig) -> float:
    """Accuracy on validation pairs whose labels are flipped as those of the tries are: what a user could measure."""
    is_flipped = np.zeros(len(logps), dtype=bool)
    is_flipped[: round(config.tune_flip_rate * len(logps))] = True
    is_flipped = stream(config.seed, "study validation labels").permutation(is_flipped)
    return float(((logps[:, 0] > logps[:, 1]) != is_flipped).mean())


class Course:
    """Reward accuracy on test pairs during a run.

    Attributes:
        points: "step" and "accuracy" of each check.
        seconds: of the processor, that the checks took.
    """

    def __init__(self, material: Material, config: StudyConfig, steps: int) -> None:
        self._material, self._tokens = material, material.tokens["test"][: config.check_pairs]
        self._steps = {round(steps * (i + 1) / config.checks) for i in range(config.checks)}
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0

    def check(self, step: int) -> None:
        """Evaluate, if it is time to."""
        if step in self._steps:
            began = time.process_time()
            self.points.append({"step": step, "accuracy": evaluate(self._material, self._tokens)["accuracy"]})
            self.seconds += time.process_time() - began


def _value(material: Material, config: StudyConfig, cell: Cell) -> dict[str, Any]:
    """Data valuation: SimPO on the pairs with the lowest, the highest and random anchor gaps of this cell's run."""
    drawn = draw(material, config, cell.mode, cell.rate, cell.seed)
    gaps = train(material, config, cell.arm, dict(cell.settings), drawn).last("gap")
    seen = np.flatnonzero(np.isfinite(gaps))
    ranked = seen[np.argsort(gaps[seen], kind="stable")]
    count = round(config.valuation_share * len(ranked))
    shuffled = np.random.default_rng([cell.seed, 2]).permutation(seen)
    parts = {"lowest": ranked[:count], "random": shuffled[:count], "highest": ranked[-count:]}
    record: dict[str, Any] = {"pairs": count}
    for name, rows in parts.items():
        rng = np.random.default_rng([cell.seed, 3])
        lengths = np.array([length(material.tokens["pool"][i]) for i in drawn.rows[rows]])
        order = [rows[batch] for _ in range(config.epochs) for batch in bucketed(lengths, config.batch_size, rng)]
        train(material, config, "simpo", dict(cell.valuation), replace(drawn, order=order))
        record[name] = {
            **evaluate(material, material.tokens[cell.judged_on]),
            "flipped_share": float(drawn.is_flipped[rows].mean()),
        }
    return record
