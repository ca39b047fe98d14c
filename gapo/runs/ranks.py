"""Several processes of one `gapo train`, as torchrun starts them: the first one writes, and the others wait for it.

Before any framework has set up a group, the environment is all that a process knows of the others. So `count` and
`is_first` read the variables that torchrun and `accelerate launch` set, and only waiting needs the group itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from gapo.runs.errors import ConfigError


def count() -> int:
    """The number of processes, by the environment that torchrun and `accelerate launch` set."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return count() == 1 or int(os.environ.get("RANK") or 0) == 0


@contextmanager
def first_ahead() -> Iterator[None]:
    """The first process runs the block alone. Then the others run it, and find the files that the first has written."""
    if count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


def meet() -> None:
    """Wait until every process has come to this call."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def require_one(what: str) -> None:
    """Raise ConfigError where `what` was started in several processes, each of which would do all the work."""
    several = count() if count() > 1 else int(os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)
    if several > 1 or "MLX_RANK" in os.environ:
        raise ConfigError(f"{what} runs in one process: start it without torchrun, accelerate launch or mlx.launch")
