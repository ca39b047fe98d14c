"""Which score finds wrong labels, how well the audit's probabilities are calibrated, and whether cleaning helps.

The labels of the pairs are taken as true, and known shares of them are flipped. Policies are those of `gapo audit`.
What they say is kept, one file for each policy, so that the command may be stopped, and goes on.

    python benchmarks/audit.py TRAIN --tiny_text TEXT --noise random:0.05 random:0.2 length:0.2 --seeds 2
    python benchmarks/audit.py TRAIN --tiny_text TEXT --noise random:0.2 --draws 5 --test TEST --runs 2

cleanlab (AGPL-3.0) is used where it is installed, as a baseline, and named where it is not; gapo does not need it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import commit, progress, write_picture

from gapo.data import flip_pairs, read_pairs
from gapo.data.flip import swapped, true_labels
from gapo.data.streams import stream
from gapo.runs import held_out
from gapo.runs.audit.audit_config import AuditConfig
from gapo.runs.audit.combination import Finding, Scores, combine
from gapo.runs.audit.folds import prompt_groups
from gapo.runs.audit.judging import Judges, Member
from gapo.runs.audit.noise_model import fit as fit_noise
from gapo.runs.audit.noise_model import unit_size
from gapo.runs.output.noise import FIFTHS, auroc
from gapo.runs.output.tensors import Arrays, kept_arrays
from gapo.runs.policy.fit import bucketed, fit
from gapo.runs.policy.pair_batches import length
from gapo.runs.versions import versions
from gapo.runs.workers import one_thread
from gapo.study.arms import arm_of
from gapo.study.cell_run import step_of
from gapo.study.statistics import Interval, bootstrap

Row = dict[str, Any]
AS_THEY_ARE = "all pairs as they are"


@dataclass(frozen=True)
class Cell:
    """One kind of noise: flips of `mode` at `rate`, drawn by `draw`."""

    mode: str
    rate: float
    draw: int

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.rate:g}-{self.draw}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("pairs", help="pairs whose labels are taken as true: any file that gapo reads")
    parser.add_argument("--limit", type=int, default=2000, help="pairs that are drawn from them")
    parser.add_argument("--drawn_by", type=int, default=0, help="seed of that draw")
    parser.add_argument("--noise", nargs="+", default=["random:0.2"], help="MODE:RATE, each a row of the tables")
    parser.add_argument("--draws", type=int, default=1, help="draws of the flips")
    parser.add_argument("--first_draw", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--seeds", type=int, default=2, help="divisions into folds, as in gapo audit")
    parser.add_argument("--folds", type=int, default=AuditConfig.folds)
    parser.add_argument("--epochs", type=int, default=AuditConfig.epochs)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--train_layers", type=int)
    parser.add_argument("--objective", default=AuditConfig.objective)
    parser.add_argument("--objective_settings", type=json.loads, default={}, help="as JSON")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--tiny_text", help="plain text to warm the tiny policy up on")
    parser.add_argument("--tiny_text_steps", type=int, default=500)
    parser.add_argument("--cache_dir", default="runs/cache")
    parser.add_argument("--folder", type=Path, default=Path("runs/audit-benchmark"))
    parser.add_argument(
        "--in_sample", action="store_true", help="ask each policy about the pairs that it trained on, too"
    )
    parser.add_argument("--ceiling", action="store_true", help="also policies trained on the true labels, as a ceiling")
    parser.add_argument("--test", help="clean pairs: then also train on cleaned pairs, and test on these")
    parser.add_argument("--oracle", action="store_true", help="also train with a fifth of the labels or all set right")
    parser.add_argument("--runs", type=int, default=5, help="training runs for each way of cleaning")
    parser.add_argument(
        "--train",
        type=json.loads,
        default={"dpo": {"beta": 0.03, "learning_rate": 2e-3}},
        help="as JSON, arms of a study with their settings: the first trains on cleaned pairs too, others on all pairs",
    )
    parser.add_argument("--plot", type=Path, help="SVG file for a picture of their differences")
    parser.add_argument("--train_epochs", type=int, default=2, help="of those runs")
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> AuditConfig:
    names = ("seeds", "folds", "epochs", "model", "train_layers", "objective", "objective_settings", "learning_rate")
    names += ("tiny_text", "tiny_text_steps", "cache_dir")
    return AuditConfig(pairs=options.pairs, **{name: getattr(options, name) for name in names})


def measured(config: AuditConfig, rows: list[Row], folder: Path, watched: bool) -> tuple[dict[Member, Arrays], Judges]:
    """What each policy says of its fold, and if it is watched of the pairs that it trained on; kept in `folder`."""
    judges = Judges(config, rows)
    digest = f"{held_out.fingerprint(rows)} {json.dumps(config.measured(), sort_keys=True)}"
    parts = {}
    for member in (Member(seed, fold) for seed in range(config.seeds) for fold in range(config.folds)):
        path = folder / f"{member.name}.safetensors"
        if not path.exists():
            progress(f"{folder.name}: {member.name}")
        others = "what other pairs or settings gave: give another folder"
        parts[member] = kept_arrays(path, digest, lambda member=member: judges.measure(member, watched), others=others)
    return parts, judges


def in_sample(parts: dict[Member, Arrays], n: int) -> dict[str, np.ndarray]:
    """How suspicious a pair is to the policies that trained on it: means over them."""
    seen, columns = np.zeros(n), {name: np.zeros(n) for name in ("first epoch", "last epoch", "area", "forgetting")}
    for arrays in parts.values():
        rows, logps = arrays["trained"], arrays["trained_logps"]
        margins = logps[..., 0] - logps[..., 1]
        right = margins > 0
        # Times that a label was lost again; one that was never fitted counts as lost at every epoch.
        forgotten = np.where(right.any(0), (right[:-1] & ~right[1:]).sum(0), len(right))
        values = {"first epoch": -margins[0], "last epoch": -margins[-1], "area": -margins.mean(0)}
        for name, value in {**values, "forgetting": forgotten}.items():
            columns[name][rows] += value
        seen[rows] += 1
    return {f"{name}, in sample": values / seen for name, values in columns.items()}


def suspicions(
    parts: dict[Member, Arrays], judges: Judges, groups: np.ndarray
) -> tuple[dict[str, np.ndarray], Finding]:
    """Every score (n,), higher where a label looks wrong; and the finding of the audit."""
    scores = Scores.of(parts, judges.start, judges.counts)
    one = Scores.of({m: x for m, x in parts.items() if m.seed == 0}, judges.start, judges.counts)
    finding = combine(scores.features(), groups, 0)
    last = scores.margins[:, -1].mean(0)
    values = {
        "margin before training": -scores.start,
        "margin, first epoch": -scores.margins[:, 0].mean(0),
        "margin, last epoch": -last,
        "margin, mean over epochs (area)": -scores.margin,
        "the same, one seed": -one.margin,
        "last margin minus margin before (z)": scores.start - last,
        "reward (orders as DPO's loss)": -scores.rewards[:, -1].mean(0),
        "gap at an anchor of training pairs": scores.gaps.mean(0),
        **(in_sample(parts, len(groups)) if all("trained" in arrays for arrays in parts.values()) else {}),
        "audit (combination)": finding.p_wrong,
        "audit, one seed": combine(one.features(), groups, 0).p_wrong,
        "audit without the gap": fit_noise(scores.features()[:, :3], groups).p_wrong(scores.features()[:, :3]),
        "audit, cross-fitted": cross_fitted(scores.features(), groups),
    }
    return {**values, **confident_learning(scores)}, finding


def cross_fitted(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """`p_wrong` of models that were not fitted to the pair's prompt."""
    parts = stream(0, "audit benchmark").permutation(5)[groups % 5]
    out = np.empty(len(x))
    for part in range(5):
        out[parts == part] = fit_noise(
            x[parts != part], np.unique(groups[parts != part], return_inverse=True)[1]
        ).p_wrong(x[parts == part])
    return out


def confident_learning(scores: Scores) -> dict[str, np.ndarray]:
    """cleanlab's label quality from out-of-fold probabilities: a logistic of the margin, fitted to the labels.

    A pair becomes two-class: which of its answers, in an order that says nothing, is the better one.
    """
    try:
        from cleanlab.rank import get_label_quality_scores
    except ModuleNotFoundError as error:
        progress(f"left out cleanlab's scores: {error.name} is not installed")
        return {}
    x = unit_size(scores.margin[:, None])
    right = 1 / (1 + np.exp(-x[:, 0] * fit_noise(x).coefficients[0, 0]))
    labels = stream(0, "audit benchmark order").integers(2, size=len(right))
    probabilities = np.stack([np.where(labels == 0, right, 1 - right), np.where(labels == 1, right, 1 - right)], 1)
    kinds = ("self_confidence", "normalized_margin")
    return {
        f"cleanlab, {kind}": 1 - get_label_quality_scores(labels, probabilities, method=kind, adjust_pred_probs=True)
        for kind in kinds
    }


def cleanlab_share(scores: Scores) -> float | None:
    """cleanlab's estimate of the share of wrong labels, from the same probabilities."""
    try:
        from cleanlab.count import num_label_issues
    except ModuleNotFoundError:
        return None
    x = unit_size(scores.margin[:, None])
    right = 1 / (1 + np.exp(-x[:, 0] * fit_noise(x).coefficients[0, 0]))
    labels = stream(0, "audit benchmark order").integers(2, size=len(right))
    probabilities = np.stack([np.where(labels == 0, right, 1 - right), np.where(labels == 1, right, 1 - right)], 1)
    return float(num_label_issues(labels, probabilities)) / len(labels)


def quality(p_wrong: np.ndarray, is_flipped: np.ndarray) -> tuple[float, float]:
    """(Brier score, expected calibration error over ten bins of equally many pairs)."""
    order = np.argsort(p_wrong, kind="stable")
    gaps = [abs(p_wrong[x].mean() - is_flipped[x].mean()) * len(x) for x in np.array_split(order, 10)]
    return float(np.mean((p_wrong - is_flipped) ** 2)), sum(gaps) / len(order)


def precision(suspicion: np.ndarray, is_flipped: np.ndarray, count: int) -> float:
    """Share of flipped pairs among the `count` most suspicious."""
    return float(is_flipped[np.argsort(-suspicion, kind="stable")[:count]].mean())


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(x) + " |" for x in [header, ["---"] * len(header), *lines])


def report(found: dict[Cell, tuple[dict[str, np.ndarray], Finding, np.ndarray, float | None]]) -> None:
    """Print the tables: one of scores (AUROC), and one of the audit."""
    kinds = list(dict.fromkeys((cell.mode, cell.rate) for cell in found))
    columns = {kind: [x for cell, x in found.items() if (cell.mode, cell.rate) == kind] for kind in kinds}
    with_flips = {kind: x for kind, x in columns.items() if kind[1] > 0}
    if with_flips:
        lines = []
        for name in dict.fromkeys(name for scores, *_ in found.values() for name in scores):
            values = [
                [auroc(scores[name], flips) for scores, _, flips, _ in x if name in scores] for x in with_flips.values()
            ]
            lines.append([name, *(spread(v) if v else "" for v in values)])
        print("\nAUROC of flipped labels\n")
        print(markdown(["score", *(f"{mode} {100 * rate:g} %" for mode, rate in with_flips)], lines))
    lines = []
    for (mode, rate), cells in columns.items():
        lows, highs = zip(*(finding.model.share_interval() for _, finding, _, _ in cells), strict=True)
        row = [
            f"{mode} {100 * rate:g} %",
            spread([finding.accuracy for _, finding, _, _ in cells]),
            spread([finding.model.share for _, finding, _, _ in cells]),
            f"{np.mean(lows):.3f} to {np.mean(highs):.3f}",
            f"{sum(a <= x[2].mean() <= b for a, b, x in zip(lows, highs, cells, strict=True))} of {len(cells)}",
            spread([finding.model.lapses for _, finding, _, _ in cells]),
            "" if cells[0][3] is None else spread([float(x[3] or 0) for x in cells]),
        ]
        for measure in (
            lambda p, f: precision(p, f, max(1, len(f) // FIFTHS)),
            lambda p, f: precision(p, f, max(1, int(f.sum()))),
            lambda p, f: quality(p, f)[0],
            lambda p, f: quality(p, f)[1],
        ):
            row.append(spread([measure(finding.p_wrong, flips) for _, finding, flips, _ in cells]))
        lines.append(row)
    print("\nThe audit\n")
    header = ["flips", "held-out accuracy", "share", "its interval", "holds the truth", "lapses", "share by cleanlab"]
    header += ["flipped in the top fifth", "among as many as are flipped", "Brier", "ECE"]
    print(markdown(header, lines))


def spread(values: list[float]) -> str:
    """A mean, with its 95 % interval over several draws."""
    mean, low, high, n = bootstrap(np.array(values))
    return f"{mean:.3f}" if n == 1 else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def ways(finding: Finding, is_flipped: np.ndarray, oracle: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each way of cleaning the pairs that stay, and which of them are turned over."""
    n = len(is_flipped)
    order = np.argsort(-finding.p_wrong, kind="stable")
    count = round(finding.model.share * n)
    top = np.zeros(n, dtype=bool)
    top[order[:count]] = True
    none, every = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
    cleaned = {
        AS_THEY_ARE: (every, none),
        "the most suspicious dropped, as many as the share": (~top, none),
        "flipped where p_wrong > 1/2": (every, finding.p_wrong > 0.5),
    }
    if not oracle:
        return cleaned
    fifth = n // FIFTHS  # what a person looks at, who is never wrong
    by_chance = stream(0, "audit benchmark review").permutation(n)[:fifth]
    return {
        **cleaned,
        "the most suspicious fifth set right": (every, is_flipped & np.isin(np.arange(n), order[:fifth])),
        "a fifth drawn by chance set right": (every, is_flipped & np.isin(np.arange(n), by_chance)),
        "wrong labels flipped (oracle)": (every, is_flipped),
    }


def cleaning(
    options: argparse.Namespace, rows: list[Row], finding: Finding, folder: Path, judges: Judges
) -> dict[str, dict[str, float]]:
    """Accuracies on clean test pairs, and the mean of a run's, of training on the pairs cleaned and as they are.

    A run has the same first weights and, as far as the same pairs stay, the same order in all ways.
    """
    flipped = np.array([row["is_flipped"] for row in rows])
    test = list(true_labels(read_pairs(options.test).rows))
    policy = judges.policy
    tokens, held = policy.tokenized(rows, 512), policy.tokenized(test, 512)
    policy.prepare({"pairs": tokens, "test": held})
    lengths = np.array([length(row) for row in tokens])
    cleaned = ways(finding, flipped, options.oracle)
    (first, *others), every = options.train, cleaned[AS_THEY_ARE]
    trainings = [(first, way, *sides) for way, sides in cleaned.items()]
    trainings += [(name, AS_THEY_ARE, *every) for name in others]

    def accuracy(mine: list[Row], used: np.ndarray, step: Any, rate: float, run: int) -> Arrays:
        rng = stream(run, "audit benchmark training")
        order = [used[b] for _ in range(options.train_epochs) for b in bucketed(lengths[used], 16, rng)]
        fit(policy, mine, order, step, learning_rate=rate)
        logps = policy.logps(held)
        return {"accuracy": np.array([(logps[:, 0] > logps[:, 1]).mean()])}

    results = {}
    for name, way, stays, over in trainings:
        settings = arm_of(name).given(options.train[name])
        _, step = step_of(name, settings)
        used = np.flatnonzero(stays)
        mine = [swapped(row) if over[i] else row for i, row in enumerate(tokens)]
        digest = f"{held_out.fingerprint([rows[i] for i in used])} {over.sum()} {settings} {options.train_epochs}"
        accuracies = []
        for run in range(options.runs):
            path = folder / "cleaning" / f"{name}, {way.replace('/', ' of ')} {run}.safetensors"
            if not path.exists():
                progress(f"{name}, {way}, run {run}")
            compute = partial(accuracy, mine, used, step, settings["learning_rate"], run)
            kept = kept_arrays(path, digest, compute, others="what other pairs or settings gave: give another folder")
            accuracies.append(float(kept["accuracy"][0]))
        results[f"{name}, {way}"] = {
            "pairs": stays.sum(),
            "wrong": (flipped != over)[stays].mean(),
            "accuracy": float(np.mean(accuracies)),
        }
    return results


def report_cleaning(trained: dict[Cell, dict[str, dict[str, float]]], runs: int, plot: Path | None) -> None:
    """Print a table for each kind of noise: means over the draws of the flips, of the means over their runs.

    The differences of the last one are drawn, if they are asked for.
    """
    for kind in dict.fromkeys((cell.mode, cell.rate) for cell in trained):
        draws = [x for cell, x in trained.items() if (cell.mode, cell.rate) == kind]
        lines, differences = [], {}
        for way in draws[0]:
            columns = {name: np.array([x[way][name] for x in draws]) for name in draws[0][way]}
            difference = bootstrap(columns["accuracy"] - [next(iter(x.values()))["accuracy"] for x in draws])
            differences[way] = difference
            paired = f"{100 * difference.mean:+.1f}"
            if len(draws) > 1:
                paired += f" ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
            line = [f"{columns['pairs'].mean():.0f}", f"{100 * columns['wrong'].mean():.1f} %"]
            lines.append([way, *line, f"{100 * columns['accuracy'].mean():.1f}", "" if not lines else paired])
        print(f"\nTraining under {kind[0]} flips, {100 * kind[1]:g} %: {len(draws)} draws, {runs} runs each\n")
        print(markdown(["training", "pairs", "wrong labels", "accuracy, %", "minus the first, paired (95 %)"], lines))
        if plot is not None:
            draw_cleaning(differences, plot)


def draw_cleaning(differences: dict[str, Interval], path: Path) -> None:
    """Draw how much better each training is than the first one, with intervals, as an SVG."""
    from gapo.runs.output import plots

    first, *others = differences

    def draw(axes: Any) -> None:
        ordered = sorted(others, key=lambda way: differences[way].mean)
        means = 100 * np.array([differences[way].mean for way in ordered])
        ends = 100 * np.array([[differences[way].low, differences[way].high] for way in ordered])
        for kind, color in (("on all pairs", plots.BLUE), ("on cleaned pairs", plots.ORANGE)):
            mine = np.array([way.endswith(AS_THEY_ARE) == (kind == "on all pairs") for way in ordered])
            if not mine.any():
                continue
            places = np.flatnonzero(mine)
            spread = np.abs(ends[mine].T - means[mine])
            axes.errorbar(means[mine], places, xerr=spread, fmt="o", color=color, capsize=3, label=kind)
        axes.axvline(0, color="grey", linewidth=0.8, linestyle="dotted")
        names = [way.removesuffix(f", {AS_THEY_ARE}").replace(", as many as the share", "") for way in ordered]
        axes.set_yticks(range(len(ordered)), names)

    title = f"Accuracy on clean pairs, less that of {first}"
    write_picture(path, plots.figure(title, "percentage points, 95 % intervals", "", draw, height=4.2))


def main() -> None:
    options = arguments()
    one_thread()
    config = config_of(options)
    every = list(true_labels(read_pairs(options.pairs).rows))
    drawn = np.random.default_rng(options.drawn_by).permutation(len(every))[: options.limit]
    rows = [dict(every[i]) for i in drawn]
    cells = [
        Cell(kind.partition(":")[0], float(kind.partition(":")[2]), options.first_draw + draw)
        for kind in options.noise
        for draw in range(options.draws)
    ]
    found, trained = {}, {}
    ceiling = None
    if options.ceiling:
        clean = list(flip_pairs(rows, rate=0, seed=options.first_draw))
        folder = options.folder / Cell("random", 0.0, options.first_draw).name
        parts, judges = measured(config, clean, folder, options.in_sample)
        ceiling = Scores.of(parts, judges.start, judges.counts).margin
    for cell in cells:
        noisy = list(flip_pairs(rows, mode=cell.mode, rate=cell.rate, seed=cell.draw))
        folder = options.folder / cell.name
        parts, judges = measured(config, noisy, folder, options.in_sample)
        groups, flips = prompt_groups(noisy), np.array([row["is_flipped"] for row in noisy])
        scores, finding = suspicions(parts, judges, groups)
        if ceiling is not None:
            scores["margin of policies trained on the true labels"] = np.where(flips, ceiling, -ceiling)
        share = cleanlab_share(Scores.of(parts, judges.start, judges.counts))
        found[cell] = scores, finding, flips, share
        if options.test is not None:
            trained[cell] = cleaning(options, noisy, finding, folder, judges)
    report(found)
    report_cleaning(trained, options.runs, options.plot)
    numbers = {
        name: number for name, number in versions().items() if name in ("python", "torch", "transformers", "numpy")
    }
    print(f"\n{len(rows)} pairs, commit {commit()}, {json.dumps(numbers)}, {torch.get_num_threads()} thread")


if __name__ == "__main__":
    main()
