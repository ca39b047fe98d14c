"""The room of the runs: what its modules load, and the address that `score` had before."""

from __future__ import annotations

import subprocess
import sys

import pytest
from frameworks import require


def test_no_parser_stands_behind_models_errors_and_settings() -> None:
    require("flax")
    code = """
import importlib, sys
for module in ("errors", "train.train_config", "train.loss_option", "score", "models.llama"):
    importlib.import_module(f"gapo.runs.{module}")
    if "jsonargparse" in sys.modules:
        sys.exit(module)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_score_is_importable_from_its_former_address() -> None:
    from gapo.experiments.score import ScoreConfig, score
    from gapo.runs.score import ScoreConfig as Same
    from gapo.runs.score.flow import score as same

    assert ScoreConfig is Same
    assert score is same
    with pytest.raises(AttributeError, match=r"'gapo.experiments.score' has no attribute 'scores'"):
        __import__("gapo.experiments.score", fromlist=["scores"]).scores  # noqa: B018
