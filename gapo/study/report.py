"""The report of a study: `study.html` (one self-contained page), `study.md` (tables), numbers as CSV and Parquet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gapo.files import write_bytes, write_text
from gapo.runs.output.pages import render_page
from gapo.study import figures
from gapo.study import frames as tables
from gapo.study.arms import parts_of
from gapo.study.asides import asides, in_words, noisy_choice
from gapo.study.asides import points as percent
from gapo.study.cells import Cell
from gapo.study.markdown import facts, paired_text, render_markdown
from gapo.study.names import shown
from gapo.study.outcome import Study
from gapo.study.statistics import Error, bootstrap, detectable, intervals
from gapo.study.study_config import as_dict
from gapo.study.study_verdict import verdict

_TEST = "reward accuracy, clean test pairs, %"
_TRUE = "reward accuracy, true labels of train pairs, %"
_MODES = {
    "random": "flipped at random",
    "length": "flipped to favour longer answers",
    "judge": "of a judge that is sure where it is wrong",
}
_WEIGHTS = {
    "flipped_weight_change": "weight of flipped over clean, minus 1, %",
    "flips_in_fifth_1": "flips in lowest fifth, %",
    "flips_in_fifth_5": "in highest fifth, %",
    "auroc_weight": "AUROC of low weight, %",
    "auroc_gap": "AUROC of gap, %",
}
_DIAGNOSED = 0.2  # share of flips at which the paper shows its diagnostics; the nearest of the study is taken
_DETECTORS = (
    *("gapo", "gapo-gaussian", "gapo-margin", "gapo-l2", "gapo-first-order", "simpo", "gapo+dpo", "margin+dpo"),
)


def write_report(folder: Path, study: Study) -> None:
    """Write study.html, study.md, results.csv, results.parquet, valuation.csv and tries.csv, each atomically.

    The figures are SVG files under figures/.
    """
    values = content(study)
    for name, table in values.pop("files").items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
        if name == "results":
            parquet = io.BytesIO()
            table.to_parquet(parquet, index=False)
            write_bytes(folder / "results.parquet", parquet.getvalue())
    pictures: dict[str, str] = values.pop("pictures")
    for name, svg in pictures.items():
        write_text(folder / "figures" / f"{name}.svg", svg)
    write_text(folder / "study.md", render_markdown(values))
    svgs = list(pictures.values())
    page = render_page(
        Path(__file__).with_name("study.html.jinja"), title=folder.name, pictures=svgs, lines=facts(values), **values
    )
    write_text(folder / "study.html", page)


def content(study: Study) -> dict[str, Any]:
    """Everything that the page, the Markdown and the files say: tables as rows of text, pictures as SVG."""
    config, records, parts = study.config, study.records, study.parts
    plain = [cell for part, cells in parts.items() if part != "valuation" for cell in cells]
    runs = tables.frame(records, dict.fromkeys(plain))
    grid = tables.every_mode(tables.frame(records, parts["grid"]), config.modes)
    done = grid[grid["failed"].isna()]
    rate = min((rate for rate in config.flip_rates if rate > 0), key=lambda rate: abs(rate - _DIAGNOSED), default=0.0)
    noisy = done[(done["mode"] == config.modes[0]) & (done["rate"] == rate)]
    failed = [_named(cell) for cell, record in records.items() if "failed" in record]
    pieces = {
        "verdict": verdict(done),
        "accuracy": [
            {"mode": mode, "title": f"Labels {_MODES[mode]}", **_accuracies(done, mode, value), "what": what}
            for mode in config.modes
            if (done[done["mode"] == mode]["rate"] > 0).any()
            for value, what in (("accuracy", _TEST), ("train_true_accuracy", _TRUE))
        ],
        "differences": _differences(done, config.baseline, config.modes) if config.baseline else None,
        "diagnostics": _diagnostics(noisy),
        "diagnosed_at": f"{100 * rate:g} % of the labels {_MODES[config.modes[0]]}",
        "logps": _logps(noisy, study.facts["before"]),
        "asides": asides(noisy, study.facts),
        "noisy_choice": noisy_choice(study),
        "settings": _settings(study),
        "curves": _curves(study),
        "valuation": _valuation(study),
    }
    return {
        **pieces,
        "config": as_dict(config),
        "facts": study.facts,
        "left_out": list(study.left_out.values()),
        "failed": len(failed),
        "failed_runs": failed,
        "runs": len(records),
        "cpu_seconds": round(sum(record.get("cpu_seconds", 0) for record in records.values())),
        "pictures": _pictures(study, done, noisy, rate),
        "files": {
            "results": runs,
            "valuation": tables.valuation_frame(records, parts.get("valuation", [])),
            "tries": pd.DataFrame(study.tries),
        },
    }


def _accuracies(done: pd.DataFrame, mode: str, value: str) -> dict[str, Any]:
    rows = tables.accuracy_table(done, mode, value)
    rates = sorted({rate for row in rows for rate in row["at"]})
    head = ["objective", *(f"{100 * rate:g} %" for rate in rates), "GAPO minus it, paired"]
    body = [
        [row["name"], *(percent(row["at"].get(rate)) for rate in rates), percent(row["gapo_minus"], signed=True)]
        for row in rows
    ]
    return {"head": head, "rows": body}


def _differences(done: pd.DataFrame, baseline: str, modes: list[str]) -> dict[str, Any]:
    """Points above the baseline, with standard errors, in each noise; without flips the modes are one."""
    rows = tables.difference_table(done, baseline)
    seen = dict.fromkeys(noise for row in rows for noise in row["at"])
    noises = sorted((n for n in seen if n[1] > 0 or n[0] == modes[0]), key=lambda n: (n[1] > 0, modes.index(n[0]), n))
    head = ["objective", *(f"{mode} {100 * rate:g} %" if rate else "no flips" for mode, rate in noises)]
    body = [[row["name"], *(_points(row["at"].get(noise)) for noise in noises)] for row in rows]
    errors = [(mean.error, mean.n) for row in rows for mean in row["at"].values() if mean.n > 1]
    smallest = float(np.median([detectable(error, n) for error, n in errors])) if errors else None
    title = f"Minus {shown(baseline)}, paired"
    return {"title": title, "head": head, "rows": body, "text": paired_text(smallest)}


def _points(difference: Error | None) -> str:
    """A difference of shares in points with its standard error, such as "+3.6 ± 1.1"."""
    if difference is None:
        return ""
    return f"{100 * difference.mean:+.1f}" + (f" ± {100 * difference.error:.1f}" if difference.n > 1 else "")


def _diagnostics(noisy: pd.DataFrame) -> dict[str, Any]:
    """Weights of flipped and clean pairs in the later half of the runs, for every arm that has weights."""
    rows = []
    for arm, group in noisy.groupby("arm", sort=False):
        gap = group.get("mean_gap_late", pd.Series(dtype=float)).dropna()
        cells = [_over_seeds(group, name) for name in (*_WEIGHTS, "auroc_margin")]
        rows.append([shown(str(arm)), *cells, f"{gap.mean():.3f}" if len(gap) else ""])
    head = ["objective", *_WEIGHTS.values(), "AUROC of low margin, %", "mean gap, nats per token"]
    return {"head": head, "rows": rows}


def _over_seeds(group: pd.DataFrame, name: str) -> str:
    """The interval of a column in percent; empty where it was not measured."""
    values = group.get(name, pd.Series(dtype=float)).dropna()
    return percent(bootstrap(values.to_numpy())) if len(values) else ""


def _logps(noisy: pd.DataFrame, before: Mapping[str, float]) -> dict[str, Any]:
    """Margins and log-probabilities on test pairs, and what a run costs: also over SimPO's, or the first arm's."""
    arms = list(noisy["arm"])
    unit = arms[0] if arms and "simpo" not in arms else "simpo"
    of_unit = noisy[noisy["arm"] == unit].set_index("seed")["cpu_seconds"]
    rows = [["before training", f"{before['margin']:.2f}", f"{before['chosen_logp']:.2f}",
             f"{before['rejected_logp']:.2f}", "", ""]]  # fmt: skip
    for arm, group in noisy.groupby("arm", sort=False):
        means = [f"{group[name].mean():.2f}" for name in ("margin", "chosen_logp", "rejected_logp")]
        costs = (group.set_index("seed")["cpu_seconds"] / of_unit).dropna()
        relative = f"{costs.median():.2f}" if len(costs) else ""
        rows.append([shown(str(arm)), *means, f"{group['cpu_seconds'].median():.1f}", relative])
    head = ["objective", "margin", "chosen log-probability", "rejected log-probability", "CPU seconds"]
    head.append(f"over {shown(unit)}'s")
    return {"head": head, "rows": rows}


def _settings(study: Study) -> dict[str, Any]:
    rows = []
    for arm, settings in study.chosen.items():
        tries = [row["accuracy"] for row in study.tries if row["arm"] == arm]
        best = f"{100 * max(tries):.1f}" if tries else "given"
        rows.append([shown(arm), in_words(settings), best, str(len(tries))])
    return {"head": ["objective", "chosen", "validation accuracy, %", "tries"], "rows": rows}


def _curve_frame(study: Study, part: str) -> pd.DataFrame:
    runs = tables.frame(study.records, study.parts.get(part, []))
    if runs.empty:
        return runs
    runs["anchor_pairs"] = runs["anchor_pairs"].replace(0, study.config.batch_size)
    return runs[runs["failed"].isna()]


_CURVES = {"rho": ("rho", "rho"), "anchor": ("anchor_pairs", "pairs sharing an anchor")}


def _curves(study: Study) -> list[dict[str, Any]]:
    tabled = []
    for part, (column, label) in _CURVES.items():
        runs = _curve_frame(study, part)
        if runs.empty:
            continue
        rows = [
            [f"{value:g}", percent(bootstrap(group["accuracy"].to_numpy())), f"{group['mean_gap_late'].mean():.3f}",
             *(_over_seeds(group, name) for name in _WEIGHTS)]
            for value, group in runs.groupby(column)
        ]  # fmt: skip
        tabled.append({"head": [label, _TEST, "mean gap, nats per token", *_WEIGHTS.values()], "rows": rows})
    return tabled


def _valuation(study: Study) -> dict[str, Any] | None:
    runs = tables.valuation_frame(study.records, study.parts.get("valuation", []))
    if runs.empty:
        return None
    rows = []
    for (rate, arm), group in runs.groupby(["rate", "arm"], sort=False):
        reference = runs[(runs["rate"] == rate) & (runs["arm"] == "random")].set_index("seed")["accuracy"]
        label = "random pairs" if arm == "random" else f"{arm} gaps"
        difference = bootstrap((group.set_index("seed")["accuracy"] - reference).dropna().to_numpy())
        rows.append([f"{100 * rate:g} %", label, percent(bootstrap(group["accuracy"].to_numpy())),
                     percent(difference, signed=True) if arm != "random" else "",
                     f"{100 * group['flipped_share'].mean():.1f}"])  # fmt: skip
    return {"head": ["flipped labels", "kept pairs", _TEST, "minus random pairs, paired", "flips kept, %"],
            "rows": rows}  # fmt: skip


def _pictures(study: Study, done: pd.DataFrame, noisy: pd.DataFrame, rate: float) -> dict[str, str]:
    config = study.config
    pictures = {}
    for mode in config.modes:
        if (done[done["mode"] == mode]["rate"] > 0).any():
            title = f"Labels {_MODES[mode]}"
            pictures[f"accuracy_{mode}"] = figures.accuracy(done, mode, title, _TEST)
            pictures[f"train_true_{mode}"] = figures.accuracy(
                done, mode, f"{title}: train pairs", _TRUE, "train_true_accuracy"
            )
            for name, arms in _families(study.config.arm_names).items():
                about = "GAPO's controls" if name == "controls" else f"{shown(arms[0])} with weights"
                pictures[f"{name}_{mode}"] = figures.family(done, mode, arms, f"{about}. {title}", _TEST)
    share = f"{100 * rate:g} % flips"
    by_arm = {
        shown(arm): _measured(study, [c for c in study.parts["grid"] if c.arm == arm and c.rate == rate])
        for arm in _DETECTORS
    }
    by_rho: dict[str, list[dict[str, Any]]] = {}
    for cell in study.parts.get("rho", []):
        by_rho.setdefault(f"rho {dict(cell.settings)['rho']:g}", []).extend(_measured(study, [cell]))
    for name, groups, what in (("arm", by_arm, "by objective"), ("rho", by_rho, "GAPO by rho")):
        groups = {label: records for label, records in groups.items() if records}
        if groups:
            pictures[f"weights_by_{name}"] = figures.weights_over_time(groups, f"Do flips lose weight? {share}, {what}")
            pictures[f"fifths_by_{name}"] = figures.fifths(groups, rate, f"Where the flips are, {share}, {what}")
    costs = intervals(noisy, ["arm"], "cpu_seconds")
    pictures["cost"] = figures.bars(_scaled(costs, 1), "What a run costs", "CPU seconds of training, one thread")
    chosen = intervals(noisy, ["arm"], "chosen_logp")
    pictures["chosen"] = figures.bars(
        _scaled(chosen, 1), f"Chosen answers after training, {share}", "log-probability, nats per token"
    )
    for part, (column, label) in _CURVES.items():
        runs = _curve_frame(study, part)
        if not runs.empty:
            gaps = runs.groupby(column)["mean_gap_late"].mean()
            title = f"GAPO against {label}, {100 * config.curve_flip_rate:g} % flips"
            pictures[f"curve_{part}"] = figures.curve(
                intervals(runs, [column], "accuracy").sort_values(column), column, title,
                f"{label} (below: mean gap, nats per token)", {x: f"{gap:.2f}" for x, gap in gaps.items()},
            )  # fmt: skip
    valued = tables.valuation_frame(study.records, study.parts.get("valuation", []))
    if not valued.empty:
        title = f"SimPO on {100 * config.valuation_share:g} % of the pairs, by gap"
        pictures["valuation"] = figures.valuation(intervals(valued, ["arm", "rate"], "accuracy"), title)
    return {name: picture for name, picture in pictures.items() if picture}


def _families(arms: Sequence[str]) -> dict[str, list[str]]:
    """By the name of their figure, arms that belong together: GAPO and its controls, an objective and its weighted."""
    families = {"controls": ["gapo", *(arm for arm in arms if arm.startswith("gapo-") and "+" not in arm)]}
    for arm in arms:
        weighting, base, _ = parts_of(arm)
        if weighting:
            families.setdefault(f"weighted_{base}", [base]).append(arm)
    return {name: members for name, members in families.items() if len(members) > 1 and set(members) <= set(arms)}


def _measured(study: Study, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Records of cells of the first flip mode in which flipped and clean pairs had weights."""
    records = [study.records[cell] for cell in cells if cell.mode == study.config.modes[0]]
    return [record for record in records if "fifths" in record]


def _named(cell: Cell) -> str:
    valued = ", valuation" if cell.valuation else ""
    return f"{shown(cell.arm)} at {100 * cell.rate:g} % ({cell.mode}), seed {cell.seed}{valued}"


def _scaled(frame: pd.DataFrame, scale: float) -> dict[str, tuple[float, float, float]]:
    return {
        shown(row["arm"]): (scale * row["mean"], scale * row["low"], scale * row["high"]) for _, row in frame.iterrows()
    }
