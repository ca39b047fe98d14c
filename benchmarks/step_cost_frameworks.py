"""Cost of a GAPO step against SimPO's in JAX and in MLX: the same small Llama, compiled, interleaved."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np

import gapo
from gapo import objectives

ANCHORS = ("exact", "first_order")


def save_model(options: argparse.Namespace, folder: str) -> None:
    """A Llama of random weights, as `save_pretrained` leaves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.depth,
        num_attention_heads=max(1, options.width // 64),
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_batch(options: argparse.Namespace) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = rng.integers(1, options.vocab, (options.pairs, options.tokens))
        labels = ids.copy()
        labels[:, : options.tokens // 4] = -100
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": np.ones_like(ids)}
    return batch


def jax_ways(folder: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    from gapo.adapters.flax import pair_logps
    from gapo.runs.models import llama

    settings, params = llama.load(folder)
    data = {name: jnp.asarray(x) for name, x in batch.items()}

    def margin_fn(p: Any, b: Any) -> Any:
        return pair_logps(lambda ids, _: llama.logits(p, ids, settings), b)

    def simpo(p: Any, b: Any) -> Any:
        def loss(q: Any) -> Any:
            return objectives.simpo(*margin_fn(q, b))

        return jax.value_and_grad(loss)(p)

    ways = {"simpo": simpo}
    ways |= {f"gapo {a}": gapo.value_and_grad(margin_fn, gapo.GAPOConfig(anchor=a), backend="jax") for a in ANCHORS}
    jitted = {name: jax.jit(way) for name, way in ways.items()}
    return {name: lambda way=way: jax.block_until_ready(way(params, data)) for name, way in jitted.items()}  # type: ignore[misc]


def mlx_ways(folder: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.utils import load_model

    from gapo.adapters.mlx_lm import make_loss

    data = [
        mx.array(np.concatenate([batch[f"{s}_{part}"] for s in ("chosen", "rejected")]))
        for part in ("input_ids", "labels")
    ]
    losses = {"simpo": make_loss(objective="simpo")}
    losses |= {f"gapo {a}": make_loss(gapo.GAPOConfig(anchor=a)) for a in ANCHORS}

    def way(loss: Any) -> Callable[[], Any]:
        model, _ = load_model(Path(folder))
        model.train()
        state = [model.state, mx.random.state]
        grad = nn.value_and_grad(model, loss)
        step = mx.compile(lambda ids, labels: grad(model, ids, labels), inputs=state, outputs=state)
        return lambda: mx.eval(step(*data))

    return {name: way(loss) for name, loss in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--framework", choices=("jax", "mlx"), required=True)
    parser.add_argument("--pairs", type=int, default=4, help="pairs in the batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of prompt and answer")
    parser.add_argument("--width", type=int, default=128, help="hidden size")
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--vocab", type=int, default=2048, help="size of the vocabulary")
    parser.add_argument("--seconds", type=float, default=30, help="how long to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(options, folder)
        ways = {"jax": jax_ways, "mlx": mlx_ways}[options.framework](folder, make_batch(options))
    for way in ways.values():
        way()
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    deadline = time.monotonic() + options.seconds
    while time.monotonic() < deadline or len(seconds["simpo"]) < 5:
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    version = f"{options.framework} {importlib.metadata.version(options.framework)}"
    print(
        f"{options.framework} {version}, {platform.machine()} CPU, {len(seconds['simpo'])} rounds, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    for name, own in seconds.items():
        low, middle, high = quantiles([a / b for a, b in zip(own, seconds["simpo"], strict=True)], n=4)
        print(f"{name:<18} {middle:.2f} x SimPO ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
