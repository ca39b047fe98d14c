"""What `import gapo` loads, how long it takes, and what is public."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gapo

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ("torch", "jax", "mlx", "transformers", "flax", "tensorflow", "cupy", "matplotlib", "datasets")
PUBLIC = ["GAPOConfig", "StepResult", "anchor_gap", "audit", "loss", "sequence_logps", "value_and_grad", "weights"]


def loaded_after(statement: str) -> dict:
    """Modules loaded by `statement` in a new interpreter, and what it took besides NumPy's import, in CPU seconds."""
    code = f"""
import json, sys, time
import numpy
start = time.process_time()
{statement}
seconds = time.process_time() - start
print(json.dumps({{"modules": sorted(sys.modules), "seconds": seconds}}))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "statement", ["import gapo", "import gapo.data, gapo.cli, gapo.metrics, gapo.objectives, gapo.backends.numpy"]
)
def test_no_framework_is_loaded(statement: str) -> None:
    found = loaded_after(statement)["modules"]
    assert "gapo.step" in found
    assert [name for name in FRAMEWORKS if name in found] == []


def test_import_is_quick() -> None:
    seconds = min(loaded_after("import gapo")["seconds"] for _ in range(3))
    assert seconds < 0.3


def test_the_check_can_fail() -> None:
    assert "mlx" in loaded_after("import gapo.backends.mlx")["modules"]  # the one that loads quickest


def test_public_surface() -> None:
    assert sorted(gapo.__all__) == PUBLIC
    assert all(getattr(gapo, name).__doc__ for name in PUBLIC)
    assert re.fullmatch(r"\d+\.\d+\.\d+", gapo.__version__)


@pytest.mark.parametrize(
    ("adapter", "library", "extra"),
    [
        ("hf", "transformers", "hf"),
        ("flax", "flax", "flax"),
        ("mlx_lm", "mlx_lm", "mlx-lm"),
        ("mlx_lm", "mlx", "mlx-lm"),
    ],
)
def test_an_absent_library_names_the_extra(adapter: str, library: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{library!r}] = None
try:
    import gapo.adapters.{adapter}
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f'which is not installed: pip install "gapo[{extra}]"' in done.stdout
    assert library in done.stdout


def test_links_at_the_top() -> None:
    for name in ("backends", "adapters"):
        link = ROOT / name
        assert link.is_symlink()
        assert link.resolve() == (ROOT / "gapo" / name).resolve()


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(gapo.__path__, "gapo."):
        if module.name != "gapo.adapters.axolotl":  # of Axolotl, which `tests/adapters/test_axolotl.py` stands in for
            importlib.import_module(module.name)
