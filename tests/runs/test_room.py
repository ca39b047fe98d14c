"""The room of the runs: what its modules load, and the address that `score` had before."""

from __future__ import annotations

import subprocess
import sys

import pytest
from frameworks import require


@pytest.mark.parametrize("module", ["models.llama", "errors", "train.train_config", "score", "train.loss_option"])
def test_no_parser_stands_behind_models_errors_and_settings(module: str) -> None:
    if module == "models.llama":
        require("flax")
    code = f"import sys, gapo.runs.{module}; sys.exit('jsonargparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_score_is_importable_from_its_former_address() -> None:
    from gapo.experiments.score import ScoreConfig, score
    from gapo.runs.score import ScoreConfig as Same
    from gapo.runs.score.flow import score as same

    assert ScoreConfig is Same
    assert score is same
    with pytest.raises(AttributeError, match=r"'gapo.experiments.score' has no attribute 'scores'"):
        __import__("gapo.experiments.score", fromlist=["scores"]).scores  # noqa: B018
