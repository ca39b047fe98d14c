"""A training loop that is not ours, over a model whose lower layers are frozen: each row passes those layers once.

The first forward of a row saves the states that leave the frozen layers. Later forwards, in further epochs and in
evaluations, start there; the loop does not notice. A row is recognised by its token ids.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor, nn

from gapo.runs.errors import ConfigError
from gapo.runs.policy.frozen import frozen_layers, require_same, resumed

# What a forward may be called with for its states to depend on the rows' tokens alone.
_ACCEPTED = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}


@contextmanager
def remembered_states(model: nn.Module, folder: Path) -> Iterator[None]:
    """Let `model` pass each row through its frozen layers once, inside the context.

    The states lie in a file without a name on the disk of `folder`, which ends with the process. Nothing happens where
    no layer is frozen.

    Raises:
        ConfigError: from a forward, where the layers above the frozen ones read more than their states.
    """
    if not frozen_layers(model):
        yield
        return
    with TemporaryFile(dir=folder) as file, _Remembered(model, file):
        yield


class _Remembered:
    """The hooks on a model, and the states of the rows that it has seen."""

    def __init__(self, model: nn.Module, file: IO[bytes]) -> None:
        self._model, self._file = model, file
        self._places: dict[bytes, tuple[int, int]] = {}  # by row: where its states begin, and how many tokens
        self._like: Tensor | None = None  # a state, for its width and dtype
        self._is_compared = self._is_comparing = False
        self._of_forward = ExitStack()  # what ends with the forward that runs
        self._opened = ExitStack()  # what ends with the training

    def __enter__(self) -> _Remembered:
        before = self._model.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self._model.register_forward_hook(lambda *call: self._of_forward.close(), always_call=True)
        self._opened.callback(before.remove)
        self._opened.callback(after.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._of_forward.close()
        self._opened.close()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_comparing or args or not kwargs.keys() <= _ACCEPTED or "attention_mask" not in kwargs:
            return
        mask = kwargs["attention_mask"].bool()
        if mask.dim() != 2 or not (bool(mask[:, 0].all()) or "position_ids" in kwargs):
            return
        ids, cells = kwargs["input_ids"].cpu(), mask.cpu()
        rows = (row[of].numpy().tobytes() for row, of in zip(ids, cells, strict=True))
        keys = [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
        if all(key in self._places for key in keys):
            states = self._read(keys, cells).to(kwargs["input_ids"].device)
            if not self._is_compared:
                self._compare(kwargs, states)
            self._of_forward.enter_context(resumed(model, states))
            return
        handle = frozen_layers(model)[-1].register_forward_hook(lambda *call: self._write(keys, cells, call[2]))
        self._of_forward.callback(handle.remove)

    def _write(self, keys: list[bytes], cells: Tensor, states: Any) -> None:
        if not isinstance(states, Tensor) or states.shape[:2] != cells.shape:
            raise ConfigError("train_layers needs a model whose layers return their states alone: leave it out")
        self._like = states.new_empty((0, states.shape[-1]), device="cpu")
        self._file.seek(0, os.SEEK_END)
        for key, row, of in zip(keys, states.detach().cpu(), cells, strict=True):
            if key not in self._places:
                self._places[key] = (self._file.tell(), int(of.sum()))
                self._file.write(row[of].contiguous().view(torch.uint8).numpy().tobytes())

    def _read(self, keys: list[bytes], cells: Tensor) -> Tensor:
        assert self._like is not None
        states = self._like.new_zeros((*cells.shape, self._like.shape[-1]))
        self._file.flush()
        for key, row, of in zip(keys, states, cells, strict=True):
            start, count = self._places[key]
            size = count * self._like.shape[-1] * self._like.element_size()
            data = bytearray(os.pread(self._file.fileno(), size, start))
            row[of] = torch.frombuffer(data, dtype=self._like.dtype).view(count, -1)
        return states

    def _compare(self, inputs: Mapping[str, Any], states: Tensor) -> None:
        """Raise ConfigError unless a forward from `states` is the whole one, once."""
        mask = inputs["attention_mask"].bool()
        self._is_comparing = True
        try:
            advice = "its layers share more than their states; leave train_layers out"
            require_same(self._model, states, inputs, which="the model", advice=advice, mask=mask)
        finally:
            self._is_comparing = False
        self._is_compared = True
