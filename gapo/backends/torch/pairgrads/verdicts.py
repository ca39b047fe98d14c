"""What was found out about a model, and for whom it holds: answers by module and by everything that they rest on.

A verdict rests on the code that ran: the function of the outputs with all that it closes over, and the classes, modes
and `forward`s of the module's layers. Where one of these changes, the verdict does not hold.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from gapo.backends.pairgrads.identity import Identities

_MOST = 16  # of one module: a function that is another one at each step leaves no more behind

identity = Identities(torch.Tensor, nn.Module).of


class Verdicts:
    """Answers by subject, module and key. Whoever takes the steps holds them, so that another one starts with none.

    They go with the module; of too many under one subject, the oldest go.
    """

    def __init__(self) -> None:
        self._answers: weakref.WeakKeyDictionary[nn.Module, dict[str, OrderedDict[Hashable, Any]]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self, subject: str, module: nn.Module, key: Hashable) -> Any:
        """The answer kept for `key`, or None."""
        answers = self._answers.get(module, {}).get(subject)
        return None if answers is None else answers.get(key)

    def keep(self, subject: str, module: nn.Module, key: Hashable, answer: Any) -> None:
        """Keep an answer."""
        answers = self._answers.setdefault(module, {}).setdefault(subject, OrderedDict())
        answers[key] = answer
        if len(answers) > _MOST:
            answers.popitem(last=False)

    def first(self, subject: str, module: nn.Module, key: Hashable) -> bool:
        """Whether this is asked for the first time: what is said once."""
        if self.get(subject, module, key):
            return False
        self.keep(subject, module, key, True)
        return True


def basis(function: Any, module: nn.Module) -> Hashable:
    """All that a verdict on `function(module, batch)` rests on, the batch aside; equal only where all of it is."""
    layers = hash(
        tuple((type(m), type(m).forward, identity(vars(m).get("forward")), m.training) for m in module.modules())
    )
    trained = tuple(name for name, p in module.named_parameters() if p.requires_grad)
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda"))
    return identity(function), layers, trained, autocast
