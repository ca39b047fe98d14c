"""What the wheel and the source archive hold, and what the wheel says of itself."""

from __future__ import annotations

import configparser
import importlib.util
import re
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
    assert next(built.glob("*.whl")).stat().st_size < 600_000
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
    others_ask_for_more = {"transformers": "5.7.0", "datasets": "4.7.0"}  # mlx-lm and TRL: see .ci/extras hf-lowest
    for name, version in others_ask_for_more.items():
        assert floors.pop(name) < Version(version) == Version(lowest[name])
    assert {name: Version(lowest[name]) for name in floors} == floors


def test_what_an_index_shows(metadata: Message, wheel: zipfile.ZipFile) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    licence = f"gapo-{gapo.__version__}.dist-info/licenses/LICENSE"
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme, shown = (ROOT / "README.md").read_text(), metadata.get_payload()
    assert "](docs/" in readme
    assert not re.findall(r"\]\((?!https?:|#)", without_code(shown))
    assert [line for line in shown.splitlines() if line.startswith("#")] == [
        line for line in readme.splitlines() if line.startswith("#")
    ]
    assert metadata["Project-URL"] == "Paper, https://arxiv.org/abs/2602.04909"
    pythons = [
        line for line in metadata.get_all("Classifier") if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert [line.rsplit(" ", 1)[1] for line in pythons] == ["3.10", "3.11", "3.12", "3.13"]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def test_links_of_the_readme_are_absolute_where_an_index_shows_it() -> None:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (
        "[a *page*](docs/a.md#part) and ![a picture](docs/b.svg), [paper](https://x.org/1), [below](#below)\n"
        "```python\nsteps[0](batch)\n```\n[again](LICENSE)\n"
    )
    assert module.for_index(text, "https://host.org/o/gapo/") == (
        "[a *page*](https://host.org/o/gapo/blob/HEAD/docs/a.md#part) and "
        "![a picture](https://host.org/o/gapo/raw/HEAD/docs/b.svg), [paper](https://x.org/1), [below](#below)\n"
        "```python\nsteps[0](batch)\n```\n[again](https://host.org/o/gapo/blob/HEAD/LICENSE)\n"
    )
    assert module.for_index(text, None) == (
        "a *page* and , [paper](https://x.org/1), [below](#below)\n```python\nsteps[0](batch)\n```\nagain\n"
    )


# What others that train ask for, in their newest version of 26 November 2026: the highest that each admits.
BESIDE = {
    "Axolotl 0.19.0": {"transformers": "5.16.1", "datasets": "4.8.4", "peft": "0.20.0", "accelerate": "1.13.0"},
    "Unsloth 2026.10.9": {"transformers": "5.17.0", "datasets": "4.8.5", "peft": "0.21.2", "accelerate": "1.15.0"},
    "LLaMA-Factory 0.9.5": {"transformers": "5.6.0", "datasets": "4.0.0", "peft": "0.18.1", "accelerate": "1.11.0"},
    "OpenRLHF 0.11.2": {"transformers": "5.15.0"},
    "EasyDeL 0.3.0": {"transformers": "5.5.4"},
}


def of_hf(metadata: Message) -> list[Requirement]:
    requirements = map(Requirement, metadata.get_all("Requires-Dist"))
    wanted = [r for r in requirements if r.marker and r.marker.evaluate({"extra": "hf"})]
    return [r for r in wanted if r.name != "torch"]  # of versions before 2.13 only CUDA files are on the index


@pytest.mark.parametrize("other", BESIDE)
def test_the_adapter_installs_beside_others(other: str, metadata: Message) -> None:
    ranges = {requirement.name: requirement.specifier for requirement in of_hf(metadata)}
    assert ranges.keys() == {"transformers", "datasets", "peft", "accelerate"}
    for name, version in BESIDE[other].items():
        assert version in ranges[name], f"{other} has {name} {version}, gapo[hf] asks for {ranges[name]}"
    constraints = ROOT / ".ci" / f"constraints-{other.split()[0].lower()}.txt"
    if constraints.exists():  # a row of .ci/extras runs the tests on these
        pins = constraints.read_text().splitlines()
        assert {f"{name}=={version}" for name, version in BESIDE[other].items()} <= set(pins)


def test_the_row_of_the_lowest_has_the_floors(metadata: Message) -> None:
    lines = (ROOT / ".ci" / "constraints-hf-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    floors = {requirement.name: Version(next(iter(requirement.specifier)).version) for requirement in of_hf(metadata)}
    assert {name: Version(pins[name]) for name in floors} == floors


def test_the_command_is_the_module(wheel: zipfile.ZipFile) -> None:
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(f"gapo-{gapo.__version__}.dist-info/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"gapo": "gapo.cli:main"}
    for argument, expected in (("--version", f"gapo {gapo.__version__}"), ("--help", "usage: gapo")):
        done = subprocess.run([sys.executable, "-m", "gapo", argument], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(expected)
