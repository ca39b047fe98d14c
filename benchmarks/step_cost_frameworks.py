"""Cost of a GAPO step against SimPO's in JAX and in MLX, on one Llama and one batch: flops, time, memory, compile time.

The steps take turns in one process, so that a noisy machine disturbs all alike. Ratios are taken within each round; the
table shows their median and quartiles. Rows carry device, versions, commit and time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import shared

import gapo
from gapo import objectives

WAYS: dict[str, Any] = {"simpo": None, "gapo exact": "exact", "gapo first_order": "first_order"}  # with their anchors
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")  # with --lora
RANK = 16


@dataclass
class Step:
    """A step that is ready to run, and what its preparation tells."""

    run: Callable[[], Any]
    compile_seconds: float | None  # where it is compiled, and that is measured
    temporary: int  # bytes at the peak, beside weights and batch
    flops: float | None  # where the framework counts them


class LowRank:
    """The weight of a layer with a LoRA adapter, as far as `x @ weight.T` uses it."""

    def __init__(self, weight: Any, adapter: tuple[Any, Any]) -> None:
        self.T = self
        self._weight, (self._down, self._up) = weight, adapter

    def __rmatmul__(self, x: Any) -> Any:
        return x @ self._weight.T + (x @ self._down.T) @ self._up.T


def vmapped(margin_fn: Callable[..., Any], config: gapo.GAPOConfig) -> Callable[..., Any]:
    """First-order GAPO by `jax.vmap` of each pair's gradient: N times the weights, where no operation is looked at.

    The parameters are a dict of which "lm_head.weight" is not perturbed; "weights" of the batch is no pair's.
    """
    import jax
    import jax.numpy as jnp

    def margin(params: Any, pair: Any, fixed: Any) -> Any:
        chosen, rejected = margin_fn(params, {name: x[None] for name, x in pair.items()} | fixed)
        return (chosen - rejected)[0]

    def step(params: Any, batch: Any) -> Any:
        fixed = {name: x for name, x in batch.items() if name == "weights"}
        pairs = {name: x for name, x in batch.items() if name not in fixed}
        margins, grads = jax.vmap(jax.value_and_grad(margin), (None, 0, None))(params, pairs, fixed)

        def weighted(weights: Any) -> Any:
            return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), grads)

        pull = jax.nn.sigmoid(config.gamma - config.beta * margins)
        moved = {name: (params[name], g) for name, g in weighted(-pull).items() if name != "lm_head.weight"}
        scaled = {name: jax.tree.map(jnp.multiply, *pair) for name, pair in moved.items()}
        norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(scaled)))
        delta = {
            name: jax.tree.map(lambda t, x: config.rho * t * x / norm, params[name], x) for name, x in scaled.items()
        }
        along = [jax.tree.map(lambda g, d: jnp.tensordot(g, d, d.ndim), grads[name], d) for name, d in delta.items()]
        anchors = margins + sum(jax.tree.leaves(along))
        zeros = jnp.zeros_like(margins)
        loss, slopes = jax.value_and_grad(lambda m: gapo.loss(m, zeros, anchors, zeros))(margins)
        return loss, weighted(slopes)

    return step


def scanned(options: argparse.Namespace) -> tuple[Any, Callable[..., Any]]:
    """Weights and logits of a decoder whose layers `jax.lax.scan` takes one by one, rematerialised with --remat."""
    import jax
    import jax.numpy as jnp

    width, inner, depth = options.width, 3 * options.width, options.depth
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v", "o"), (depth, width, width))
    shapes |= {"up": (depth, width, inner), "down": (depth, inner, width)}
    shapes |= {"embed": (options.vocab, width), "lm_head.weight": (width, options.vocab)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    weights = {name: 0.05 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    weights |= {"norm_attention": jnp.ones((depth, width)), "norm_mlp": jnp.ones((depth, width))}

    def norm(x: Any, scale: Any) -> Any:
        return scale * x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def layer(x: Any, p: Any) -> Any:
        h = norm(x, p["norm_attention"])
        q, k, v = ((h @ p[name]).reshape(*h.shape[:2], max(1, width // 64), -1) for name in "qkv")
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(h.shape) @ p["o"]
        return x + jax.nn.silu(norm(x, p["norm_mlp"]) @ p["up"]) @ p["down"], None

    def logits(params: Any, ids: Any) -> Any:
        layers = {name: x for name, x in params.items() if name not in ("embed", "lm_head.weight")}
        x, _ = jax.lax.scan(jax.checkpoint(layer) if options.remat else layer, params["embed"][ids], layers)
        return x @ params["lm_head.weight"]

    return weights, logits


def jax_steps(folder: str, batch: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, Step]:
    import jax
    import jax.numpy as jnp

    from gapo.adapters.flax import pair_logps
    from gapo.runs.models import llama

    settings, weights = llama.load(folder)
    logits = lambda p, ids: llama.logits(p, ids, settings)  # noqa: E731
    if options.scan or options.remat:
        weights, logits = scanned(options)
    params: Any = weights
    data: dict[str, Any] = {name: jnp.asarray(x) for name, x in batch.items()}
    if options.lora:
        data["weights"] = weights
        params = {}
        for i, name in enumerate(sorted(name for name in weights if any(part in name for part in ADAPTED))):
            down, up = (jax.random.fold_in(jax.random.key(part), i) for part in (0, 1))
            out, into = weights[name].shape
            params[name] = (
                0.02 * jax.random.normal(down, (RANK, into), jnp.float32),
                0.02 * jax.random.normal(up, (out, RANK), jnp.float32),
            )

    def margin_fn(p: Any, b: Any) -> Any:
        if options.lora:
            p = {**b["weights"], **{name: LowRank(b["weights"][name], adapter) for name, adapter in p.items()}}
        return pair_logps(lambda ids, _: logits(p, ids), b)

    def simpo(p: Any, b: Any) -> Any:
        return jax.value_and_grad(lambda q: objectives.simpo(*margin_fn(q, b)))(p)

    def prepared(function: Any) -> Step:
        start = shared.clock(options)()
        compiled = jax.jit(function).lower(params, data).compile()
        seconds = shared.clock(options)() - start
        temporary = compiled.memory_analysis().temp_size_in_bytes
        flops = compiled.cost_analysis()["flops"]
        return Step(lambda: jax.block_until_ready(compiled(params, data)), seconds, temporary, flops)

    functions = {
        way: gapo.value_and_grad(margin_fn, gapo.GAPOConfig(anchor=anchor), backend="jax") if anchor else simpo
        for way, anchor in WAYS.items()
    }
    if options.vmap:
        functions["vmap first_order"] = vmapped(margin_fn, gapo.GAPOConfig())
    return {name: prepared(function) for name, function in functions.items()}


def mlx_steps(folder: str, batch: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, Step]:
    steps = {}
    for way in WAYS:
        steps[way] = step = mlx_step(way, folder, batch, options)
        shared.progress(f"{way}: prepared")
        step.compile_seconds = None  # kernels of the ways before were there already
        if options.compile_time and not options.eager:
            step.compile_seconds = apart(mlx_compile_seconds, way, folder, batch, options)
            shared.progress(f"{way}: compiled anew in {step.compile_seconds:.0f} s")
    return steps


def mlx_step(way: str, folder: str, batch: dict[str, np.ndarray], options: argparse.Namespace) -> Step:
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from gapo.adapters.mlx_lm import make_loss
    from gapo.adapters.mlx_pairs import as_arrays

    data = as_arrays(batch)
    anchor = WAYS[way]
    loss = make_loss(gapo.GAPOConfig(anchor=anchor)) if anchor else make_loss(objective="simpo")
    model, _ = load_model(Path(folder))
    if options.lora:
        model.freeze()
        keys = [f"self_attn.{part}" for part in ADAPTED]
        linear_to_lora_layers(model, options.depth, {"rank": RANK, "scale": 1.0, "dropout": 0.0, "keys": keys})
        for name, module in model.named_modules():
            if name.endswith(ADAPTED):
                module.lora_b = 0.02 * mx.random.normal(module.lora_b.shape, key=mx.random.key(len(name)))
    model.train()
    state = [model.state, mx.random.state]
    grad = nn.value_and_grad(model, loss)
    step: Any = lambda *arrays: grad(model, *arrays)  # noqa: E731
    if not options.eager:
        step = mx.compile(step, inputs=state, outputs=state)
    mx.eval(state, data)

    def run() -> None:
        mx.eval(step(*data), state)

    clock = shared.clock(options)
    start = clock()
    run()
    first = clock() - start
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = clock()
    run()
    # The first run traces, compiles and computes; the second only computes.
    seconds = None if options.eager else max(0.0, first - (clock() - start))
    return Step(run, seconds, mx.get_peak_memory() - before, None)


def mlx_compile_seconds(*arguments: Any) -> float:
    """What `mlx_step` measured."""
    seconds = mlx_step(*arguments).compile_seconds
    return 0.0 if seconds is None else seconds


def apart(function: Callable[..., float], *arguments: Any) -> float:
    """`function(*arguments)` in a process of its own, in which no kernel is compiled yet.

    MLX's CPU build compiles each kernel with the system's compiler, about a second each. It keeps them in memory and in
    a folder, where the steps that come later would find those of the first one.
    """
    with tempfile.TemporaryDirectory() as folder:
        was, os.environ["TMPDIR"] = os.environ["TMPDIR"], folder
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                return pool.submit(function, *arguments).result()
        finally:
            os.environ["TMPDIR"] = was


def save_model(options: argparse.Namespace, folder: str) -> int:
    """Save a Llama of random weights, as `save_pretrained` leaves it; the number of its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=round(8 / 3 * options.width / 32) * 32,
        num_hidden_layers=options.depth,
        num_attention_heads=max(1, options.width // 64),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table, one for each step."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # MLX keeps compiled kernels there: none is left over from another run
        parameters = save_model(options, folder)
        if options.scan or options.remat:
            parameters = sum(x.size for x in scanned(options)[0].values())
        steps = {"jax": jax_steps, "mlx": mlx_steps}[options.framework](folder, shared.random_batch(options), options)
        seconds = shared.time_rounds(
            {name: step.run for name, step in steps.items()}, options.seconds, clock=shared.clock(options)
        )
    simpo = steps["simpo"]
    conditions = {
        "device": device(options.framework),
        "threads": os.cpu_count(),
        "clock": "cpu" if options.cpu_time else "wall",
        "version": importlib.metadata.version(options.framework),
        "gapo": gapo.__version__,
        "commit": shared.commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "parameters": parameters,
        "pairs": options.pairs,
        "tokens": options.tokens,
        "lora": options.lora,
        "layers": "remat" if options.remat else "scan" if options.scan else "loop",
        "eager": options.eager,
        "rounds": len(seconds["simpo"]),
    }
    return [
        {
            "framework": options.framework,
            "way": name,
            "ratio": round(middle, 3),
            "ratio_25": round(low, 3),
            "ratio_75": round(high, 3),
            "seconds": round(median(seconds[name]), 4),
            "flop_ratio": ratio(steps[name].flops, simpo.flops),
            "temporary_mib": round(steps[name].temporary / 2**20, 1),
            "temporary_ratio": ratio(steps[name].temporary, simpo.temporary),
            "compile_seconds": rounded(steps[name].compile_seconds),
            "compile_ratio": ratio(steps[name].compile_seconds, simpo.compile_seconds),
            **conditions,
        }
        for name, (low, middle, high) in shared.ratios_to_simpo(seconds).items()
    ]


def rounded(value: float | None) -> float | str:
    """A value of the table; empty where it was not measured."""
    return "" if value is None else round(value, 3)


def ratio(value: float | None, simpo: float | None) -> float | str:
    """A value of the table over SimPO's; empty where there is none."""
    return rounded(value / simpo) if value is not None and simpo else ""


def device(framework: str) -> str:
    """What the framework computes on."""
    if framework == "jax":
        import jax

        found = jax.devices()[0]
        return f"{platform.machine()} CPU" if found.platform == "cpu" else found.device_kind
    import mlx.core as mx

    return f"{platform.machine()} CPU" if mx.default_device() == mx.Device(mx.cpu) else f"{platform.machine()} GPU"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--framework", choices=("jax", "mlx"), required=True, help="the framework to time")
    shared.add_size_arguments(parser, pairs=4, tokens=256, width=256, depth=8, vocab=8192)
    parser.add_argument("--lora", action="store_true", help=f"train LoRA adapters of rank {RANK} on attention only")
    parser.add_argument("--scan", action="store_true", help="JAX: another model, whose layers are scanned; all train")
    parser.add_argument("--remat", action="store_true", help="JAX: the same, and its layers are rematerialised")
    parser.add_argument("--vmap", action="store_true", help="JAX: also first order by jax.vmap of each pair's gradient")
    parser.add_argument("--eager", action="store_true", help="MLX without mx.compile; JAX always compiles")
    parser.add_argument("--compile-time", action="store_true", help="MLX: measure it too, which takes minutes")
    shared.add_time_arguments(parser)
    return parser


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if (options.scan or options.remat) and (options.lora or options.framework != "jax"):
        parser.error("--scan and --remat are of JAX, and train all weights")
    rows = measure(options)
    for row in rows:
        flops = f"flops {row['flop_ratio']:.3f} x, " if row["flop_ratio"] else ""
        compiled = (
            f", compiled in {row['compile_seconds']:.1f} s ({row['compile_ratio']} x)" if row["compile_seconds"] else ""
        )
        print(
            f"{row['way']:<18} {row['ratio']:.2f} x SimPO ({row['ratio_25']:.2f} to {row['ratio_75']:.2f}), {flops}"
            f"temporary memory {row['temporary_ratio']:.2f} x ({row['temporary_mib']:.0f} MiB){compiled}"
        )
    first = rows[0]
    print(
        f"{first['framework']} {first['version']}, {first['device']}, {first['parameters'] / 1e6:.1f} M parameters, "
        f"{first['rounds']} rounds, {first['clock']} time, {first['time']}"
    )
    if options.output is not None:
        shared.append_rows(options.output, rows)


if __name__ == "__main__":
    main()
