"""`gapo train` in several processes: it starts them itself, through `accelerate launch`, as TRL's commands do.

The command that a user types only launches. Each process is `python -m gapo train` with the same arguments, and it
knows by its environment that it was launched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import gapo
from gapo._extras import named_extra
from gapo.runs.errors import ConfigError
from gapo.runs.train.train_config import TrainConfig

CONFIGS = Path(gapo.__file__).parent / "recipes" / "accelerate_configs"
# What torchrun, `accelerate launch`, mpirun and mlx.launch leave in the environment of the processes that they start.
_LAUNCHED = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", "OMPI_COMM_WORLD_SIZE", "MLX_RANK")


def launch(config: TrainConfig, arguments: Sequence[str]) -> int | None:
    """Run `gapo train` with `arguments` in the processes that `config` asks for, by default one for each GPU.

    Args:
        config: its `num_processes`, `accelerate_config` and `backend`.
        arguments: of the command line.

    Returns:
        The exit status of the first process that failed, or 0; None where this process itself is to train, since it was
        launched, or is the only one.

    Raises:
        ConfigError: there is no such configuration of accelerate, or the backend takes none.
    """
    if any(name in os.environ for name in _LAUNCHED):
        return None
    asked = config.num_processes is not None or config.accelerate_config is not None
    if config.backend != "torch":
        if asked:
            raise ConfigError(f"num_processes and accelerate_config are of backend torch, and not of {config.backend}")
        return None
    count = config.num_processes
    if count is None and config.accelerate_config != "single":
        count = _gpus() or None
    if config.accelerate_config is None and (count or 1) == 1:
        return None
    return _run([*_options(config, count), "-m", "gapo", "train", *arguments])


def _gpus() -> int:
    with named_extra("gapo train with backend torch", "hf"):
        import torch

    return torch.cuda.device_count()


def _options(config: TrainConfig, count: int | None) -> list[str]:
    """Options of `accelerate launch`. Without a configuration: DDP, with the precision that the run itself sets."""
    processes = [] if count is None else ["--num_processes", str(count)]
    if config.accelerate_config is not None:
        return ["--config_file", str(config_file(config.accelerate_config)), *processes]
    plain = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    return ["--multi_gpu", *processes, *plain]


def config_file(name: str) -> Path:
    """A configuration of accelerate: a file, or one of the package by its name. Raises ConfigError for another."""
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    path = Path(name) if Path(name).is_file() else shipped.get(name)
    if path is None:
        raise ConfigError(f"accelerate_config must be a file or one of {', '.join(shipped)}; got {name!r}")
    return path


def _run(command: list[str]) -> int:
    """`accelerate launch` with these arguments, in this process; returns the exit status."""
    with named_extra("gapo train in several processes", "hf"):
        from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:  # the process itself has said why
        return abs(error.get_first_failure()[1].exitcode) or 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
