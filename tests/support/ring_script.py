"""Run by test_devices.py under mlx.launch: mlx-lm's own `train` on the ranks of a ring; the first one saves weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import token_pairs
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import TrainingArgs, train

from gapo import GAPOConfig
from gapo.adapters.mlx_lm import MetricsCallback, iterate_batches, make_loss
from gapo.backends.mlx import MlxBackend


def run(folder: str, config: dict[str, Any]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Weights and the last report after three steps of four pairs, over all ranks."""
    model, _ = mlx_lm.load(f"{folder}/model")
    model.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
    args = TrainingArgs(
        batch_size=4, iters=3, max_seq_length=64, steps_per_report=1, adapter_file=f"{folder}/adapters.safetensors"
    )
    report = MetricsCallback(model)
    mx.random.seed(0)
    train(
        model.train(),
        optim.SGD(0.1),
        token_pairs.pairs(8),
        None,
        args,
        loss=make_loss(GAPOConfig(rho=0.3, **config)),
        iterate_batches=iterate_batches,
        training_callback=report,
    )
    return dict(tree_flatten(model.parameters())), report.train[-1] if report.train else {}


CONFIGS = {
    "exact": {"adaptive": True},
    "first_order": {"anchor": "first_order", "adaptive": False},
    "gaussian": {"direction": "gaussian"},
}


def verbs(rank: int) -> dict[str, mx.array]:
    """What the backend's verbs give on this rank for `rank + 1`, and two draws from its own random stream."""
    backend, weights = MlxBackend(), {"w": mx.zeros((4,))}
    mx.random.seed(rank)
    found = {op: backend.all_reduce(mx.array([rank + 1.0]), op) for op in ("mean", "max", "sum")}
    return found | {f"draw {i}": backend.normal(["w"], weights, None)["w"] for i in range(2)}


def main(folder: str) -> None:
    world = mx.distributed.init(strict=True)
    of_all = {name: mx.distributed.all_gather(x[None]) for name, x in verbs(world.rank()).items()}
    mx.eval(of_all)  # on both ranks: each waits for the other
    if world.rank() == 0:
        mx.save_safetensors(f"{folder}/verbs.safetensors", of_all)
    for name, config in CONFIGS.items():
        weights, _ = run(folder, config)
        if world.rank() == 0:
            mx.save_safetensors(f"{folder}/{name}.safetensors", weights, {"ranks": str(world.size())})


if __name__ == "__main__":
    main(sys.argv[1])
