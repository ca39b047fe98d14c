"""The metrics of the training micro-batches since the Trainer last logged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gapo.metrics import combine


class MetricsWindow:
    """Metrics of micro-batches, of which `close` makes one value each."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = defaultdict(list)
        self._pairs: list[Tensor] = []  # of each micro-batch, by which its metrics weigh in a mean

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def add(self, metrics: Mapping[str, Tensor], pairs: int) -> None:
        """Add the metrics, scalars, of a micro-batch of so many pairs."""
        self._pairs.append(torch.tensor(float(pairs)))
        for name, value in metrics.items():
            self._columns[name].append(value.detach().float())

    def clear(self) -> None:
        """Forget all micro-batches."""
        self._columns.clear()
        self._pairs.clear()

    def close(self, accelerator: Any) -> dict[str, float]:
        """One value of each metric, over the micro-batches and over all ranks; the window is then empty."""
        columns = [self._pairs, *self._columns.values()]
        table = torch.stack([torch.stack([v.cpu() for v in column]) for column in columns], dim=-1)
        if accelerator.num_processes > 1:
            table = accelerator.gather(table.to(accelerator.device)).cpu()
        pairs, *values = (column.tolist() for column in table.T)
        combined = {name: combine(name, column, pairs) for name, column in zip(self._columns, values, strict=True)}
        self.clear()
        return combined
