"""The benchmark of JAX and MLX runs, at the smallest size, and its rows say what was measured."""

from __future__ import annotations

import csv
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--pairs", "2", "--tokens", "16", "--width", "64", "--depth", "1", "--vocab", "64", "--seconds", "0"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("TMPDIR", os.environ.get("TMPDIR", ""))  # which the benchmark changes
    spec = importlib.util.spec_from_file_location("step_cost_frameworks", FOLDER / "step_cost_frameworks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("options", [["--framework", "jax", "--lora"], ["--framework", "mlx", "--eager"]])
def test_the_benchmark_of_frameworks_runs(
    benchmark: Any, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, *SMALL, "--output", str(output)])
    benchmark.main()
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["simpo", "gapo exact", "gapo first_order"]
    assert rows[0]["ratio"] == rows[0]["temporary_ratio"] == "1.0"
    for row in rows:
        assert int(row["rounds"]) == 3
        assert 0 < float(row["ratio_25"]) <= float(row["ratio"]) <= float(row["ratio_75"])
        assert float(row["temporary_mib"]) > 0
        assert row["framework"] != "jax" or float(row["flop_ratio"]) >= 1
    assert float(rows[1]["seconds"]) > 0
