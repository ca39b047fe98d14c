"""GAPO over several processes: two ranks equal one process, stop together at NaN, and leave good checkpoints behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import devices_script
import hf_models
import pytest
import torch
from devices_script import PAIRS, RESUMABLE, free_port, make_trainer, scenarios_of
from frameworks import require
from safetensors.torch import load_file

import gapo
from gapo.adapters.hf import GAPOCallback
from gapo.adapters.hf.margins import pair_logps
from gapo.backends.torch import zero3
from gapo.backends.torch.sharded import fsdp_units

ENGINES = ("ddp", "fsdp2", "zero3")
# DeepSpeed's optimiser keeps float32 weights, whatever those of the model.
RTOL = {"ddp": 1e-9, "fsdp2": 1e-9, "zero3": 2e-6}


def run_command(command: list[str], stdin: int | None = None) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}  # whatever this host has
    done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=2000, env=environment)
    assert done.returncode == 0, done.stderr


@contextmanager
def full_pipe() -> Iterator[int]:
    """Input for `mlx.launch`, which asks without a pause whether its ranks take some, unless their pipes are full."""
    read, write = os.pipe()
    try:
        os.set_blocking(write, False)
        os.write(write, b"\n" * 65536)
        yield read
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.filterwarnings("ignore:first_order_ratio")  # rho is large on purpose
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.slow] if name == "fsdp2" else []) for name in ENGINES]
)
def test_two_ranks(engine: str, tmp_path: Path) -> None:
    """One launch serves all that is asked of an engine, since starting Python takes longest."""
    if engine == "zero3":  # it first compiles an extension, for minutes, so CI does without; run it once beforehand
        pytest.importorskip("deepspeed")
    run_command([sys.executable, devices_script.__file__, engine, str(tmp_path)])
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert codes["run_scenarios"] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for scenario in scenarios_of(engine):
        assert_equal_to_one_process(scenario, [rank[scenario] for rank in ranks], RTOL[engine])
    assert_nan_stops_both(ranks)
    if engine == "fsdp2":
        assert_own_loop_equals_one_process([rank["own_loop"] for rank in ranks])
    assert codes["die"][1] == -9
    assert codes["die"][0] == 1  # it has seen its peer go, and did not wait for ever
    assert codes["resume"] == [0, 0]
    assert_checkpoints_are_one_process(tmp_path, RTOL[engine])


@cache
def one_process(scenario: str) -> dict[str, Any]:
    """What every engine is compared with."""
    return devices_script.train("", scenario)


def assert_equal_to_one_process(scenario: str, ranks: list[dict[str, Any]], rtol: float) -> None:
    """Weights, gaps, logs and evaluation are those of one process with both ranks' pairs in a batch."""
    one = one_process(scenario)
    weights = sum(x.numel() for x in one["weights"].values())
    assert len(one["results"]) == len(ranks[0]["results"]) == 4  # two steps of two micro-steps
    for step, result in enumerate(one["results"]):
        taken = [rank["results"][step] for rank in ranks]
        near = {"rtol": rtol if step > 1 else 1e-9, "what": f"{scenario}: micro-step {step}"}
        assert_near(torch.cat([r.weights for r in taken]), result.weights, **near)
        for r in taken if result.running else ():
            assert float(r.running["mean"]) == pytest.approx(float(result.running["mean"]), rel=50 * near["rtol"])
            assert float(r.running["mean"]) == float(taken[0].running["mean"])
        if result.anchor_gaps is None:
            assert {r.radius for r in taken} == {None}
            continue
        assert_near(torch.cat([r.anchor_gaps for r in taken]), result.anchor_gaps, **near)
        changed = ("changed_fraction",) if step < 2 or rtol == 1e-9 else ()  # one weight more or less is no rounding
        for name in ("rho", "radius", "grad_norm", *changed):
            for r in taken:
                slack = 1.5 / weights if step > 1 and name == "changed_fraction" else 0  # one weight is rounding
                expected = pytest.approx(float(getattr(result, name)), rel=50 * max(near["rtol"], 2e-7), abs=slack)
                assert float(getattr(r, name)) == expected, f"{scenario}: {name} of micro-step {step}"
    for rank in ranks:
        assert set(rank["weights"]) == set(one["weights"])
        for name, value in one["weights"].items():
            assert_near(rank["weights"][name], value, rtol, f"{scenario}: {name}")
        assert rank["evaluation"]["eval_loss"] == pytest.approx(one["evaluation"]["eval_loss"], rel=1e-6)
        assert not rank["synced"]  # as accelerate had it
    log = ranks[0]["log"]
    if "gapo/anchor_pairs" in one["log"]:
        assert log["gapo/anchor_pairs"] == one["log"]["gapo/anchor_pairs"] == PAIRS
    for name in set(one["log"]) - {"gapo/anchor_gap_std"}:  # a deviation within each rank's pairs
        slack = 1.5 / weights if name == "gapo/changed_fraction" else 1e-7
        assert log[name] == pytest.approx(one["log"][name], rel=50 * max(rtol, 2e-7), abs=slack), f"{scenario}: {name}"


def assert_near(found: torch.Tensor, expected: torch.Tensor, rtol: float, what: str) -> None:
    """Equal within `rtol` of the largest entry."""
    error, scale = (float(x.abs().max()) for x in (found - expected, expected))
    assert error <= rtol * scale, f"{what}: off by {error:.1e} of {scale:.1e}"


def assert_nan_stops_both(ranks: list[dict[str, Any]]) -> None:
    """NaN on the last rank raises on both, with the weights as they were."""
    for where in ("clean", "anchor"):
        assert all(rank[f"nan_{where}"]["same"] for rank in ranks)
        assert f"the margins of pairs [0, 1] are not finite in the {where} forward" in ranks[1][f"nan_{where}"]["said"]
    assert "the probe gradient of" in ranks[0]["nan_clean"]["said"]
    assert "the margins of another rank's pairs are not finite in the anchor" in ranks[0]["nan_anchor"]["said"]


def assert_own_loop_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    """Gathered weights are not mistaken for the anchor's; `.grad`, a crash and what FSDP2 holds back are seen to."""
    model = hf_models.make("pythia").double()
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=0.3), backend="torch")
    result, grads = step(model, hf_models.batch(PAIRS))
    for key in ("gaps", "gaps_again"):
        found = torch.cat([rank[key] for rank in ranks])
        assert_near(found, result.anchor_gaps, 1e-9, key)
    for rank in ranks:
        for name, gradient in grads.items():
            assert_near(rank["grads"][name], gradient, 1e-9, name)
        assert rank["grad_kept"]
        assert rank["same"]
        assert rank["crashed"] == "'in the anchor forward'"
        assert re.search(r"FSDP2 holds gradients back .* set sync_each_batch=True", rank["refused"])


def assert_checkpoints_are_one_process(folder: Path, rtol: float) -> None:
    """The checkpoint before the death holds the policy, not the anchor; the resumed one what came of it in the end."""
    assert float((folder / "moved.txt").read_text()) > 1e-3  # the weights were the anchor's when the rank died
    trainer = make_trainer("gpt2", {}, folder / "one", **RESUMABLE)
    trainer.train()
    for checkpoint in ("checkpoint-1", "checkpoint-3"):
        saved = load_file(folder / checkpoint / "model.safetensors")
        expected = load_file(folder / "one" / checkpoint / "model.safetensors")
        for name, value in expected.items():
            assert_near(saved[name], value, rtol, f"{checkpoint}: {name}")


@pytest.mark.slow
def test_a_ring_of_mlx_equals_one_process(tmp_path: Path) -> None:
    """mlx-lm's train on two ranks of `mlx.launch`: one anchor for both."""
    mx = require("mlx.core")
    import numpy as np
    import ring_script

    hf_models.make("llama").save_pretrained(tmp_path / "model")
    hf_models.tokenizer().save_pretrained(tmp_path / "model")
    launcher = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring", "--starting-port"]
    with full_pipe() as stdin:
        run_command([*launcher, str(free_port(2)), sys.executable, ring_script.__file__, str(tmp_path)], stdin)
    for name, config in ring_script.CONFIGS.items():
        found, about = mx.load(str(tmp_path / f"{name}.safetensors"), return_metadata=True)
        assert about["ranks"] == "2"
        weights, _ = ring_script.run(str(tmp_path), config)
        for parameter, value in weights.items():
            np.testing.assert_allclose(np.array(found[parameter]), np.array(value), rtol=1e-5, atol=1e-6)
    verbs = {name: np.array(x) for name, x in mx.load(str(tmp_path / "verbs.safetensors")).items()}
    for op, expected in (("mean", 1.5), ("max", 2), ("sum", 3)):
        np.testing.assert_array_equal(verbs[op], [[expected]] * 2)
    of_first = [ring_script.verbs(0)[f"draw {i}"] for i in range(2)]
    for i in range(2):  # the first rank's stream, on both
        np.testing.assert_array_equal(verbs[f"draw {i}"], [np.array(of_first[i])] * 2)
    assert (verbs["draw 0"] != verbs["draw 1"]).any()


@pytest.mark.slow
def test_two_hosts_of_jax_equal_one_process(tmp_path: Path) -> None:
    """Global arrays over two processes: the pairs of both share one anchor."""
    jax = require("jax")
    import hosts_script
    import numpy as np
    from jax_problem import problem, step

    # One device for each process, and no file that both write.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    address = f"127.0.0.1:{free_port()}"
    hosts = [
        subprocess.Popen(
            [sys.executable, hosts_script.__file__, str(rank), address, str(tmp_path / f"{rank}.npz")], env=environment
        )
        for rank in range(2)
    ]
    try:
        assert [host.wait(timeout=600) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
    result, grads = jax.jit(step())(*problem("float64"))
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        assert found["processes"] == 2
        np.testing.assert_allclose(found["gaps"], np.asarray(result.anchor_gaps), rtol=1e-9)
        for name, gradient in grads.items():
            np.testing.assert_allclose(found[name], np.asarray(gradient), rtol=1e-9, atol=1e-12)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    old = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(old)
    with pytest.raises(ValueError, match=r"the model is sharded by FSDP1: use FSDP2"):
        fsdp_units(torch.nn.Sequential(old))
    trainer = make_trainer("gpt2", {}, tmp_path)
    GAPOCallback.detach(next(c for c in trainer.callback_handler.callbacks if isinstance(c, GAPOCallback)))
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)
    with pytest.raises(ValueError, match=r'FSDP1 is not supported: set fsdp_config=\{"version": 2\}'):
        GAPOCallback().attach(trainer)

    with pytest.raises(ValueError, match=r'anchor="first_order" is not supported under DeepSpeed ZeRO-3: use FSDP2'):
        zero3.Zero3Forward(pair_logps, None, {}, gapo.GAPOConfig(anchor="first_order"))
    partitioned = torch.nn.Linear(1, 1)
    partitioned.weight.ds_tensor = torch.empty(1)
    with pytest.raises(ValueError, match=r"DeepSpeed has partitioned the parameters \(ZeRO-3\): train with gapo.adap"):
        gapo.value_and_grad(pair_logps, backend="torch")(partitioned, {})
    here, there = torch.empty(1), torch.empty(1, device="meta")
    for partition in (
        SimpleNamespace(device=here.device, ds_tensor=there),
        SimpleNamespace(device=here.device, ds_tensor=here, ds_secondary_tensor=here),
    ):
        engine = SimpleNamespace(module=SimpleNamespace(named_parameters=lambda p=partition: [("w", p)]))
        with pytest.raises(ValueError, match=r"the partition of 'w' .* supports neither offload_param nor zero_hpz"):
            zero3.Zero3Forward(pair_logps, engine, {}, gapo.GAPOConfig())
