"""What an MLX module holds besides its parameters: running statistics, caches, counters that its forward changes."""

from __future__ import annotations

from typing import Any

from mlx import nn


class ModuleState:
    """A snapshot of a module and every module in it: their entries and attributes, and the entries of containers.

    Arrays are held by reference. One that a forward writes into, instead of replacing it, is not restored.
    """

    def __init__(self, module: nn.Module) -> None:
        self._snapshots: list[tuple[Any, Any]] = []  # each container, and a shallow copy of it
        self._visit(module)

    def _visit(self, value: Any) -> None:
        if isinstance(value, dict):
            self._snapshots.append((value, dict(value)))
            if isinstance(value, nn.Module):
                self._snapshots.append((vars(value), dict(vars(value))))
            children: Any = value.values()
        elif isinstance(value, list):
            self._snapshots.append((value, list(value)))
            children = value
        else:
            children = value if isinstance(value, tuple) else ()
        for child in children:
            self._visit(child)

    def put_back(self) -> None:
        """Restore the containers that differ from their snapshot."""
        for container, copy in self._snapshots:
            if isinstance(copy, list):
                if len(container) != len(copy) or any(a is not b for a, b in zip(container, copy, strict=True)):
                    container[:] = copy
            elif container.keys() != copy.keys() or any(container[name] is not x for name, x in copy.items()):
                dict.clear(container)  # `nn.Module` has an `update` of its own, with another meaning
                dict.update(container, copy)
