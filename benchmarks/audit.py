"""Which score finds wrong labels, how well the audit's probabilities are calibrated, and whether cleaning helps.

The labels of the pairs are taken as true, and known shares of them are flipped. Policies are those of `gapo audit`.
What they say is kept, one file for each policy, so that the command may be stopped, and goes on.

    python benchmarks/audit.py TRAIN --tiny_text TEXT --noise random:0.05 random:0.2 length:0.2 --seeds 2
    python benchmarks/audit.py TRAIN --tiny_text TEXT --noise random:0.2 --seeds 2 --test TEST --runs 5

cleanlab (AGPL-3.0) is used where it is installed, as a baseline, and named where it is not; gapo does not need it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import commit, progress

import gapo
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
from gapo.runs.policy.pair_batches import length, pair_logps
from gapo.runs.versions import versions
from gapo.runs.workers import one_thread

Row = dict[str, Any]


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
    parser.add_argument("--oracle", action="store_true", help="also train on the true labels there")
    parser.add_argument("--runs", type=int, default=5, help="training runs for each way of cleaning")
    parser.add_argument("--train_objective", default="dpo", help="of those runs")
    parser.add_argument("--train_settings", type=json.loads, default={"beta": 0.03}, help="of that objective, as JSON")
    parser.add_argument("--train_epochs", type=int, default=2, help="of those runs")
    parser.add_argument("--train_rate", type=float, default=2e-3, help="learning rate of those runs")
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
    header = ["flips", "held-out accuracy", "share", "its interval", "lapses", "share by cleanlab"]
    header += ["flipped in the top fifth", "among as many as are flipped", "Brier", "ECE"]
    print(markdown(header, lines))


def spread(values: list[float]) -> str:
    """A mean, and the range where there are several."""
    text = f"{np.mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


def ways(finding: Finding, is_flipped: np.ndarray, oracle: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each way of cleaning the pairs that stay, and which of them are turned over."""
    n = len(is_flipped)
    order = np.argsort(-finding.p_wrong, kind="stable")
    count = round(finding.model.share * n)
    top = np.zeros(n, dtype=bool)
    top[order[:count]] = True
    none, every = np.zeros(n, dtype=bool), np.ones(n, dtype=bool)
    return {
        "all pairs as they are": (every, none),
        "the most suspicious dropped, as many as the share": (~top, none),
        "flipped where p_wrong > 1/2": (every, finding.p_wrong > 0.5),
        **({"wrong labels flipped (oracle)": (every, is_flipped)} if oracle else {}),
    }


def cleaning(options: argparse.Namespace, rows: list[Row], finding: Finding, folder: Path, judges: Judges) -> None:
    """Train on the pairs as they are and cleaned, in the same order; print accuracies on clean test pairs."""
    flipped = np.array([row["is_flipped"] for row in rows])
    test = list(true_labels(read_pairs(options.test).rows))
    policy = judges.policy
    tokens, held = policy.tokenized(rows, 512), policy.tokenized(test, 512)
    policy.prepare({"pairs": tokens, "test": held})
    step = gapo.value_and_grad(
        pair_logps, None, options.train_objective, backend="torch", objective_settings=options.train_settings
    )
    lengths = np.array([length(row) for row in tokens])
    results: dict[str, list[float]] = {}
    for way, (stays, over) in ways(finding, flipped, options.oracle).items():
        used = np.flatnonzero(stays)
        mine = [swapped(row) if over[i] else row for i, row in enumerate(tokens)]
        for run in range(options.runs):

            def accuracy(run: int = run, mine: list[Row] = mine, used: np.ndarray = used) -> Arrays:
                rng = stream(run, "audit benchmark training")
                order = [used[b] for _ in range(options.train_epochs) for b in bucketed(lengths[used], 16, rng)]
                fit(policy, mine, order, step, learning_rate=options.train_rate)
                logps = policy.logps(held)
                return {"accuracy": np.array([(logps[:, 0] > logps[:, 1]).mean()])}

            settings = [options.train_objective, options.train_settings, options.train_rate, options.train_epochs]
            digest = f"{held_out.fingerprint([rows[i] for i in used])} {over.sum()} {settings}"
            path = folder / "cleaning" / f"{way.replace('/', ' of ')} {run}.safetensors"
            if not path.exists():
                progress(f"{way}, run {run}")
            kept = kept_arrays(path, digest, accuracy, others="what other pairs or settings gave: give another folder")
            results.setdefault(way, []).append(float(kept["accuracy"][0]))
    plain = np.array(results["all pairs as they are"])
    lines = []
    for way, values in results.items():
        stays, over = ways(finding, flipped, options.oracle)[way]
        wrong = (flipped != over)[stays].mean()
        difference = np.array(values) - plain
        low, high = bootstrap(difference)
        paired = (
            ""
            if way == "all pairs as they are"
            else f"{100 * difference.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        )
        lines.append([way, f"{stays.sum()}", f"{100 * wrong:.1f} %", f"{100 * np.mean(values):.1f}", paired])
    print(
        f"\nTraining on cleaned pairs: {options.train_objective}, {options.runs} runs, {len(test)} clean test pairs\n"
    )
    print(markdown(["pairs", "number", "wrong labels in them", "accuracy, %", "difference, paired (95 %)"], lines))


def bootstrap(values: np.ndarray, times: int = 10_000) -> tuple[float, float]:
    """95 % interval of a mean of few values: percentiles, expanded by sqrt(n / (n - 1)) (Hesterberg 2015)."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(times, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    stretch = np.sqrt(len(values) / max(1, len(values) - 1))
    return values.mean() + stretch * (low - values.mean()), values.mean() + stretch * (high - values.mean())


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
    found = {}
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
            cleaning(options, noisy, finding, folder, judges)
    report(found)
    numbers = {
        name: number for name, number in versions().items() if name in ("python", "torch", "transformers", "numpy")
    }
    print(f"\n{len(rows)} pairs, commit {commit()}, {json.dumps(numbers)}, {torch.get_num_threads()} thread")


if __name__ == "__main__":
    main()
