"""`gapo train --ld_alpha --use_weighting`: policy and reference by the same sums on every backend; refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from frameworks import require
from quick_runs import train

from gapo import files

OPTIONS: dict[str, Any] = {
    "loss": "dpo",
    "ld_alpha": 0.4,
    "use_weighting": True,
    "flip_rate": 0.0,
    "max_steps": 2,
    "learning_rate": 0.02,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import hf_models

    folder = tmp_path_factory.mktemp("model")
    hf_models.make("llama").save_pretrained(folder)
    hf_models.tokenizer().save_pretrained(folder)
    return str(folder)


def evaluations(folder: Path, **options: Any) -> list[dict[str, float]]:
    folder.mkdir()
    assert train(folder, **{**OPTIONS, **options}) == 0
    return [row for row in files.read_lines(folder / "run" / "metrics.jsonl") if "eval_loss" in row]


@pytest.mark.slow
def test_backends_agree_and_the_reference_is_measured_alike(model: str, tmp_path: Path) -> None:
    """At the start z is 0 for every pair, and the loss log 2 times the mean weight. Two kinds of sums would move it."""
    for library in ("flax", "mlx_lm"):
        require(library)
    rows = {name: evaluations(tmp_path / name, model=model, backend=name) for name in ("torch", "jax", "mlx")}
    plain = evaluations(tmp_path / "plain", model=model, ld_alpha=None, use_weighting=False)
    assert plain[0]["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    start = rows["torch"][0]
    assert abs(start["eval_loss"] / math.log(2) - 1) > 0.01
    assert abs(start["eval_logps/chosen"] / plain[0]["eval_logps/chosen"] - 1) > 0.01
    for name, found in rows.items():
        assert found[0]["eval_reference/margins"] == pytest.approx(0, abs=1e-4), name
        for key in ("eval_loss", "eval_logps/chosen"):
            assert found[0][key] == pytest.approx(start[key], rel=1e-4), (name, key)
        assert found[-1]["eval_reference/margins"] > 0.01, name
    config = json.loads((tmp_path / "torch" / "run" / "config.json").read_text())
    assert (config["ld_alpha"], config["use_weighting"]) == (0.4, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ld_alpha": 1.5}, r"ld_alpha must be a finite number in [0, 1], or None, got 1.5"),
        ({"loss": "dr_dpo"}, "use_weighting weights the loss of each pair, and objective 'dr_dpo' is one loss"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert train(tmp_path, **{**OPTIONS, **options}) == 2
    assert message in capsys.readouterr().err
