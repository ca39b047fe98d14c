"""Cost of a step against SimPO's, on the same batch: time, peak memory, flops.

The steps take turns in one process, so that a noisy machine disturbs all alike. Ratios are taken within each round; the
table shows their median and quartiles. Rows carry device, versions, commit and time.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import shared
import torch
import transformers

import gapo
from gapo import objectives
from gapo.adapters.hf.margins import pair_logps

Batch = dict[str, torch.Tensor]
Step = Callable[[], Any]


def simpo(model: torch.nn.Module, batch: Batch) -> None:
    """One forward and one backward on the probe loss."""
    objectives.simpo(*pair_logps(model, batch)).backward()
    model.zero_grad()


def three_forward(model: torch.nn.Module, batch: Batch) -> None:
    """The step as its description reads: a forward and backward for the probe, the anchor's forward, and both again."""
    config = gapo.GAPOConfig()
    objectives.simpo(*pair_logps(model, batch)).backward()
    moved = [p for n, p in model.named_parameters() if p.grad is not None and not n.endswith("lm_head.weight")]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.detach() * p.grad) for p in moved]))
    saved = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for p in moved:
            p += config.rho * p * p * p.grad / norm.clamp(min=1e-12)
        anchor = pair_logps(model, batch)
        for p, theta in zip(moved, saved, strict=True):
            p.copy_(theta)
    model.zero_grad()
    gapo.loss(*pair_logps(model, batch), *anchor, beta=config.beta, gamma=config.gamma).backward()
    model.zero_grad()


GAPO = {
    "gapo exact": {"anchor": "exact"},
    "last layers": {"anchor": "exact", "last_layers": 2},
    "gapo first_order": {"anchor": "first_order"},
}


# The class of each family's configuration, and the settings that it has beside the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", {"head_dim": 64}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 64}),
    "cohere": ("CohereConfig", {}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True}),
    "opt": ("OPTConfig", {"dropout": 0.0}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8}),
    "smollm2": (
        "LlamaConfig",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "vocab_size": 49152,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "tie_word_embeddings": True,
        },
    ),  # SmolLM2-135M: its sizes are its own, whatever the options say
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}),
}


def make_model(options: argparse.Namespace) -> torch.nn.Module:
    """A model of random weights; with --lora, adapters on attention, whose B is not 0."""
    torch.manual_seed(0)
    name, special = FAMILIES[options.family]
    heads, inner = max(1, options.width // 64), round(8 / 3 * options.width / 32) * 32
    sizes: dict[str, Any] = {"intermediate_size": inner, "num_key_value_heads": heads}
    if options.family == "falcon":
        sizes = {"num_kv_heads": heads, "ffn_hidden_size": inner}
    if options.family == "opt":
        sizes = {"ffn_dim": inner, "word_embed_proj_dim": options.width}
    settings: dict[str, Any] = {
        "vocab_size": options.vocab,
        "hidden_size": options.width,
        "num_hidden_layers": options.depth,
        "num_attention_heads": heads,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, name)(**settings | sizes | special)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, init_lora_weights=False))
    return model.to(options.device, getattr(torch, options.dtype))


def make_steps(model: torch.nn.Module, options: argparse.Namespace) -> dict[str, Step]:
    """The steps to time, on one batch."""
    batch = {name: torch.from_numpy(x).to(options.device) for name, x in shared.random_batch(options).items()}

    def gapo_step(settings: dict[str, Any]) -> Step:
        step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(**settings), backend="torch")
        return lambda: step(model, batch) and None  # gradients are freed at once, as after an optimizer's step

    steps = {"simpo": lambda: simpo(model, batch), "three-forward": lambda: three_forward(model, batch)}
    return steps | {name: gapo_step(settings) for name, settings in GAPO.items()}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table, one for each step."""
    model = make_model(options)
    steps = make_steps(model, options)
    seconds = time_steps(steps, options, options.seconds)
    ratios = shared.ratios_to_simpo(seconds)
    flops = {name: count_flops(step) for name, step in steps.items()}
    peaks = {name: peak_memory(model, step, options.device) for name, step in steps.items()}
    conditions = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gapo": gapo.__version__,
        "commit": shared.commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "family": options.family,
        "pairs": options.pairs,
        "tokens": options.tokens,
        "dtype": options.dtype,
        "lora": options.lora,
        "clock": "cpu" if options.cpu_time else "wall",
        "rounds": len(seconds["simpo"]),
    }
    return [
        {
            "way": name,
            "ratio": round(middle, 3),
            "ratio_25": round(low, 3),
            "ratio_75": round(high, 3),
            "seconds": round(median(seconds[name]), 4),
            "flop_ratio": round(flops[name] / flops["simpo"], 3),
            "peak_mib": round(peaks[name]),
            "peak_ratio": round(peaks[name] / peaks["simpo"], 3),
            **conditions,
        }
        for name, (low, middle, high) in ratios.items()
    ]


def growth(options: argparse.Namespace) -> None:
    """Print how time grows with each size: the slope of log seconds over log size, and the ratio to SimPO at each."""
    sizes = {"pairs": (2, 4, 8), "tokens": (128, 256, 512), "depth": (4, 8, 16), "width": (128, 256, 512)}
    for size, values in sizes.items():
        medians: dict[str, list[float]] = {}
        for value in values:
            changed = argparse.Namespace(**{**vars(options), size: value})
            for name, times in time_steps(
                make_steps(make_model(changed), changed), options, options.seconds / 12
            ).items():
                medians.setdefault(name, []).append(median(times))
        print(f"{size} {' '.join(map(str, values))}")
        for name, times in medians.items():
            slope = np.polyfit(np.log(values), np.log(times), 1)[0]
            ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(times, medians["simpo"], strict=True))
            print(f"  {name:<18} slope {slope:.2f}, ratio to SimPO {ratios}")


def time_steps(steps: dict[str, Step], options: argparse.Namespace, budget: float) -> dict[str, list[float]]:
    on_cuda = options.device == "cuda"
    synchronise = torch.cuda.synchronize if on_cuda else (lambda: None)
    return shared.time_rounds(steps, budget, synchronise, shared.clock(options))


def count_flops(step: Step) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * a[2] * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    return int(counter.get_total_flops())


def peak_memory(model: torch.nn.Module, step: Step, device: str) -> float:
    """MiB of tensors at the peak of a step, weights included, as PyTorch's allocator counts them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (weights + max(accumulate(sizes))) / 2**20


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios to SimPO's step as bars, with their quartiles, beside the ratios of flops."""
    from gapo.runs.output import plots

    def bars(axes: Any) -> None:
        places = np.arange(len(rows))
        ratios = np.array([row["ratio"] for row in rows])
        spread = np.abs([[row["ratio"] - row["ratio_25"], row["ratio_75"] - row["ratio"]] for row in rows]).T
        axes.bar(places - 0.2, ratios, 0.4, yerr=spread, color=plots.BLUE, label="time (median, quartiles)")
        axes.bar(places + 0.2, [row["flop_ratio"] for row in rows], 0.4, color=plots.ORANGE, label="flops")
        axes.set_xticks(places, [row["way"] for row in rows])

    shared.write_picture(path, plots.figure("Cost of a step", "", "ratio to SimPO's", bars))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    shared.add_size_arguments(parser, pairs=4, tokens=256, width=256, depth=8, vocab=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="llama", help="architecture of the model")
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the model")
    shared.add_time_arguments(parser)
    parser.add_argument("--growth", action="store_true", help="print how time grows with each size, and stop")
    parser.add_argument("--plot", type=Path, help="SVG file for a picture of the ratios")
    options = parser.parse_args()
    if options.growth:
        growth(options)
        return
    rows = measure(options)
    for row in rows:
        print(
            f"{row['way']:<18} {row['ratio']:.2f} x SimPO ({row['ratio_25']:.2f} to {row['ratio_75']:.2f}), "
            f"flops {row['flop_ratio']:.2f} x, peak memory {row['peak_ratio']:.2f} x ({row['peak_mib']} MiB)"
        )
    first = rows[0]
    print(
        f"torch {first['torch']}, {first['device']}, {first['threads']} threads, {first['parameters'] / 1e6:.1f} M "
        f"parameters, {first['rounds']} rounds, {first['clock']} time, {first['time']}"
    )
    if options.plot is not None:
        draw(rows, options.plot)
    if options.output is not None:
        shared.append_rows(options.output, rows)


if __name__ == "__main__":
    main()
