"""Cost of a GAPO step against SimPO's in JAX and in MLX: the same small Llama, compiled, in interleaved rounds."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shared

import gapo
from gapo import objectives

ANCHORS = ("exact", "first_order")


def jax_steps(folder: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
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

    steps = {"simpo": simpo}
    steps |= {f"gapo {a}": gapo.value_and_grad(margin_fn, gapo.GAPOConfig(anchor=a), backend="jax") for a in ANCHORS}
    jitted = {name: jax.jit(step) for name, step in steps.items()}
    return {name: lambda step=step: jax.block_until_ready(step(params, data)) for name, step in jitted.items()}  # type: ignore[misc]


def mlx_steps(folder: str, batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.utils import load_model

    from gapo.adapters.mlx_lm import make_loss

    data = [
        mx.array(np.concatenate([batch[f"{side}_{part}"] for side in ("chosen", "rejected")]))
        for part in ("input_ids", "labels")
    ]
    losses = {"simpo": make_loss(objective="simpo")}
    losses |= {f"gapo {a}": make_loss(gapo.GAPOConfig(anchor=a)) for a in ANCHORS}

    def compiled(loss: Any) -> Callable[[], Any]:
        model, _ = load_model(Path(folder))
        model.train()
        state = [model.state, mx.random.state]
        grad = nn.value_and_grad(model, loss)
        step = mx.compile(lambda ids, labels: grad(model, ids, labels), inputs=state, outputs=state)
        return lambda: mx.eval(step(*data))

    return {name: compiled(loss) for name, loss in losses.items()}


def save_model(options: argparse.Namespace, folder: str) -> None:
    """Save a Llama of random weights, as `save_pretrained` leaves it."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--framework", choices=("jax", "mlx"), required=True, help="the framework to time")
    shared.add_size_arguments(parser, pairs=4, tokens=128, width=128, depth=4, vocab=2048)
    parser.add_argument("--seconds", type=float, default=30, help="duration of the measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(options, folder)
        make_steps = {"jax": jax_steps, "mlx": mlx_steps}[options.framework]
        steps = make_steps(folder, shared.random_batch(options))
    for step in steps.values():
        step()  # compiles
    seconds = shared.time_rounds(steps, options.seconds)
    print(
        f"{options.framework} {importlib.metadata.version(options.framework)}, {platform.machine()} CPU, "
        f"{len(seconds['simpo'])} rounds, {time.strftime('%Y-%m-%d')}"
    )
    for name, (low, middle, high) in shared.ratios_to_simpo(seconds).items():
        print(f"{name:<18} {middle:.2f} x SimPO ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
