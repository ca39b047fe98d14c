"""The benchmark of JAX and MLX runs, at the smallest size; the mutation check names modules and tests that exist."""

from __future__ import annotations

import csv
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--pairs", "2", "--tokens", "16", "--width", "64", "--depth", "1", "--vocab", "64", "--seconds", "0"]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of the folder, as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("TMPDIR", os.environ.get("TMPDIR", ""))  # which the benchmark changes
    return script("step_cost_frameworks", monkeypatch)


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


def test_the_memory_of_a_device_is_that_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = script("memory", monkeypatch)
    published = {"mistral": 7_241_732_096, "llama": 8_030_261_248, "gemma": 9_241_705_984}
    for name in memory.MODELS:
        assert memory.layers_of(name)[0] == published[name.split("-")[0]], name
    text = (FOLDER.parent / "docs" / "devices.md").read_text()
    assert "\n".join(memory.table(8)) in text
    # Mistral-Instruct on FSDP2, by hand: its states, and four pairs of 2 x 2048 tokens.
    tokens, parameters = 4 * 2 * 2048, published["mistral"]
    inside = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    step = 4 * parameters / 8 + 4 * tokens * (32 * 4096 + 2 * inside) + 8 * tokens * 32000
    sizes = memory.per_device("mistral-7b-instruct", memory.WAYS["fsdp2"], 8, 4, 2048)
    assert sizes["step"] == pytest.approx(step / 1e9)
    assert sizes["weights"] + sizes["optimizer"] == pytest.approx(16 * parameters / 8 / 1e9)


def test_the_mutation_check_names_modules_and_tests_that_exist() -> None:
    tests = runpy.run_path(str(FOLDER / "mutation_tests.py"))["TESTS"]
    for module, (files, _) in tests.items():
        assert (FOLDER.parent / module).is_file(), module
        for name in files.split():
            assert len(list(FOLDER.parent.glob(f"tests/**/test_{name}.py"))) == 1, (module, name)
    backends = {f"gapo/backends/{kind}.py" for kind in ("jax", "jax_onepass", "numpy", "base")}
    for folder in ("torch/pairgrads", "mlx/pairgrads", "jaxrows"):
        paths = (FOLDER.parent / "gapo" / "backends" / folder).glob("*.py")
        backends |= {f"gapo/backends/{folder}/{path.name}" for path in paths if path.name[0] != "_"}
    assert backends <= {*tests, "gapo/backends/torch/pairgrads/refused.py"}  # which is one exception
