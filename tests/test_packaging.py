"""What the wheel and the source archive hold, and what the wheel says of itself."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.build import build_sdist, build_wheel
from packaging.requirements import Requirement
from packaging.version import Version

import gapo

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both archives."""
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build_wheel(str(folder))
        build_sdist(str(folder))
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(wheel.read(f"gapo-{gapo.__version__}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_no_more(built: Path, wheel: zipfile.ZipFile) -> None:
    assert next(built.glob("*.whl")).stat().st_size < 500_000
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"gapo", f"gapo-{gapo.__version__}.dist-info"}
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "gapo").rglob("*") if path.is_file()}
    wanted = {name for name in inside if "__pycache__" not in name}
    assert {name for name in names if name.startswith("gapo/")} == wanted
    assert {"gapo/py.typed", "gapo/runs/output/page.html.jinja", "gapo/examples/demo.yaml"} <= wanted


def test_the_source_archive_builds_the_same(built: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
        assert not any(member.issym() or member.islnk() for member in members)
        opened.extractall(tmp_path, filter="data")
    top = {member.name.split("/")[1] for member in members}
    assert {"gapo", "tests", "docs", "benchmarks", "README.md", "LICENSE", "pyproject.toml"} <= top
    assert not top & {"adapters", "backends", "examples", "runs", ".venv"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / f"gapo-{gapo.__version__}")
        again = zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path)))
    assert {name: again.read(name) for name in again.namelist()} == {
        name: wheel.read(name) for name in wheel.namelist()
    }


def test_every_extra_is_declared(metadata: Message) -> None:
    extras = {"torch", "jax", "mlx", "hf", "flax", "mlx-lm", "cli", "study", "all", "fuzz", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [Requirement(line).name for line in plain] == ["array-api-compat", "numpy"]
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_floors_are_the_versions_that_test_lowest_installs(metadata: Message) -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if not line.startswith("#"))
    floors = {}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if requirement.name != "gapo":
            (bound,) = requirement.specifier
            assert bound.operator == ">=", requirement
            floors[requirement.name.lower()] = Version(bound.version)
    assert len(floors) > 25
    del floors["torch"]  # of versions before 2.13 only CUDA files are on the index
    assert {name: Version(lowest[name]) for name in floors} == floors


def test_what_an_index_shows(metadata: Message, wheel: zipfile.ZipFile) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    licence = f"gapo-{gapo.__version__}.dist-info/licenses/LICENSE"
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert metadata["Project-URL"] == "Paper, https://arxiv.org/abs/2602.04909"
    pythons = [
        line for line in metadata.get_all("Classifier") if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert [line.rsplit(" ", 1)[1] for line in pythons] == ["3.10", "3.11", "3.12", "3.13"]


def test_the_command_is_the_module(wheel: zipfile.ZipFile) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"gapo-{gapo.__version__}.dist-info/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"gapo": "gapo.cli:main"}
    for argument, expected in (("--version", f"gapo {gapo.__version__}"), ("--help", "usage: gapo")):
        done = subprocess.run([sys.executable, "-m", "gapo", argument], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(expected)
