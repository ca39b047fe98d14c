"""A Trainer in several processes whose model DDP does not join."""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gapo.adapters.hf.supported import require_joined


def trainer(kind: DistributedType) -> Any:
    return SimpleNamespace(accelerator=SimpleNamespace(distributed_type=kind))


def test_a_model_that_ddp_does_not_join_is_refused() -> None:
    """A process alone needs no DDP, nor do ranks whose model is within it, under whatever else wraps it."""
    alone = nn.Linear(2, 2)
    for kind in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        with pytest.raises(RuntimeError, match=r"each process would train alone: call trainer\.evaluate\(\) after"):
            require_joined(trainer(kind), alone)
    require_joined(trainer(DistributedType.NO), alone)
    joined = DistributedDataParallel.__new__(DistributedDataParallel)  # of a group of processes it needs none here
    nn.Module.__init__(joined)
    require_joined(trainer(DistributedType.MULTI_CPU), nn.Sequential(joined))
