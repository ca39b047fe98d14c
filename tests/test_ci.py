"""The scripts of `.ci` keep up with the tests, and the Makefile installs what each target needs."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

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
        *("axolotl", "llama-factory", "deepspeed"),
    }
    assert all((ROOT / file).is_file() for files in rows.values() for file in files)


def test_every_test_of_a_room_belongs_to_a_row(rows: dict[str, set[str]]) -> None:
    rooms = ("adapters", "core", "data", "runs", "study")
    tests = {path.relative_to(ROOT).as_posix() for room in rooms for path in ROOT.glob(f"tests/{room}/test_*.py")}
    # Of every array library at once: it imports PyTorch and needs the others.
    assert tests - set().union(*rows.values()) == {"tests/core/test_conformance.py"}


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
    assert installs("test") == ["cli", "all,dev"]
    assert installs("test-lowest") == ["all,dev"]
