"""A study of a saved model whose last layers train: what its runs keep and lose, a judge's noise, noisy validation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from scipy import stats

from gapo.data import generate_pairs, write_rows
from gapo.runs.policy.aside import SEQUENCE, drift, perplexity
from gapo.study import grid as grid_module
from gapo.study.cell_run import draw, measure, train
from gapo.study.cells import Cell, settings_key
from gapo.study.material import Material, load_split
from gapo.study.outcome import Study
from gapo.study.statistics import detectable
from gapo.study.study import run_study
from gapo.study.study_config import StudyConfig
from gapo.study.tune import tune

TEXT = "It was the best of times, it was the worst of times. " * 200


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    folder = tmp_path_factory.mktemp("pretrained")
    hf_models.make("llama", layers=2).save_pretrained(folder / "model")
    hf_models.tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "other.jsonl", generate_pairs(6, seed=9))
    (folder / "plain.txt").write_text(TEXT)
    return StudyConfig(
        demo_size=60,
        model=str(folder / "model"),
        train_layers=1,
        train_pairs=16,
        epochs=2,
        validation_pairs=10,
        test_pairs=12,
        batch_size=8,
        seeds=2,
        flip_modes="random,judge",
        flip_rates=(0.25,),
        learning_rates=(3e-2,),
        arms="dpo,gapo",
        baseline="dpo",
        validation_labels="both",
        checks=2,
        check_pairs=5,
        transfer_pairs=str(folder / "other.jsonl"),
        plain_text=str(folder / "plain.txt"),
        max_length=64,
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        workers=1,
    )


@pytest.fixture(scope="module")
def material(config: StudyConfig) -> Material:
    return Material(config, load_split(config))


@pytest.fixture(scope="module")
def study(config: StudyConfig) -> Study:
    return run_study(config)


def cell(**more: Any) -> Cell:
    settings = settings_key({"beta": 0.1, "learning_rate": 3e-2})
    return Cell("dpo", settings, **{"mode": "random", "rate": 0.25, "seed": 0, **more})


def test_a_run_says_what_it_fitted_kept_and_lost(material: Material, config: StudyConfig) -> None:
    record = measure(material, config, cell(rate=0.3125))
    drawn = draw(material, config, "random", 0.3125, 0)
    assert drawn.is_flipped.sum() == 5
    labelled = np.subtract(*material.logps([material.tokens["pool"][i] for i in drawn.rows]).T)
    labelled[drawn.is_flipped] *= -1
    assert record["fitted"] == {
        "flipped": pytest.approx((labelled[drawn.is_flipped] > 0).mean()),
        "clean": pytest.approx((labelled[~drawn.is_flipped] > 0).mean()),
    }
    assert [point["step"] for point in record["course"]] == [2, 4]
    assert record["course"][-1]["accuracy"] == np.mean(np.subtract(*material.logps(material.tokens["test"][:5]).T) > 0)
    assert len(material.tokens["transfer"]) == 5  # check_pairs of the six
    assert record["transfer"]["accuracy"] == np.mean(np.subtract(*material.logps(material.tokens["transfer"]).T) > 0)
    assert record["perplexity"] == pytest.approx(perplexity(material, material.text))
    assert record["perplexity"] != material.plain
    assert record["drift"] > 0
    material.reset()
    assert drift(material, material.tokens["test"]) == pytest.approx(0, abs=1e-6)
    assert perplexity(material, material.text) == pytest.approx(material.plain)


def test_perplexity_is_that_of_the_loss_of_transformers(material: Material, config: StudyConfig) -> None:
    train(material, config, "dpo", {"beta": 0.1, "learning_rate": 3e-2}, draw(material, config, "random", 0.25, 0))
    assert {len(piece["ids"]) for piece in material.text} == {SEQUENCE}
    ids = torch.tensor([piece["ids"] for piece in material.text])
    with torch.no_grad():
        loss = float(material.model(input_ids=ids, labels=ids).loss)
    assert perplexity(material, material.text) == pytest.approx(math.exp(loss), rel=1e-4)


def test_drift_is_the_divergence_of_the_whole_distributions(material: Material, config: StudyConfig) -> None:
    train(material, config, "dpo", {"beta": 0.1, "learning_rate": 3e-2}, draw(material, config, "random", 0.25, 0))
    rows = material.tokens["test"][:3]
    inputs = [(row[f"{side}_input_ids"], row[f"{side}_labels"]) for row in rows for side in ("chosen", "rejected")]

    def predicted() -> list[torch.Tensor]:
        with torch.no_grad():
            outs = [material.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1).double() for ids, _ in inputs]
        return [p[:-1][torch.tensor(labels[1:]) != -100] for p, (_, labels) in zip(outs, inputs, strict=True)]

    now = torch.cat(predicted())
    measured = drift(material, rows)
    assert torch.equal(torch.cat(predicted()), now)  # the weights are those of before
    material.reset()
    start = torch.cat(predicted())
    assert measured == pytest.approx(float((now * (now / start).log()).sum(-1).mean()), rel=1e-3)


def test_a_judge_errs_where_the_policy_is_surest_of_the_wrong_answer(material: Material, config: StudyConfig) -> None:
    drawn = draw(material, config, "judge", 0.25, 1)
    margins = np.subtract(*material.start["pool"][drawn.rows].T)
    assert drawn.is_flipped.sum() == 4
    assert set(np.flatnonzero(drawn.is_flipped)) == set(np.argsort(margins)[:4])
    np.testing.assert_array_equal(drawn.rows, draw(material, config, "random", 0.25, 1).rows)
    wrong = (margins < 0).mean()
    with pytest.raises(ValueError, match=rf"only {(margins < 0).sum()} of 16 pairs wrong: the greatest rate here is"):
        draw(material, config, "judge", wrong + 0.1, 1)


def test_noisy_validation_labels_are_wrong_on_the_share_of_the_tries(material: Material, config: StudyConfig) -> None:
    record = measure(material, replace(config, tune_flip_rate=0.0), cell(judged_on="validation"))
    assert record["noisy_accuracy"] == record["evaluation"]["accuracy"]
    every = measure(material, replace(config, tune_flip_rate=1.0), cell(judged_on="validation"))
    assert every["noisy_accuracy"] == pytest.approx(1 - every["evaluation"]["accuracy"])
    part = measure(material, replace(config, tune_flip_rate=0.2), cell(judged_on="validation"))
    assert abs(part["noisy_accuracy"] - part["evaluation"]["accuracy"]) * 10 <= 2 + 1e-9  # of 10 pairs


def test_the_study_shows_what_the_runs_did_besides(study: Study, config: StudyConfig) -> None:
    assert set(study.parts) >= {"grid", "noisy choice"}
    assert study.facts["trained"] < study.facts["parameters"]
    text = Path(config.output_dir, "study.md").read_text()
    asides = text[text.index("## What else the runs did") : text.index("## Settings chosen on noisy labels")]
    assert "before training" in asides
    for heading in ("flipped pairs fitted", "accuracy on the other pairs", "KL from the start", "perplexity"):
        assert heading in asides
    noisy = text[text.index("## Settings chosen on noisy labels") :]
    assert "| DPO | beta" in noisy
    assert "minus the clean choice" in noisy
    assert "Four of five such studies would find a true difference of" in text
    assert "judge that is sure where it is wrong" in text
    page = Path(config.output_dir, "study.html").read_text()
    assert "What else the runs did" in page
    tries = study.chosen_by["noisy"]
    assert set(tries) == {"dpo", "gapo"}


class Judged:
    """A grid whose runs are the better by true labels, and the worse by noisy ones, the higher the learning rate."""

    def run(self, cells: list[Cell], title: str) -> dict[Cell, dict[str, Any]]:
        rates = {cell: dict(cell.settings)["learning_rate"] for cell in cells}
        return {cell: {"evaluation": {"accuracy": rate}, "noisy_accuracy": 1 - rate} for cell, rate in rates.items()}


def test_settings_are_chosen_by_the_labels_that_are_asked_for(config: StudyConfig) -> None:
    tried = replace(config, learning_rates=(1e-3, 1e-2))
    chosen = {labels: tune(tried, Judged(), labels)[0]["dpo"]["learning_rate"] for labels in ("clean", "noisy")}  # type: ignore[arg-type]
    assert chosen["noisy"] < 1e-3 < 1e-2 < chosen["clean"]


@pytest.mark.parametrize(("rounds", "tries"), [(1, 2), (2, 6), (3, 8)])
def test_a_study_may_end_its_tries_early(config: StudyConfig, rounds: int, tries: int) -> None:
    every = tune(replace(config, learning_rates=(1e-3, 1e-2), tune_rounds=rounds), Judged())[1]  # type: ignore[arg-type]
    assert [sum(row["arm"] == name for row in every) for name in ("dpo", "gapo")] == [tries, tries]
    betas = {row["beta"] for row in every if row["arm"] == "dpo"}
    assert len(betas) == (1 if rounds == 1 else 5)


@pytest.mark.parametrize("arm", ["re_po", "gapo+re_po", "re_po-sam", "margin+alpha_dpo", "beta_dpo"])
def test_runs_of_before_running_statistics_were_handed_on_are_not_taken(arm: str) -> None:
    assert [grid_module._format_of(name) for name in (arm, "dpo", "gapo+dpo", "gapo")] == [3, 2, 2, 2]


def test_radii_are_scaled_and_nothing_else_is(config: StudyConfig) -> None:
    """0.4 times those of docs/study.md: 1, 0.1, 0.25, 0.5, 2 for GAPO, 0.5 where the radius is held."""
    arms = "gapo,gapo-rho0,gapo+dpo,dpo"
    chosen = {
        scale: tune(replace(config, arms=arms, rho_scale=scale, tune_rounds=2), Judged())  # type: ignore[arg-type]
        for scale in (1.0, 0.4)
    }
    tried = {row["rho"] for row in chosen[0.4][1] if row["arm"] == "gapo"}
    assert tried == {0.4, 0.04, 0.1, 0.2, 0.8}
    assert chosen[0.4][0]["gapo+dpo"]["rho"] == 0.2
    assert {row["rho"] for row in chosen[0.4][1] if row["arm"] == "gapo-rho0"} == {0.0}
    assert chosen[0.4][0]["dpo"] == chosen[1.0][0]["dpo"]


@pytest.mark.parametrize("wrong", [{"tune_rounds": 0}, {"tune_rounds": 4}, {"rho_scale": 0.0}, {"rho_scale": math.inf}])
def test_other_rounds_and_scales_are_refused(config: StudyConfig, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(config, **wrong)


def test_four_of_five_studies_find_a_detectable_difference() -> None:
    rng = np.random.default_rng(0)
    for n in (5, 12):
        true = detectable(1 / math.sqrt(n), n)  # of seeds whose differences have a deviation of 1
        draws = rng.normal(true, 1, (4000, n))
        t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(n))
        assert (t > stats.t.ppf(0.975, n - 1)).mean() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_layers": 0}, "train_layers must be >= 1, or none"),
        ({"checks": -1}, "checks must be >= 0"),
        ({"check_pairs": 0}, "check_pairs must be >= 1"),
    ],
)
def test_refused_settings(config: StudyConfig, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **settings)
