"""The study's numbers as data frames: one row for each run, and the tables of the report made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from gapo.study.arms import ARMS
from gapo.study.cells import Cell
from gapo.study.names import shown
from gapo.study.statistics import Error, Interval, differences, intervals, paired, standard_error


def frame(records: dict[Cell, dict[str, Any]], cells: Iterable[Cell]) -> pd.DataFrame:
    """One row for each run of `cells`: "arm", "mode", "rate", "seed", settings, and what was measured, flat."""
    rows = []
    for cell in cells:
        record = records[cell]
        row: dict[str, Any] = {"arm": cell.arm, "mode": cell.mode, "rate": cell.rate, "seed": cell.seed}
        row |= {"anchor_pairs": cell.anchor_pairs, **dict(cell.settings), "failed": record.get("failed")}
        row |= {name: value for name, value in record.items() if not isinstance(value, (dict, list))}
        row |= record.get("evaluation", {})
        row |= {f"train_true_{name}": value for name, value in record.get("train_true", {}).items()}
        row |= {f"fitted_{name}": share for name, share in record.get("fitted", {}).items()}
        row |= {f"transfer_{name}": value for name, value in record.get("transfer", {}).items()}
        if course := record.get("course"):
            accuracies = [point["accuracy"] for point in course]
            row |= {"course_best": max(accuracies), "course_last": accuracies[-1]}
        row |= {f"flips_in_fifth_{fifth + 1}": share for fifth, share in enumerate(record.get("fifths", []))}
        rows.append(row)
    return pd.DataFrame(rows)


def every_mode(runs: pd.DataFrame, modes: Iterable[str]) -> pd.DataFrame:
    """`runs` with those of rate 0 repeated in each mode: without flips the modes are one."""
    noisy = [runs[(runs["mode"] == mode) & (runs["rate"] > 0)] for mode in modes]
    clean = [runs[runs["rate"] == 0].assign(mode=mode) for mode in modes]
    return pd.concat([part for part in (*clean, *noisy) if len(part)], ignore_index=True)


def valuation_frame(records: dict[Cell, dict[str, Any]], cells: Iterable[Cell]) -> pd.DataFrame:
    """One row for each training on a part of the pairs; "arm" is the part: "lowest", "random" or "highest" gap."""
    rows = [
        {"arm": part, "mode": cell.mode, "rate": cell.rate, "seed": cell.seed, "pairs": record["pairs"], **record[part]}
        for cell in cells
        if "failed" not in (record := records[cell])
        for part in ("lowest", "random", "highest")
    ]
    return pd.DataFrame(rows)


def accuracy_table(runs: pd.DataFrame, mode: str, value: str = "accuracy") -> list[dict[str, Any]]:
    """For each arm: its name, the interval at each rate of `mode`, and the paired difference GAPO minus it."""
    of_mode = runs[runs["mode"] == mode]
    table = intervals(of_mode, ["arm", "rate"], value)
    rows = []
    for arm in table["arm"].unique():
        by_rate = {row["rate"]: Interval(row["mean"], row["low"], row["high"], row["n"]) for _, row in
              table[table["arm"] == arm].iterrows()}  # fmt: skip
        rows.append({"name": shown(arm), "control": ARMS[arm].control, "at": by_rate, "gapo_minus": None})
        noisy = of_mode[(of_mode["rate"] > 0) & of_mode["arm"].isin(["gapo", arm])]
        if arm != "gapo" and noisy["arm"].nunique() == 2:
            rows[-1]["gapo_minus"] = paired(noisy, "gapo", arm, value)
    return rows


def difference_table(runs: pd.DataFrame, baseline: str, value: str = "accuracy") -> list[dict[str, Any]]:
    """For each other arm: its name, and how far it is above `baseline` in each noise (mode, rate) that both have."""
    rows = []
    for arm in dict.fromkeys(runs["arm"]):
        if arm == baseline:
            continue
        by_noise: dict[tuple[str, float], Error] = {}
        for (mode, rate), of_noise in runs.groupby(["mode", "rate"], sort=False):
            both = of_noise[of_noise["arm"].isin([arm, baseline])].dropna(subset=[value])
            seeds = both.groupby("seed")["arm"].nunique()
            if (seeds == 2).any():
                by_noise[(mode, rate)] = standard_error(differences(both, arm, baseline, value))
        rows.append({"name": shown(arm), "at": by_noise})
    return rows
