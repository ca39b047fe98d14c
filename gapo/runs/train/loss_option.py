"""The option `loss`: the name of an objective, or MODULE:FUNCTION, a function of the user's own.

The function takes a `gapo.objectives.LogProbs` and returns the loss of each pair, (N,). As with `python -m`, its module
is looked for in the current directory first. Importing it runs its code. So it is taken from the command line, and from
a YAML file only together with `--trust_code true` on the command line (`gapo.commands.train`).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gapo.config import GAPOConfig
from gapo.logp_options import LogpOptions
from gapo.objectives import OBJECTIVES, Loss, Objective, resolve
from gapo.objectives.loss import require_own_settings
from gapo.objectives.registry import prefixes
from gapo.runs.errors import ConfigError

_WANTED = "a function of gapo.objectives.LogProbs that returns (N,) losses, or a gapo.objectives.Objective"


def is_own(loss: str) -> bool:
    """Whether `loss` names a function of the user's own."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", loss) is not None


def require_loss(loss: str) -> None:
    """Raise ValueError unless `loss` is a name of `OBJECTIVES` or has the form MODULE:FUNCTION. Nothing is imported."""
    if loss not in OBJECTIVES and not is_own(loss):
        raise ValueError(
            f"loss must be one of {', '.join(map(repr, OBJECTIVES))}, got {loss!r}; or MODULE:FUNCTION, with the "
            f"names of a module and of a function in it. {prefixes()}"
        )


def objective_of(loss: str) -> str | Objective | Callable[..., Any]:
    """What `loss` names: an objective's name as it is, or the user's function, imported.

    Raises:
        ConfigError: its module cannot be imported, has no such name, or what it names cannot be called.
    """
    if not is_own(loss):
        return loss
    module_name, name = loss.split(":")
    module = _imported(module_name, loss)
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"loss {loss!r}: module {module_name!r} has no {name!r}; it has {', '.join(public) or 'none'}"
        )
    function = getattr(module, name)
    if not isinstance(function, Objective) and (isinstance(function, type) or not callable(function)):
        kind = "class" if isinstance(function, type) else type(function).__name__
        raise ConfigError(f"loss {loss!r} is of type {kind}: it must be {_WANTED}")
    return function


def _imported(name: str, loss: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # the module's own code may raise anything
        parents = [name.rsplit(".", depth)[0] for depth in range(name.count(".") + 1)]
        if isinstance(error, ModuleNotFoundError) and error.name in parents:
            reason = f"there is no module {error.name!r} in {os.getcwd()} or among the installed packages"
        else:
            reason = f"importing {name!r} raised {type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"loss {loss!r}: {reason}") from error


def loss_of(loss: str, step_config: GAPOConfig, settings: Mapping[str, float]) -> Loss:
    """The loss of a run, with `loss_settings` or the settings of the step. Raises ConfigError for ones not accepted."""
    objective = objective_of(loss)
    try:
        return resolve(objective, step_config, settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss_settings: {error}" if settings else str(error)) from error


def require_loss_settings(
    loss: str, step_config: GAPOConfig, settings: Mapping[str, float], options: LogpOptions
) -> None:
    """Raise ConfigError for settings and options that the loss does not take, or that it would not read."""
    resolved = loss_of(loss, step_config, settings)
    try:
        options.require_weightable(resolved.name, resolved.objective.coupled)
        require_own_settings(
            resolved, step_config, settings, "loss_settings: {{{name}: {value}}}, or --loss_settings.{name} {value}"
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def code_digest(loss: str) -> str | None:
    """A digest of the file that holds the user's function, so that a run is not resumed with another loss.

    None for an objective of gapo, and for a module without a file of source.
    """
    if not is_own(loss):
        return None
    path = getattr(_imported(loss.split(":")[0], loss), "__file__", None)
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
