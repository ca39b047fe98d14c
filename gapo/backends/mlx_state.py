"""What an MLX module holds besides its parameters: running statistics, caches, counters that its forward moves."""

from __future__ import annotations

from typing import Any

from mlx import nn


class ModuleState:
    """The entries and attributes of a module and of all in it at one moment; containers by their entries."""

    def __init__(self, module: nn.Module) -> None:
        self._held: list[tuple[Any, Any]] = []
        self._visit(module)

    def _visit(self, value: Any) -> None:
        if isinstance(value, dict):
            self._held.append((value, dict(value)))
            if isinstance(value, nn.Module):
                self._held.append((vars(value), dict(vars(value))))
            children: Any = value.values()
        elif isinstance(value, list):
            self._held.append((value, list(value)))
            children = value
        else:
            children = value if isinstance(value, tuple) else ()
        for child in children:
            self._visit(child)

    def put_back(self) -> None:
        """Write it back where something else stands now."""
        for container, held in self._held:
            if isinstance(held, list):
                if len(container) != len(held) or any(a is not b for a, b in zip(container, held, strict=True)):
                    container[:] = held
            elif container.keys() != held.keys() or any(container[name] is not x for name, x in held.items()):
                dict.clear(container)  # `nn.Module.update` is another function
                dict.update(container, held)
