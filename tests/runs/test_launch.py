"""`gapo train` in several processes: when it launches them, with what, and how it ends."""

from __future__ import annotations

import json
import os
from concurrent import futures
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import load_config_from_file

from gapo import cli
from gapo.runs import launch as module
from gapo.runs.errors import ConfigError
from gapo.runs.models import tiny
from gapo.runs.train.train_config import TrainConfig

RANK_SCRIPT = Path(__file__).parent.parent / "support" / "rank_script.py"
SHIPPED = {path.stem: path for path in module.CONFIGS.glob("*.yaml")}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is handed to `accelerate launch`, which starts nothing; on a machine of two GPUs, in a plain process."""
    handed: list[Any] = []
    for name in module._LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(accelerate_launch, "launch_command", handed.append)
    return handed


def test_one_process_for_each_gpu(commands: list[Any], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: tiny\n")
    assert cli.main(["train", str(tmp_path / "c.yaml"), "--rho=0.1"]) == 0
    (args,) = commands
    assert (args.multi_gpu, args.num_processes, args.mixed_precision) == (True, 2, "no")
    assert (args.module, args.training_script) == (True, "gapo")
    assert args.training_script_args == ["train", str(tmp_path / "c.yaml"), "--rho=0.1"]


def test_a_configuration_of_accelerate_by_name_or_file(commands: list[Any], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(SHIPPED["zero3"].read_text())
    assert module.launch(TrainConfig(accelerate_config="zero2", num_processes=4), ["c.yaml"]) == 0
    assert module.launch(TrainConfig(accelerate_config=str(own)), ["c.yaml"]) == 0
    assert module.launch(TrainConfig(accelerate_config="single"), ["c.yaml"]) == 0
    first, second, third = commands
    assert (first.config_file, first.num_processes) == (str(SHIPPED["zero2"]), 4)
    assert (second.config_file, second.num_processes) == (str(own), 2)
    assert third.num_processes is None
    for name in ("gone", "single.yaml"):
        with pytest.raises(ConfigError, match="must be a file or one of fsdp2, single, zero2, zero3; got"):
            module.launch(TrainConfig(accelerate_config=name), [])


def test_what_trains_in_this_process(commands: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.launch(TrainConfig(num_processes=1), []) is None
    assert module.launch(TrainConfig(backend="mlx"), []) is None
    for name in module._LAUNCHED:
        monkeypatch.setenv(name, "0")
        assert module.launch(TrainConfig(num_processes=2), []) is None, name
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert module.launch(TrainConfig(), []) is None
    assert not commands
    with pytest.raises(ConfigError, match="are of backend torch, and not of jax"):
        module.launch(TrainConfig(backend="jax", num_processes=2), [])
    with pytest.raises(ValueError, match="num_processes must be >= 1, got 0"):
        TrainConfig(num_processes=0)


@pytest.mark.parametrize("status", [0, 3])
def test_two_processes_start_and_their_status_is_the_command_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    for name in module._LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    options = module._options(TrainConfig(), 2)
    assert module._run([*options, str(RANK_SCRIPT), str(tmp_path), str(status)]) == status
    ended = [0, 1] if status == 0 else [1]  # the launcher ends the other one, maybe before it has written
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in ended]
    expected = {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
    assert told == [{"LOCAL_RANK": str(rank), **expected} for rank in ended]


@pytest.mark.parametrize(
    ("name", "kind"), {"fsdp2": "FSDP", "single": "NO", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.items()
)
def test_accelerate_reads_what_is_shipped(name: str, kind: str) -> None:
    config = load_config_from_file(str(SHIPPED[name]))
    assert config.distributed_type == kind
    assert config.num_processes == (1 if name == "single" else 8)
    assert config.mixed_precision == "no"
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    assert set(SHIPPED) == {"fsdp2", "single", "zero2", "zero3"}


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_tiny_policy_is_warmed_up_outside_of_the_launch(monkeypatch: pytest.MonkeyPatch, ranks: str) -> None:
    launched = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks, "ACCELERATE_USE_DEEPSPEED": "true", "FSDP_VERSION": "2"
    }  # fmt: skip
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    seen: list[set[str]] = []

    class Here(futures.Executor):
        def __init__(self, *_: Any) -> None: ...

        def submit(self, work: Any, /, *arguments: Any, **_: Any) -> futures.Future[Any]:
            seen.append(set(os.environ))
            done: futures.Future[Any] = futures.Future()
            done.set_result(work(*arguments))
            return done

    monkeypatch.setattr(tiny, "ProcessPoolExecutor", Here)
    tiny._alone(seen.append, {"ran"})
    assert not seen[0] & launched.keys()
    assert seen[1] == {"ran"}
    assert {name: os.environ[name] for name in launched} == launched
