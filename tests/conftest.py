import functools
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small arrays; pytest-xdist uses the cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")
# Compiling takes longest by far: XLA's plainest code takes a third of the time. With flags of one's own, as
# .ci/machines has them, and in the two hosts of test_devices.py, XLA compiles as it does for users.
if not os.environ.get("XLA_FLAGS"):
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if "host_platform_device_count" not in os.environ["XLA_FLAGS"]:  # a mesh without a cluster
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ.setdefault(
    "MLX_DISABLE_COMPILE", "1"
)  # one g++ call for each fused kernel; the compiled path has its own test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What JAX compiled for one test serves the next, also in another process. The first process removes the folder. What a
# worker's tests start has its own within it: JAX writes without a lock.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="gapo-jax-", ignore_cleanup_errors=True)
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": _compiled.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
elif "JAX_COMPILATION_CACHE_DIR" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{os.environ['PYTEST_XDIST_WORKER']}"

import quick_runs
from frameworks import LIBRARIES, Library, require
from hypothesis import settings
from models import BACKENDS

collect_ignore_glob = ["support/*", "fuzz/fuzz*.py"]  # no doctests there, and one import of each is enough

settings.register_profile("default", deadline=None, max_examples=25, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    """Every array library of the registry."""
    found = LIBRARIES[request.param]
    require(found.module)
    return found


@pytest.fixture(params=[name for name, library in LIBRARIES.items() if library.differentiable])
def autodiff(request: pytest.FixtureRequest) -> Library:
    """Every library that differentiates."""
    found = LIBRARIES[request.param]
    require(found.module)
    return found


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Library:
    """Every backend of the registry."""
    found = BACKENDS[request.param]
    require(found.module)
    return found


@pytest.fixture(scope="session")
def _path_of_gcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    import quick_gcc

    return quick_gcc.search_path(tmp_path_factory.mktemp("gcc"))


@pytest.fixture
def quick_kernels(_path_of_gcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX compiles within the test takes a fifth of the time. It looks for a compiler once in a process."""
    monkeypatch.setenv("PATH", _path_of_gcc)


@pytest.fixture
def mlx_compiles(quick_kernels: None) -> Iterator[None]:
    """Within the test MLX compiles, whatever MLX_DISABLE_COMPILE says."""
    import mlx.core as mx

    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> None:
    """What is alive now is not searched for garbage again: a Trainer calls `gc.collect` each time it trains."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. Closed with its module: while it runs, no other test of the process may start an event loop."""
    import browsers

    with browsers.chromium() as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def _quick_jax() -> None:
    """One context of MLIR for all programs, and one cache of compiled programs for all workers.

    JAX makes a context for each program, which takes a quarter of all that a small one takes to compile. Its cache is
    written without a lock; here a file takes its name when it is whole.
    """
    mlir, lru_cache = (sys.modules.get(f"jax._src.{name}") for name in ("interpreters.mlir", "lru_cache"))
    if mlir is None or lru_cache is None or hasattr(mlir.make_ir_context, "cache_clear"):
        return
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    if "PYTEST_XDIST_WORKER" in os.environ and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        shared = os.path.dirname(os.environ["JAX_COMPILATION_CACHE_DIR"])
        sys.modules["jax"].config.update("jax_compilation_cache_dir", shared)

    def put(cache: Any, key: str, value: bytes) -> None:
        path = cache.path / f"{key}{lru_cache._CACHE_SUFFIX}"
        if not path.exists():
            partial = path.with_name(f"{key}.{os.getpid()}")
            partial.write_bytes(value)
            os.replace(partial, path)

    lru_cache.LRUCache.put = put


@pytest.fixture(autouse=True)
def _plain_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Within a test, pages have no real pictures but where the mark says so.

    Runs that several tests read, made by a fixture of their module, have their pictures.
    """
    plots = sys.modules.get("gapo.runs.output.plots")
    with pytest.MonkeyPatch.context() as patch:
        if plots is not None and request.node.get_closest_marker("pictures") is None:
            patch.setattr(plots, "_svg", quick_runs.plain_svg)
        yield
