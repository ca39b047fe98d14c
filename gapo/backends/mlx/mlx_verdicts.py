"""What was found out about a module, and for what it holds: answers by module and by all that they rest on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from gapo.backends.pairgrads.identity import Identities, Itself

_MOST = 16  # a function that is another one at each step leaves no more behind

# An array is data, as the batch is: it counts by shape and dtype.
identity = Identities(mx.array, nn.Module, lambda x: (mx.array, x.shape, str(x.dtype))).of


class MlxVerdicts:
    """Answers by module and key; of too many, the oldest go."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Hashable, str] = OrderedDict()

    def get(self, module: nn.Module, key: Hashable) -> str | None:
        """The answer for `key`, or None."""
        return self._answers.get((Itself(module), key))

    def keep(self, module: nn.Module, key: Hashable, answer: str) -> None:
        """Keep an answer."""
        self._answers[Itself(module), key] = answer
        if len(self._answers) > _MOST:
            self._answers.popitem(last=False)

    def first(self, module: nn.Module, text: str) -> bool:
        """Whether this is asked for the first time: what is said once."""
        if self.get(module, ("said", text)) is not None:
            return False
        self.keep(module, ("said", text), text)
        return True


def basis(function: Any, module: nn.Module) -> Hashable:
    """All that a verdict on `function(module, batch)` rests on, the batch aside."""
    layers = tuple((type(m), type(m).__call__, m.training) for m in module.modules())
    return identity(function), layers, tuple(name for name, _ in tree_flatten(module.trainable_parameters()))
