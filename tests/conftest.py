import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small arrays; pytest-xdist uses the cores
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # a mesh without a cluster
os.environ.setdefault(
    "MLX_DISABLE_COMPILE", "1"
)  # one g++ call for each fused kernel; the compiled path has its own test
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from frameworks import LIBRARIES, Library, require
from hypothesis import settings
from models import BACKENDS

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
