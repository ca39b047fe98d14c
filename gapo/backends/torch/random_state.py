"""The random state of a forward, so that another one draws the same dropout masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class RandomState:
    """The state of the CPU's and of the module's CUDA devices' streams, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        """Draw from the kept state on."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw from the kept state; afterwards the stream goes on from where it was."""
        with torch.random.fork_rng(devices=self._devices):
            self.restore()
            yield
