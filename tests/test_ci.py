"""The scripts of `.ci` keep up with the tests, and the Makefile installs what each target needs."""

from __future__ import annotations

import ast
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())


@pytest.fixture(scope="module")
def rows() -> dict[str, set[str]]:
    """The test files of each row of `.ci/extras`."""
    done = subprocess.run([ROOT / ".ci" / "extras", "--files"], capture_output=True, text=True, check=True)
    files = defaultdict(set)
    for line in done.stdout.splitlines():
        row, file = line.split()
        files[row].add(file)
    return files


def test_every_row_has_tests_that_exist(rows: dict[str, set[str]]) -> None:
    assert rows.keys() == {
        *("core", "torch", "jax", "mlx", "hf", "flax", "mlx-lm", "cli", "study"),
        *("axolotl", "llama-factory", "hf-lowest", "deepspeed"),
    }
    assert all((ROOT / file).is_file() for files in rows.values() for file in files)


def test_every_test_of_a_room_belongs_to_a_row(rows: dict[str, set[str]]) -> None:
    rooms = ("adapters", "core", "data", "runs", "study")
    tests = {path.relative_to(ROOT).as_posix() for room in rooms for path in ROOT.glob(f"tests/{room}/**/test_*.py")}
    # Of every array library at once: they import PyTorch and need the others.
    of_all = {"tests/core/test_conformance.py", "tests/adapters/test_update_in_adapters.py"}
    assert tests - set().union(*rows.values()) == of_all


def test_an_unknown_row_is_refused() -> None:
    done = subprocess.run([ROOT / ".ci" / "extras", "hfx"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no row hfx" in done.stderr


def test_the_demonstration_installs_the_command_line_alone() -> None:
    def installs(target: str) -> list[str]:
        command = ["make", "--dry-run", "--always-make", "-C", str(ROOT), target]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [line.split('".[')[1].split("]")[0] for line in done.stdout.splitlines() if "--editable" in line]

    assert installs("demo") == ["cli"]
    assert installs("test") == ["all,dev"]
    assert installs("test-lowest") == ["all,dev"]


def test_the_workflows_run_what_exists(rows: dict[str, set[str]]) -> None:
    workflows = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in ROOT.glob(".github/workflows/*.yml")}
    jobs = {name: job for workflow in workflows.values() for name, job in workflow["jobs"].items()}
    assert set(jobs["extras"]["strategy"]["matrix"]["row"]) == set(rows)
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands += jobs["others"]["strategy"]["matrix"]["command"]
    assert ".ci/run" in commands
    targets = (ROOT / "Makefile").read_text("utf-8")
    for command in commands:
        if command.startswith("make "):
            assert f"\n{command.removeprefix('make ')}:" in targets
        elif command.startswith(".ci/"):
            assert (ROOT / command.split()[0]).stat().st_mode & 0o111
    nightly = (ROOT / ".ci" / "nightly").read_text("utf-8").splitlines()
    assert {*nightly} >= {*jobs["others"]["strategy"]["matrix"]["command"], ".ci/extras"}
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        yaml.safe_load(form.read_text("utf-8"))


def test_no_telemetry() -> None:
    """No module opens the network itself.

    The Hub's library is imported for the class of a model card, and to ask for a model that is to be loaded from there;
    `socket` for the host's name.
    """
    network = {"urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub"}
    imports = [
        (path.relative_to(ROOT).as_posix(), name)
        for path in sorted((ROOT / "gapo").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name and name.split(".")[0] in network
    ]
    asked = [("gapo/runs/paths.py", name) for name in ("huggingface_hub", "huggingface_hub.errors")]
    assert imports == [("gapo/adapters/hf/trainer.py", "huggingface_hub"), *asked]
