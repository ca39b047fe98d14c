"""The first sentence of the pages of `gapo train` and `gapo score`, and the pages in a browser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import require_readable

from gapo import data, files, objective
from gapo.runs.output import plots
from gapo.runs.score import score_page
from gapo.runs.score.score_verdict import model_disagrees, weights_say
from gapo.runs.train import train_page
from gapo.runs.train.train_verdict import by_chance, loss_against_accuracy, verdict


def summary(before: float | None, after: float | None, n: int = 400, **more: Any) -> dict[str, Any]:
    values = [{} if x is None else {"eval_rewards/accuracies": x} for x in (before, after)]
    return {"before": values[0], "after": values[1], "held_out_pairs": n, **more}


@pytest.mark.parametrize(
    ("before", "after", "n", "said"),
    [
        (0.521, 0.714, 400, "The policy has learnt: it prefers the chosen answer in 71.4 % of 400 held-out pairs, "
         "52.1 % before training (50 % is a coin toss)."),
        (0.30, 0.52, 400, "The policy has learnt, but not enough to be right more often than a coin: "),
        (0.70, 0.60, 400, "The policy has become worse: "),
        (0.50, 0.57, 400, "No change that 400 held-out pairs could show: "),  # 1.98 standard errors
        (0.50, 0.58, 400, "The policy has learnt: "),  # 2.27
        (0.50, 0.58, 100, "No change that 100 held-out pairs could show: "),
        (0.90, 0.90, 400, "No change that 400 held-out pairs could show: it prefers the chosen answer in 90.0 % of 400 "
         "held-out pairs, 90.0 % before training (50 % is a coin toss), and chance alone moves this by 4.2 points."),
        (None, 0.714, 400, "The policy at the end: it prefers the chosen answer in 71.4 % of 400 held-out pairs (50 %"),
        (0.5, None, 400, "The run has no held-out accuracy"),
        (0.5, math.nan, 400, "The run has no held-out accuracy"),
    ],
)  # fmt: skip
def test_what_a_run_has_learnt(before: float | None, after: float | None, n: int, said: str) -> None:
    assert verdict(summary(before, after, n)).startswith(said)


def test_a_run_that_moved_nothing_has_learnt_nothing() -> None:
    """However many pairs it was evaluated on."""
    assert verdict(summary(0.5, 0.51, 10**6, unmoved="nothing was learnt")).startswith("Nothing was learnt: ")


def test_chance_is_two_standard_errors_of_a_difference() -> None:
    """By drawing: two accuracies of 400 pairs each, whose true values are both 0.7."""
    drawn = np.random.default_rng(0).binomial(400, 0.7, (2, 200_000)) / 400
    assert by_chance(0.69, 0.71, 400) == pytest.approx(2 * np.std(drawn[1] - drawn[0]), rel=0.01)


def test_a_loss_that_rises_while_accuracy_grows_is_explained() -> None:
    def about(loss: tuple[float, float], accuracy: tuple[float, float]) -> str | None:
        rows = [{"eval_loss": x, "eval_rewards/accuracies": y} for x, y in zip(loss, accuracy, strict=True)]
        return loss_against_accuracy({"before": rows[0], "after": rows[1]})

    said = about((0.7, 0.9), (0.5, 0.7))
    assert said is not None
    assert said.startswith("The loss rose from 0.700 to 0.900 although accuracy grew.")
    assert about((0.7, 0.6), (0.5, 0.7)) is about((0.7, 0.9), (0.7, 0.5)) is None
    assert loss_against_accuracy(summary(0.5, 0.7)) is None


def render_report(folder: Path, weights: Any = objective.weights) -> str:
    """The report of 40 steps of 8 pairs, whose gaps spread and whose loss rose with their accuracy."""
    rng, flipped = np.random.default_rng(0), np.arange(8) < 2
    steps = []
    for i in range(40):
        gaps = 0.3 * rng.normal(size=8) + 0.4 * flipped
        columns = {"margins": -gaps, "anchor_gaps": gaps, "weights": weights(gaps), "is_flipped": flipped.astype(int)}
        steps.append({"step": i + 1, **{name: column.tolist() for name, column in columns.items()}})
    metrics = [
        {"step": i, "eval_loss": 0.7 + i / 400, "eval_rewards/accuracies": 0.5 + i / 200, "eval_rewards/margins": 0.1}
        | {"eval_logps/chosen": -1.0, "eval_logps/rejected": -1.1, "rewards/accuracies": 0.5, "rewards/margins": 0.0}
        for i in range(0, 41, 10)
    ]
    files.write_rows(folder / "steps.jsonl", steps)
    files.write_rows(folder / "metrics.jsonl", metrics)
    (folder / "config.json").write_text(json.dumps({"beta": 2.5, "gamma": 0.25, "rho": 0.3, "long": "x" * 300}))
    (folder / "data.txt").write_text("pairs " + "y" * 300 + "\n")
    about = {"before": metrics[0], "after": metrics[-1], "loss": "gapo", "seconds": 1.0, "versions": {"torch": "2"}}
    about |= {"needs_anchor": True, "train_pairs": 320, "flipped": 80, "held_out_pairs": 400, "weighs_by_gap": True}
    return train_page.render(folder, about)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_report(tmp_path_factory.mktemp("run"))


def ticks(text: str, title: str) -> list[str]:
    """What a picture's axes are labelled with."""
    picture = text[text.index(f'aria-label="{title}"') :].partition("</svg>")[0].replace("\N{MINUS SIGN}", "-")
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture)


def test_the_report_of_a_training_in_a_browser(browser: Any, report: str, tmp_path: Path) -> None:
    require_readable(browser, report, tmp_path)
    assert "Loss and accuracy disagree:" in report
    assert "is how hard the update pulls at it, from 0 to beta = 2.5: the larger the gap" in " ".join(report.split())
    assert "is how much of its margin is lost" in report
    assert "Select models on the held-out loss" not in report


def test_axes_are_honest(report: str, tmp_path: Path) -> None:
    """Weights from 0 to beta, a line at 50 %, and a span below which noise would look like a trend."""
    for title in (
        "Weights of the pairs",
        "Weight of flipped and of clean pairs",
        "Weights in the last quarter of the run",
    ):
        assert {"0.0", "2.5"} <= set(ticks(report, title))
    assert "coin toss, 50 %" in ticks(report, "Reward accuracy")
    for title, least in (("Log-probabilities, held-out pairs", 0.15), ("Reward margins", 0.3)):
        heights = [float(tick) for tick in ticks(report, title) if re.fullmatch(r"-?\d*\.\d+", tick)]
        assert max(heights) - min(heights) >= least


@pytest.mark.pictures
def test_weights_of_another_form_have_no_beta_to_end_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings: list[float | None] = []
    for weight in (0.0, 0.1):
        assert plots.histogram("", "", np.full(8, weight), None, (0.0, weight)).startswith("<svg")
    monkeypatch.setattr(train_page, "_pictures", lambda *values: ceilings.append(values[-1]) or [])
    text = render_report(tmp_path, lambda gaps: np.full(len(gaps), 0.1))
    assert "is how hard the update pulls at it.</p>" in text
    render_report(tmp_path)
    assert ceilings == [None, 2.5]


def saying(margins: Any, gaps: Any, flips: int, said: list[str | None] | None = None) -> str:
    """What the page says of scores whose first `flips` labels are flipped."""
    values = {"gap": gaps, "weight": objective.weights(gaps), "margin": margins}
    return weights_say(values, score_page.flips(values, np.arange(len(gaps)) < flips), 2.5, said or [None])


def test_what_scores_say() -> None:
    rng, flipped = np.random.default_rng(0), np.arange(200) < 40
    gaps = 0.3 * rng.normal(size=200) + 0.5 * flipped
    low, high = (np.sort(objective.weights(gaps))[place] for place in (20, 180))
    text = saying(-gaps, gaps, 40)
    pattern = (
        r"The weights tell the pairs apart: a tenth of the pairs weighs ([\d.]+) or less, a tenth ([\d.]+) or more, "
        r"on a scale from 0 to 2.5. Low weights show which labels are flipped: AUROC 0.[89]"
    )
    numbers = re.match(pattern, text)
    assert numbers is not None
    assert [float(x) for x in numbers.groups()] == pytest.approx([low, high], abs=0.03)
    assert "(chance: 0.50 ± 0.10)" in text
    assert "margins" not in text
    assert re.search(r"low margins do better, (0.99|1.00) \(chance", saying(-gaps - flipped, gaps, 40))
    assert "Low weights do not show which labels are flipped: AUROC" in saying(-gaps[::-1], gaps[::-1], 40)
    assert "flipped" not in saying(-gaps, gaps, 0)
    assert saying(-gaps, 0 * gaps, 0).startswith("Every gap is 0: rho is 0, all weights are equal")
    assert saying(-gaps, gaps, 0, ["all are equal; do this"]) == "All are equal; do this."
    assert saying(-gaps, gaps, 0, ["all are equal", None]).startswith("The weights tell the pairs apart")


@pytest.mark.parametrize(
    ("right", "said"),
    [
        (140, None),
        (116, None),  # of 200 pairs: 50 +- 7.1 % by chance
        (113, "the model prefers the chosen answer in 56.5 % of 200 pairs, and so does a coin."),
        (60, "the model prefers the rejected answer in 70.0 % of 200 pairs. Are the two the wrong way round?"),
    ],
)
def test_a_model_that_does_not_know_the_pairs(right: int, said: str | None) -> None:
    text = model_disagrees(np.where(np.arange(200) < right, 1.0, -1.0))
    assert (text is None) if said is None else text is not None and text.startswith(said)


@pytest.mark.pictures
def test_the_page_of_scores_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """Several models with long names, whose weights are all equal."""
    rows: list[dict[str, Any]] = [{**row, "is_flipped": i < 8} for i, row in enumerate(data.generate_pairs(40))]
    rows[0] |= {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}], "id": "z" * 80}
    names = [f"runs/a-folder-with-a-long-name/checkpoint-{i}" for i in range(6)]
    scores = [
        {"row": i, "checkpoint": name, "margin": (i % 2) - 0.5, "gap": i / 1e6, "weight": 1.4}
        for name in names
        for i in range(40)
    ]
    settings = {"beta": 2.5, "gamma": 0.25, "loss_type": "sigmoid", "rho": 0.3, "pairs": "p", "models": names}
    settings |= {
        "repeats": 1,
        "batch_size": 8,
        "adaptive": True,
        "anchor": "exact",
        "first_order_ratio": 1.0,
        "versions": {},
    }
    text = score_page.render(rows, scores, settings, "scores")
    require_readable(browser, text, tmp_path)
    assert "<h1>The weights of the pairs are all equal, so that nothing is reweighted" in text
    assert "Look at the margins:" in text
    assert text.count("Look at the weights of runs/a-folder") == 6
    assert "user: Hi\n\nassistant: Yes?" in text
    assert {"0.0", "2.5"} <= set(ticks(text, "Weights"))
