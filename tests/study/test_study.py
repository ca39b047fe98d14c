"""`gapo study`: what all arms share, one run, the grid and its resuming, statistics by hand, the page."""

from __future__ import annotations

import csv
import html
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from browsers import require_readable

import gapo
from gapo.cli import main
from gapo.commands.study import parse
from gapo.data import write_rows
from gapo.data.flip import swapped
from gapo.objectives import OBJECTIVES, resolve
from gapo.runs.claims import Claims
from gapo.runs.policy.pair_batches import pair_logps
from gapo.study import grid as grid_module
from gapo.study import study as study_module
from gapo.study.arms import ARMS, arm_of
from gapo.study.cell_run import draw, measure, train
from gapo.study.cells import Cell, settings_key
from gapo.study.grid import Grid
from gapo.study.material import Material, load_split
from gapo.study.report import content
from gapo.study.statistics import bootstrap, paired
from gapo.study.study import plan, possible_noises, run_study
from gapo.study.study_config import StudyConfig
from gapo.study.weight_log import WeightLog


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    folder = tmp_path_factory.mktemp("study")
    return StudyConfig(
        demo_size=160,
        train_pairs=32,
        validation_pairs=16,
        test_pairs=20,
        batch_size=16,
        seeds=2,
        flip_rates=(0.0, 0.25, 0.5),
        learning_rates=(1e-3, 3e-3),
        arms="gapo,simpo,dpo,gapo-rho0",
        control_flip_rates=(0.0,),
        curve_rhos=(0.0, 1.0),
        curve_anchor_pairs=(4, 16),
        valuation_rates=(0.25,),
        tiny_hidden_size=16,
        tiny_layers=1,
        tiny_heads=2,
        tiny_vocab=300,
        tiny_text_steps=0,
        tiny_answer_steps=2,
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        workers=1,
    )


@pytest.fixture(scope="module")
def material(config: StudyConfig) -> Material:
    return Material(config, load_split(config))


def cell(arm: str = "gapo", rate: float = 0.25, seed: int = 0, **more: object) -> Cell:
    settings = {**ARMS[arm].first_tries([1e-2])[0]}
    return Cell(arm, settings_key(settings), "random", rate, seed, **more)  # type: ignore[arg-type]


# What all arms share


def test_no_prompt_is_held_out_and_trained_on(config: StudyConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i // 4}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(160)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    split = load_split(replace(config, pairs=str(tmp_path / "pairs.jsonl"), validation_pairs=17, test_pairs=22))
    prompts = [{row["prompt"] for row in part} for part in (split.pool, split.validation, split.test)]
    assert not prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2]
    assert [len(part) for part in (split.pool, split.validation, split.test)] == [116, 20, 22]


def test_a_seed_draws_the_same_pairs_whatever_the_flips(material: Material, config: StudyConfig) -> None:
    clean, noisy = draw(material, config, "random", 0.0, 3), draw(material, config, "random", 0.25, 3)
    np.testing.assert_array_equal(clean.rows, noisy.rows)
    assert all(np.array_equal(a, b) for a, b in zip(clean.order, noisy.order, strict=True))
    assert (clean.is_flipped.sum(), noisy.is_flipped.sum()) == (0, 8)
    assert not np.array_equal(noisy.is_flipped, draw(material, config, "random", 0.25, 4).is_flipped)


def test_every_arm_sees_the_same_pairs_in_the_same_order(
    material: Material, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[object]] = {}
    make = Material.batches

    def spy(self: Material, tokens: object, size: int, order: object = None) -> object:
        made = make(self, tokens, size, order)  # type: ignore[arg-type]
        if order is not None:
            seen[arm] += [(batch["index"].tolist(), batch["input_ids"].tolist()) for batch in made]
        return made

    monkeypatch.setattr(Material, "batches", spy)
    for arm in ("gapo", "simpo", "dpo"):
        seen[arm] = []
        measure(material, config, cell(arm))
    assert seen["gapo"] == seen["simpo"] == seen["dpo"]
    assert len(seen["gapo"]) == 2


# Arms


def test_any_objective_of_the_registry_is_an_arm_and_all_lists_a_few(config: StudyConfig) -> None:
    assert set(OBJECTIVES) <= set(ARMS)
    named = replace(config, arms="gapo,simpo,margin-drop+cdpo,gapo_capped-l2,gapo+rdpo-gaussian")
    assert not set(named.arm_names[2:]) & set(ARMS)
    assert [ARMS[name].objective for name in named.arm_names[2:]] == ["margin-drop+cdpo", "gapo_capped", "gapo+rdpo"]
    assert [ARMS[name].control for name in named.arm_names] == [False, False, True, True, True]
    with pytest.raises(KeyError):
        ARMS["gapo+orpo"]


def test_an_arm_updated_at_the_anchor_tries_what_the_plain_one_tries() -> None:
    for name in ("dpo", "ipo", "gapo"):
        plain, sam, control = (arm_of(f"{name}{variant}") for variant in ("", "-sam", "-sam-gaussian"))
        assert (sam.control, control.control) == (False, True)
        assert sam.second == plain.second
        for arm, direction in ((sam, "pessimistic"), (control, "gaussian")):
            step, own = arm.divided(arm.first_tries([1e-3])[0])
            assert (step.update, step.direction, step.moves) == ("anchor", direction, True)
            resolve(arm.objective, step, own)
    assert not any("sam" in name for name in ARMS)  # on demand, by its name


def test_a_weighted_arm_tries_what_it_weights_tries() -> None:
    """The same settings in each round, at a radius that stays."""
    rates = [1e-3, 3e-3]
    for base in ("dpo", "simpo", "sigmoid_loss"):
        for name, held in ((f"gapo+{base}", {"rho": 0.5}), (f"margin+{base}", {})):
            plain, weighted = ARMS[base], ARMS[name]
            for tries in ("first_tries", "second_tries", "last_tries"):
                arguments = [rates] if tries == "first_tries" else [plain.first_tries(rates)[1], rates]
                kept = [rates] if tries == "first_tries" else [weighted.first_tries(rates)[1], rates]
                expected = [held | settings for settings in getattr(plain, tries)(*arguments)]
                assert getattr(weighted, tries)(*kept) == expected
    every = [len(arm.first_tries(rates) + arm.second_tries(arm.first_tries(rates)[0], rates)) for arm in ARMS.values()]
    assert set(every) == {6}


def test_settings_go_to_the_step_or_to_the_objective() -> None:
    config, own = ARMS["gapo+dpo"].divided({"learning_rate": 1.0, "beta": 0.003, "rho": 0.5, "gap_beta": 4.0})
    assert (config.rho, config.beta, own) == (0.5, 2.5, {"beta": 0.003, "gap_beta": 4.0})
    config, own = ARMS["gapo+simpo"].divided({"learning_rate": 1.0, "beta": 0.4, "rho": 0.5, "direction": "gaussian"})
    assert (config.rho, config.beta, config.direction, own) == (0.5, 0.4, "gaussian", {})
    config, own = ARMS["gapo_target"].divided({"learning_rate": 1.0, "beta": 0.4, "strength": 4.0})
    assert (config.beta, own) == (0.4, {"strength": 4.0})


def test_given_settings_are_not_tuned(config: StudyConfig, tmp_path: Path) -> None:
    """An arm with settings runs with them alone, beside one that has its tries; a table compares them."""
    study = run_study(
        replace(
            config, arms="dpo,gapo+dpo,margin+dpo",
            settings={"gapo+dpo": {"learning_rate": 1e-3, "beta": 0.2}, "margin+dpo": {"learning_rate": 1e-3}},
            baseline="dpo", seeds=2, flip_rates=(0.0, 0.25), flip_modes="random", control_flip_rates=(0.25,),
            valuation_rates=(), curve_rhos=(), curve_anchor_pairs=(), output_dir=str(tmp_path),
        )
    )  # fmt: skip
    assert study.chosen["gapo+dpo"] == {"learning_rate": 1e-3, "beta": 0.2, "rho": 0.5}
    assert [sum(row["arm"] == name for row in study.tries) for name in study.chosen] == [8, 0, 0]
    text = (tmp_path / "study.md").read_text()
    assert "| DPO, weighted by gap | rho 0.5, learning_rate 0.001, beta 0.2 | given | 0 |" in text
    runs = pd.read_csv(tmp_path / "results.csv")
    at = runs[runs["rate"] == 0.25].pivot_table(index="seed", columns="arm", values="accuracy")
    points = 100 * (at["gapo+dpo"] - at["dpo"]).to_numpy()
    error = abs(points[0] - points[1]) / 2  # of two values: their distance over sqrt(2), over sqrt(2)
    table = text.partition("## Minus DPO, paired")[2]
    assert "| objective | no flips | random 25 % |" in table
    assert f"{points.mean():+.1f} ± {error:.1f} |" in table.partition("| DPO, weighted by gap |")[2].splitlines()[0]
    assert "| DPO, weighted by margin |  | " in table  # a control, at its own rates
    seconds = runs[runs["rate"] == 0.25].pivot_table(index="seed", columns="arm", values="cpu_seconds")
    ratios = (seconds["gapo+dpo"] / seconds["dpo"]).to_numpy()
    costs = text.partition("| CPU seconds | over DPO's |")[2].splitlines()  # without SimPO, the first arm is the unit
    (line,) = (line for line in costs[:6] if line.startswith("| DPO, weighted by gap |"))
    assert abs(float(line.split("|")[-2]) - ratios.mean()) <= 0.0051  # the median of two
    page = (tmp_path / "study.html").read_text()
    assert "Minus DPO, paired" in page
    assert (tmp_path / "figures" / "weighted_dpo_random.svg").exists()


# One run


@pytest.mark.parametrize("name", ["simpo", "dpo", "rpo"])
def test_an_objective_trains_as_plain_autograd_would(material: Material, config: StudyConfig, name: str) -> None:
    drawn = draw(material, config, "random", 0.25, 0)
    drawn = replace(drawn, order=drawn.order[:1])
    config = replace(config, warmup_ratio=0.0)
    train(material, config, name, {"learning_rate": 1e-2}, drawn)
    trained = [p.detach().clone() for p in material.model.parameters()]

    material.reset()
    index = drawn.order[0]
    rows = [material.tokens["pool"][drawn.rows[i]] for i in index]
    rows = [swapped(row) if swap else row for row, swap in zip(rows, drawn.is_flipped[index], strict=True)]
    (batch,) = material.batches(rows, 16)
    rows = [rows[i] for i in batch["index"]]
    counts = [torch.tensor([sum(t != -100 for t in row[f"{side}_labels"]) for row in rows]) for side in
              ("chosen", "rejected")]  # fmt: skip
    with torch.no_grad():
        reference = pair_logps(material.model, batch)
    means = pair_logps(material.model, batch)
    sums, ref = ([x * n for x, n in zip(y, counts, strict=True)] for y in (means, reference))
    logps = gapo.objectives.LogProbs(
        chosen=sums[0], rejected=sums[1], chosen_lengths=counts[0], rejected_lengths=counts[1],
        ref_chosen=ref[0], ref_rejected=ref[1],
    )  # fmt: skip
    OBJECTIVES[name].losses(logps).mean().backward()
    torch.nn.utils.clip_grad_norm_(material.model.parameters(), 1.0)
    torch.optim.AdamW(material.model.parameters(), lr=1e-2, weight_decay=0.0).step()
    for ours, plain in zip(trained, material.model.parameters(), strict=True):
        # Adam's first step is lr * sign(g): entries whose gradient is rounding noise may differ.
        assert (ours - plain).abs().gt(1e-4).float().mean() < 0.01


def test_weights_are_the_derivatives_of_the_loss(material: Material, config: StudyConfig) -> None:
    drawn = draw(material, config, "random", 0.25, 0)
    drawn = replace(drawn, order=drawn.order[:1])
    log = train(material, config, "simpo", {"learning_rate": 1e-3, "beta": 2.0, "gamma": 0.5}, drawn)
    at = drawn.order[0]
    expected = 2.0 / (1 + np.exp(2.0 * log.last("margin")[at] - 0.5))
    np.testing.assert_allclose(log.last("weight")[at], expected, rtol=1e-5)
    others = np.setdiff1d(np.arange(len(drawn.rows)), at)
    assert len(others) == len(drawn.rows) - len(at) > 0
    assert np.isnan(log.last("weight")[others]).all()


def test_micro_batches_of_the_whole_batch_change_nothing_and_smaller_ones_do(
    material: Material, config: StudyConfig
) -> None:
    records = [measure(material, config, cell(anchor_pairs=pairs)) for pairs in (0, 16, 4)]
    evaluations = [record["evaluation"] for record in records]
    assert evaluations[0] == evaluations[1] != evaluations[2]


def test_a_run_starts_from_the_policy_and_repeats_exactly(material: Material, config: StudyConfig) -> None:
    first = measure(material, config, cell("dpo"))
    measure(material, config, cell("gapo"))
    again = measure(material, config, cell("dpo"))
    assert first["evaluation"] == again["evaluation"]
    assert first["over_time"] == again["over_time"]
    assert first["flipped"] == 8
    assert 0 <= first["auroc_weight"] <= 1
    assert len(first["fifths"]) == 5


def test_a_gaussian_direction_is_another_for_each_seed(material: Material, config: StudyConfig) -> None:
    """One direction for all seeds would leave its chance out of the intervals over them."""
    drawn = draw(material, config, "random", 0.0, 0)
    drawn = replace(drawn, order=drawn.order[:1])
    settings = {**ARMS["gapo-gaussian"].first_tries([1e-3])[0]}
    gaps = [
        train(material, config, "gapo-gaussian", settings, replace(drawn, seed=seed)).last("gap") for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(gaps[0], gaps[1])
    assert np.nanmax(np.abs(gaps[0] - gaps[2])) > 1e-4


def test_a_run_that_overflows_is_recorded_as_failed(material: Material, config: StudyConfig) -> None:
    blown = replace(cell(), settings=settings_key({"learning_rate": 1e30}))
    assert "not finite" in measure(material, config, blown)["failed"]


def test_log_of_weights_against_counting_by_hand() -> None:
    log = WeightLog(np.array([True, False, False, False, False, True]))
    log.add(
        0.0, np.array([5]), np.zeros(1), np.array([9.0]), np.zeros(1)
    )  # the early half does not count as a detector
    weights = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    log.add(0.5, np.array([0, 1, 2, 3, 4]), -weights, weights, weights)
    found = log.summary()
    assert found["fifths"] == [1, 0, 0, 0, 0]
    assert (found["auroc_weight"], found["auroc_margin"], found["auroc_gap"]) == (1.0, 0.0, 0.0)
    assert found["flipped_weight_change"] == pytest.approx(1 / 3.5 - 1)
    assert found["over_time"]["weight_flipped"][0] == 9.0
    assert found["over_time"]["weight_clean"][4] == 3.5


# The grid


def test_clean_labels_are_one_noise_and_impossible_rates_are_left_out(material: Material, config: StudyConfig) -> None:
    noises, left_out = possible_noises(material, replace(config, flip_rates=(0.0, 0.1, 0.9)))
    assert noises == [("random", 0.0), ("random", 0.1), ("random", 0.9), ("length", 0.1)]
    assert "greatest rate here is" in left_out["length 0.9"]


def test_plan_runs_methods_first_and_controls_at_their_rates(config: StudyConfig) -> None:
    chosen = {name: ARMS[name].first_tries([1e-3])[0] for name in config.arm_names}
    parts = plan(config, chosen, [("random", 0.0), ("random", 0.25)])
    grid = parts["grid"]
    assert len(grid) == len(set(grid)) == 2 * (3 * 2 + 1)
    assert [c.arm for c in grid[-2:]] == ["gapo-rho0"] * 2
    assert {c.rate for c in grid if c.arm == "gapo-rho0"} == {0.0}
    assert {c.anchor_pairs for c in parts["anchor"]} == {4, 0}
    assert all(dict(c.valuation) == chosen["simpo"] for c in parts["valuation"])
    fewer = plan(replace(config, control_seeds=1), chosen, [("random", 0.0), ("random", 0.25)])
    assert {c.seed for c in fewer["grid"] if c.arm == "gapo-rho0"} == {0}
    assert [len(fewer[part]) for part in ("rho", "anchor", "valuation")] == [2, 2, 1]
    assert len(fewer["grid"]) == len(grid) - 1


def test_a_killed_grid_goes_on_where_it_was(
    material: Material, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [cell(arm, seed=seed) for seed in (0, 1) for arm in ("simpo", "dpo")]
    with Claims() as claims, Grid(config, tmp_path / "whole", material, claims) as grid:
        whole = grid.run(cells, "whole")
    made: list[Cell] = []

    def killed(*arguments: object) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments[2])  # type: ignore[arg-type]
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(grid_module, "measure", killed)
    with (
        pytest.raises(KeyboardInterrupt),
        Claims() as claims,
        Grid(config, tmp_path / "killed", material, claims) as grid,
    ):
        grid.run(cells, "killed")
    assert sorted(path.suffix for path in (tmp_path / "killed").iterdir()) == [".json"] * 2
    made.clear()
    with Claims() as claims, Grid(config, tmp_path / "killed", material, claims) as grid:
        resumed = grid.run(cells, "resumed")
    assert made == cells[2:]
    for one in cells:
        assert resumed[one]["evaluation"] == whole[one]["evaluation"]


def test_a_cell_is_run_anew_when_anything_that_decides_it_changes(
    material: Material, config: StudyConfig, tmp_path: Path
) -> None:
    def path(config: StudyConfig = config, **change: object) -> Path:
        return Grid(config, tmp_path, material, Claims()).path(replace(cell(), **change))  # type: ignore[arg-type]

    others = [path(seed=1), path(rate=0.1), path(mode="length"), path(arm="simpo"), path(anchor_pairs=4)]
    others += [
        path(replace(config, curve_anchor_pairs=(), **{name: 8})) for name in ("train_pairs", "epochs", "batch_size")
    ]
    assert len({path(), *others}) == 9
    assert path() == path(replace(config, seeds=7, workers=3))


def test_runs_kept_from_other_code_are_told(
    material: Material, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "measure", lambda *_: {"evaluation": {}})
    with Claims() as claims, Grid(config, tmp_path, material, claims) as grid:
        grid.run([cell(seed=0), cell(seed=1)], "first")
        assert grid.others() is None
    old = grid.path(cell(seed=1))
    kept = json.loads(old.read_text())
    del kept["made_by"]
    old.write_text(json.dumps(kept))
    monkeypatch.setattr(grid_module, "_code", lambda: "code changed")
    with Claims() as claims, Grid(config, tmp_path, material, claims) as grid:
        grid.run([cell(seed=0), cell(seed=1), cell(seed=2)], "again")
    told = grid.others()
    assert told is not None
    assert told.startswith("2 runs, tries included, were kept from other code than now (1 by gapo ")
    assert "1 by an earlier version" in told


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_runs_far_from_linear_are_warned_of_once(
    material: Material, config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """One warning for the study, in whatever process its runs are; and every run outside a study still warns."""
    far = [Cell("gapo", settings_key({"learning_rate": 1e-2, "rho": 50.0}), "random", 0.25, seed) for seed in (0, 1)]
    for one in far:
        with pytest.warns(RuntimeWarning, match="first_order_ratio is .* for rho=50"):
            measure(material, config, one)

    def noisy(*arguments: object) -> object:
        warnings.warn("something else", UserWarning, stacklevel=1)
        return measure(*arguments)  # type: ignore[arg-type]

    if workers == 1:
        monkeypatch.setattr(grid_module, "measure", noisy)
    with (
        warnings.catch_warnings(record=True) as caught,
        Claims() as claims,
        Grid(replace(config, workers=workers), tmp_path, material, claims) as grid,
    ):
        warnings.simplefilter("always")
        grid.run(far, "far")
    said = [str(one.message) for one in caught if "first_order_ratio" in str(one.message)]
    assert len(said) == 1
    assert said[0].startswith("GAPO: first_order_ratio is ")
    assert said[0].endswith("The other runs of this study are not warned of")
    assert workers == 2 or sum("something else" in str(one.message) for one in caught) == 2


@pytest.mark.slow
def test_worker_processes_give_what_one_process_gives(material: Material, config: StudyConfig, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = measure(material, config, cell("gapo"))
    finally:
        torch.set_num_threads(threads)
    with Claims() as claims, Grid(replace(config, workers=2), tmp_path, material, claims) as grid:
        (record,) = grid.run([cell("gapo")], "two workers").values()
    assert record["evaluation"] == alone["evaluation"]
    assert record["over_time"] == alone["over_time"]


# Statistics


def test_paired_differences_against_values_made_by_hand() -> None:
    rows = [
        ("gapo", "random", 0.1, 0, 0.70), ("simpo", "random", 0.1, 0, 0.60),
        ("gapo", "random", 0.2, 0, 0.60), ("simpo", "random", 0.2, 0, 0.62),
        ("gapo", "random", 0.1, 1, 0.50), ("simpo", "random", 0.1, 1, 0.50),
        ("gapo", "random", 0.2, 1, 0.58), ("simpo", "random", 0.2, 1, np.nan),
        ("gapo", "length", 0.2, 1, 0.10), ("simpo", "length", 0.2, 1, 0.90),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["arm", "mode", "rate", "seed", "accuracy"])
    found = paired(frame, "gapo", "simpo", "accuracy", {"mode": "random"})
    # Seed 0: (0.10 - 0.02) / 2 = 0.04. Seed 1: 0.00, since the other noise has no partner.
    assert found.mean == pytest.approx(0.02)
    assert found.n == 2
    assert found.low == pytest.approx(0.0)
    assert found.high == pytest.approx(0.04)
    with pytest.raises(ValueError, match="no run of 'gapo' and 'dpo'"):
        paired(frame, "gapo", "dpo", "accuracy")


def test_the_bootstrap_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    for n, least in ((5, 0.90), (20, 0.93)):
        found = [bootstrap(rng.normal(3.0, 2.0, n), seed=i) for i in range(400)]
        covered = np.mean([x.low <= 3.0 <= x.high for x in found])
        assert least <= covered <= 0.98


def test_the_bootstrap_of_one_value_has_no_interval_and_of_none_raises() -> None:
    one = bootstrap(np.array([0.5]))
    assert (one.mean, one.n) == (0.5, 1)
    assert np.isnan([one.low, one.high]).all()
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap(np.array([]))


# From one end to the other


@pytest.fixture(scope="module")
def finished(config: StudyConfig) -> Path:
    run_study(config)
    return Path(config.output_dir)


def test_a_study_leaves_page_tables_and_numbers(finished: Path, config: StudyConfig) -> None:
    runs = pd.read_csv(finished / "results.csv")
    assert len(runs) == len(pd.read_parquet(finished / "results.parquet"))
    grid = runs[(runs["arm"] == "simpo") & (runs["mode"] == "random")]
    expected = [(rate, seed) for rate in (0, 0.25, 0.5) for seed in (0, 1)]
    assert sorted(zip(grid["rate"], grid["seed"], strict=True)) == expected
    tries = pd.read_csv(finished / "tries.csv")
    assert set(tries.groupby("arm").size()) == {8}
    assert tries.groupby("arm")["chosen"].sum().eq(1).all()
    chosen = tries[tries["chosen"]].set_index("arm")["accuracy"]
    assert chosen.to_dict() == tries.groupby("arm")["accuracy"].max().to_dict()
    page, text = (finished / "study.html").read_text(), (finished / "study.md").read_text()
    assert page.count("<svg") == len(list((finished / "figures").iterdir())) >= 8
    assert "Weights and flips, 25 % of the labels flipped at random" in text
    mean = 100 * grid[grid["rate"] == 0.25]["accuracy"].mean()
    assert f"{mean:.1f} (" in text
    assert f"{mean:.1f} (" in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)  # self-contained: nothing is loaded from anywhere


def test_no_cell_of_a_study_is_a_formula(finished: Path) -> None:
    """Spreadsheets work out what begins so; the tables hold names of objectives and numbers, nothing of the pairs."""
    cells = []
    for path in finished.glob("*.csv"):
        with path.open(newline="") as file:
            cells += [cell for row in csv.reader(file) for cell in row]
    assert len(cells) > 50
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "\t", "\r"))]


def test_a_finished_study_is_not_run_again(
    finished: Path, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid_module, "measure", lambda *_: pytest.fail("a cell was run again"))
    kept = (finished / "results.csv").read_text()
    run_study(config)
    assert (finished / "results.csv").read_text() == kept


def test_controls_may_be_missing_in_a_mode(tmp_path: Path, config: StudyConfig) -> None:
    one = replace(
        config, arms="gapo,gapo-rho0", seeds=1, flip_rates=(0.0, 0.1, 0.5), control_flip_rates=(0.5,),
        valuation_rates=(), curve_rhos=(), curve_anchor_pairs=(), output_dir=str(tmp_path),
    )  # fmt: skip
    study = run_study(one)
    assert "length 0.5" in study.left_out
    assert (tmp_path / "figures" / "controls_random.svg").exists()
    assert not (tmp_path / "figures" / "controls_length.svg").exists()
    assert "Labels flipped to favour longer answers" in (tmp_path / "study.md").read_text()


def test_a_failed_run_is_named_once(finished: Path, config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without flips stands in the table of each mode, and is still one run."""
    kept = Grid.run

    def fail(self: Grid, cells: list[Cell], title: str) -> dict[Cell, dict[str, object]]:
        found = kept(self, cells, title)
        return {
            one: {"failed": "not finite"}
            if (one.arm, one.rate, one.seed, title) == ("dpo", 0.0, 1, "study")
            else record
            for one, record in found.items()
        }

    monkeypatch.setattr(Grid, "run", fail)
    monkeypatch.setattr(study_module, "write_report", lambda *_: None)
    found = content(run_study(config))
    assert found["failed_runs"] == ["DPO at 0 % (random), seed 1"]
    assert found["failed"] == 1


def test_the_page_escapes_what_users_gave(tmp_path: Path, config: StudyConfig) -> None:
    rows = [{"prompt": f"{i} & ", "chosen": "yes " * (1 + i % 3), "rejected": "no"} for i in range(80)]
    name = tmp_path / "<script>alert(1)<!--.jsonl"
    write_rows(name, rows)
    small = replace(
        config, pairs=str(name), arms="simpo", seeds=1, flip_rates=(0.25,), flip_modes="random", valuation_rates=(),
        curve_rhos=(), curve_anchor_pairs=(), learning_rates=(1e-3,), output_dir=str(tmp_path / "out <b>"),
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    run_study(small)
    page = (tmp_path / "out <b>" / "study.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "out <b>" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flip_rates", "[0.2, 1.4]"], "flip_rates must be in [0, 1], got [0.2, 1.4]"),
        (["--arms", "gapo,simp"], "arms must be among gapo, "),
        (["--arms", "gapo+simp"], "arms has 'gapo+simp'; arms must be among gapo, "),
        (
            ["--arms", "gapo+dpo-rho0"],
            "arms: 'gapo+dpo-rho0' is the same as 'dpo', for without a radius all gaps are 0",
        ),
        (["--arms", "gapo+gapo_target-rho0"], "is the same as 'simpo'"),
        (["--arms", "gapo+gapo-rho0"], "is the same as 'gapo-rho0'"),
        (["--arms", "margin+dpo-gaussian"], "'margin+dpo' has no anchor; take 'margin+dpo'"),
        (
            ["--arms", "dpo-sam", "--settings", "{dpo-sam: {learning_rate: 1e-3, update: policy}}"],
            "update='anchor'; its",
        ),
        (["--arms", ","], "arms must name at least one, or be 'all'; got none"),
        (["--arms", "gapo", "--baseline", "dpo"], "baseline must be among gapo, got 'dpo'"),
        (["--arms", "gapo", "--settings", "{dpo: {learning_rate: 1e-3}}"], "which is not among arms: gapo"),
        (["--arms", "dpo", "--settings", "{dpo: {beta: 0.1}}"], "settings of 'dpo' need a learning_rate > 0, got None"),
        (["--arms", "dpo", "--settings", "{dpo: {learning_rate: 1e-3, rho: 1}}"], "'dpo' has no setting 'rho'"),
        (["--arms", "gapo+dpo", "--settings", "{gapo+dpo: {learning_rate: 1e-3, clip: 1}}"], "has no setting 'clip'"),
        (["--arms", "gapo+dpo", "--settings", "{gapo+dpo: {learning_rate: 1e-3, rho: -1}}"], "rho must be a finite"),
        (["--arms", "gapo-rho0", "--settings", "{gapo-rho0: {learning_rate: 1e-3, rho: 1}}"], "is that of rho=0.0"),
        (["--flip_modes", "colour"], "flip_modes must be among random, length, judge, got 'colour'"),
        (["--curve_anchor_pairs", "[5]"], "curve_anchor_pairs must divide batch_size=32, got 5"),
        (["--seeds", "0"], "seeds must be >= 1, got 0"),
        (["--seed_count", "3"], "seed"),
        (["nowhere.yaml"], "there is no configuration file 'nowhere.yaml'"),
        (["--valuation_share", "1"], "valuation_share must be in (0, 1), got 1"),
        (["--learning_rates", "[]"], "learning_rates must name at least one"),
    ],
)
def test_refused_configurations_say_so_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_few_pairs_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--demo_size", "50", "--output_dir", str(tmp_path / "x")]) == 1
    assert "train_pairs=1000, but only" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_help_names_every_key_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--help"]) == 0
    text = capsys.readouterr().out
    assert "gapo study examples/study_small.yaml" in text
    assert all(f"--{name}" in text for name in vars(StudyConfig()))


@pytest.mark.parametrize("name", ["study_small", "study_comve", "study_anchored"])
def test_the_examples_are_accepted(name: str) -> None:
    config = parse([name])
    assert all(name in ARMS or name == ARMS[name].name for name in config.arm_names)
    assert ("all" in config.arms) == (name == "study_comve")


@pytest.mark.pictures
def test_the_page_in_a_browser(browser: Any, finished: Path, config: StudyConfig, tmp_path: Path) -> None:
    run_study(config)  # other tests may have written the page without its pictures
    page = (finished / "study.html").read_text("utf-8")
    require_readable(browser, page, tmp_path)
    verdict = page.partition("<h1>")[2].partition("</h1>")[0]
    assert "when labels are flipped" in verdict
    assert html.unescape(verdict).replace("\xa0", " ") in (finished / "study.md").read_text("utf-8")
