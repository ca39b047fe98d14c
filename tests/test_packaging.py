"""What the wheel and the source archive hold."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_sdist, build_wheel

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


def test_the_wheel_holds_the_package_and_no_more(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 300_000
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].rsplit("-", 1)[0] for name in names} == {"gapo", "gapo-0.1.0.dist"}
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "gapo").rglob("*") if path.is_file()}
    wanted = {name for name in inside if "__pycache__" not in name}
    assert {name for name in names if name.startswith("gapo/")} == wanted
    assert {"gapo/py.typed", "gapo/experiments/page.html.jinja"} <= wanted


def test_the_source_archive_builds_the_same(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    assert not any(member.issym() or member.islnk() for member in members)
    top = {member.name.split("/")[1] for member in members}
    assert {"gapo", "tests", "docs", "examples", "benchmarks", "README.md", "LICENSE", "pyproject.toml"} <= top
    assert not top & {"adapters", "backends", "runs", ".venv"}


def test_every_extra_is_declared(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    extras = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")}
    assert extras == {"torch", "jax", "mlx", "hf", "flax", "mlx-lm", "cli", "all", "fuzz", "dev"}
    plain = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert [line.split(": ")[1].split(">=")[0] for line in plain] == ["array-api-compat", "numpy"]
    assert "Requires-Python: >=3.10" in metadata
