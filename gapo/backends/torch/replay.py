"""The state that a forward reads and writes besides parameters: random streams and buffers.

The anchor's forward, and a second clean one, must start from the state that the clean forward started from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gapo.backends.torch.pairgrads import Verdicts
from gapo.backends.torch.random_state import RandomState

# Running statistics, power iterations and counters are small. Large buffers, such as packed weights, are only watched.
_SMALL = 2**16


class _Buffer(NamedTuple):
    """A buffer as it was before the clean forward; `copy` is None for a large one."""

    owner: nn.Module
    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None

    @property
    def written(self) -> bool:
        return self.owner._buffers.get(self.name) is not self.tensor or self.tensor._version != self.version

    @property
    def differs(self) -> bool:
        return self.copy is not None and not torch.equal(self.copy, self.tensor)


class Replay:
    """The state before a clean forward: random streams, and the buffers that it writes (running statistics)."""

    def __init__(self, module: nn.Module, verdicts: Verdicts) -> None:
        self.random = RandomState(module)
        with torch.no_grad():
            self._buffers = {
                f"{path}.{name}": _Buffer(owner, name, x, x._version, x.clone() if x.numel() <= _SMALL else None)
                for path, owner in module.named_modules()
                for name, x in owner._buffers.items()
                if isinstance(x, Tensor) and not x.is_inference()
            }
        self._module, self._verdicts, self._training = module, verdicts, module.training

    @contextmanager
    def again(self) -> Iterator[None]:
        """Start from this state. Afterwards streams and buffers are restored.

        Raises:
            ValueError: the clean forward wrote to a large buffer, of which no copy was taken.
        """
        # By value, once for each mode: kernels such as batch norm's write without raising a tensor's version.
        changing = self._verdicts.get("buffers", self._module, self._training)
        if changing is None:
            changing = {name for name, buffer in self._buffers.items() if buffer.differs}
            self._verdicts.keep("buffers", self._module, self._training, changing)
        written = [buffer for name, buffer in self._buffers.items() if name in changing or buffer.written]
        for buffer in written:
            if buffer.copy is None:
                raise ValueError(
                    f"the forward writes to the buffer {buffer.name!r} of a {type(buffer.owner).__name__}, of shape "
                    f"{tuple(buffer.tensor.shape)}: the anchor's forward would change it again. Only buffers of up to "
                    f"{_SMALL} entries are put back: keep it out of the module, or write to it outside of margin_fn"
                )
        left = [(buffer, buffer.owner._buffers.get(buffer.name)) for buffer in written]
        try:
            for buffer in written:  # a new tensor, since the clean graph may have saved this one
                if buffer.copy is not None:
                    buffer.owner._buffers[buffer.name] = buffer.copy.clone()
            with self.random.replayed():
                yield
        finally:
            for buffer, tensor in left:
                buffer.owner._buffers[buffer.name] = tensor
