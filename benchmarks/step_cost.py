"""Cost of a step against SimPO's, on the same batch: time, peak memory, flops.

The ways are interleaved in one process, so that a noisy machine disturbs all alike: ratios are taken within each round,
and their median and quartiles reported. Rows carry device, versions, commit and time.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
import transformers

import gapo
from gapo import objectives
from gapo.adapters.hf.margins import pair_logps

Step = Callable[[torch.nn.Module, dict[str, torch.Tensor]], None]


def simpo(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """One forward and one backward on the probe loss."""
    objectives.simpo(*pair_logps(model, batch)).backward()
    model.zero_grad()


def three_forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
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


def gapo_step(**options: Any) -> Step:
    """`gapo.value_and_grad` with these options."""
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(**options), backend="torch")
    return lambda model, batch: step(model, batch) and None


WAYS: dict[str, Step] = {
    "simpo": simpo,
    "three-forward": three_forward,
    "gapo exact": gapo_step(anchor="exact"),
    "last layers": gapo_step(anchor="exact", last_layers=2),
    "gapo first_order": gapo_step(anchor="first_order"),
}


# Class of the configuration, and what a family calls by other names or has beside.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", {"head_dim": 64}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 64}),
    "cohere": ("CohereConfig", {}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True}),
    "opt": ("OPTConfig", {"dropout": 0.0}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}),
}


def make_model(options: argparse.Namespace) -> torch.nn.Module:
    """A model of random weights; with --lora adapters on attention, whose B is not 0."""
    torch.manual_seed(0)
    name, special = FAMILIES[options.family]
    heads, inner = options.width // 64, round(8 / 3 * options.width / 32) * 32
    sizes: dict[str, Any] = {"intermediate_size": inner, "num_key_value_heads": heads}
    if options.family == "falcon":
        sizes = {"num_kv_heads": heads, "ffn_hidden_size": inner}
    if options.family == "opt":
        sizes = {"ffn_dim": inner, "word_embed_proj_dim": options.width}
    config = getattr(transformers, name)(
        vocab_size=options.vocab,
        hidden_size=options.width,
        num_hidden_layers=options.depth,
        num_attention_heads=heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
        **special,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, init_lora_weights=False))
    return model.to(options.device, getattr(torch, options.dtype))


def make_batch(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Random pairs of equal length, the first quarter of each row a prompt."""
    batch = {}
    for side in ("chosen", "rejected"):
        ids = torch.randint(1, options.vocab, (options.pairs, options.tokens))
        labels = ids.clone()
        labels[:, : options.tokens // 4] = -100
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": torch.ones_like(ids)}
    return {name: x.to(options.device) for name, x in batch.items()}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table, one for each way."""
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = make_model(options), make_batch(options)
    flops = {}
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * a[2] * b[2]}
    for name, way in WAYS.items():
        way(model, batch)  # the first step of a model looks at more
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            way(model, batch)
        flops[name] = counter.get_total_flops()
    seconds = time_ways(model, batch, options.device, options.seconds)
    peaks = {name: peak_memory(model, batch, way, options.device) for name, way in WAYS.items()}
    size = sum(p.numel() for p in model.parameters())
    shared = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gapo": gapo.__version__,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "parameters": size,
        "family": options.family,
        "pairs": options.pairs,
        "tokens": options.tokens,
        "dtype": options.dtype,
        "lora": options.lora,
        "rounds": len(seconds["simpo"]),
    }
    rows = []
    for name in WAYS:
        ratios = [mine / simpos for mine, simpos in zip(seconds[name], seconds["simpo"], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        rows.append(
            {
                "way": name,
                "ratio": round(middle, 3),
                "ratio_25": round(low, 3),
                "ratio_75": round(high, 3),
                "seconds": round(median(seconds[name]), 4),
                "flop_ratio": round(flops[name] / flops["simpo"], 3),
                "peak_mib": round(peaks[name]),
                "peak_ratio": round(peaks[name] / peaks["simpo"], 3),
                **shared,
            }
        )
    return rows


def growth(options: argparse.Namespace) -> None:
    """How time grows with each size: the slope of log seconds over log size, and the ratio to SimPO at each."""
    sizes = {"pairs": (2, 4, 8), "tokens": (128, 256, 512), "depth": (4, 8, 16), "width": (128, 256, 512)}
    for name, values in sizes.items():
        medians: dict[str, list[float]] = {way: [] for way in WAYS}
        for value in values:
            changed = argparse.Namespace(**{**vars(options), name: value})
            seconds = time_ways(make_model(changed), make_batch(changed), options.device, options.seconds / 12)
            for way in WAYS:
                medians[way].append(median(seconds[way]))
        print(f"{name} {' '.join(map(str, values))}")
        for way in WAYS:
            slope = np.polyfit(np.log(values), np.log(medians[way]), 1)[0]
            ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(medians[way], medians["simpo"], strict=True))
            print(f"  {way:<18} slope {slope:.2f}, ratio to SimPO {ratios}")


def time_ways(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], device: str, budget: float
) -> dict[str, list[float]]:
    """Seconds of each way, round by round, for `budget` seconds and at least three rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for way in WAYS.values():
        way(model, batch)
    deadline = time.monotonic() + budget
    while time.monotonic() < deadline or len(seconds["simpo"]) < 3:
        for name, way in WAYS.items():
            synchronise(device)
            began = time.perf_counter()
            way(model, batch)
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_memory(model: torch.nn.Module, batch: dict[str, torch.Tensor], way: Step, device: str) -> float:
    """MiB of tensors at the peak of a step, the weights among them, as PyTorch's allocator counts them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        way(model, batch)
        return torch.cuda.max_memory_allocated() / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        way(model, batch)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (weights + max(accumulate(sizes))) / 2**20


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios to SimPO's step as bars, with their quartiles, beside the ratios of flops."""
    from gapo.experiments import plots

    def bars(axes: Any) -> None:
        at = np.arange(len(rows))
        ratios = np.array([row["ratio"] for row in rows])
        spread = np.abs([[row["ratio"] - row["ratio_25"], row["ratio_75"] - row["ratio"]] for row in rows]).T
        axes.bar(at - 0.2, ratios, 0.4, yerr=spread, color=plots.BLUE, label="time (median, quartiles)")
        axes.bar(at + 0.2, [row["flop_ratio"] for row in rows], 0.4, color=plots.ORANGE, label="flops")
        axes.set_xticks(at, [row["way"] for row in rows])

    svg = plots.figure("Cost of a step", "", "ratio to SimPO's", bars)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg.replace("currentColor", "#777777"), encoding="utf-8")


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def commit() -> str:
    """The commit measured, with a "+" if files differ from it."""
    ask = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*ask, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*ask, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return head + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4, help="pairs in the batch")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of prompt and answer")
    parser.add_argument("--width", type=int, default=256, help="hidden size")
    parser.add_argument("--depth", type=int, default=8, help="layers")
    parser.add_argument("--vocab", type=int, default=8192, help="size of the vocabulary")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="llama", help="architecture of the model")
    parser.add_argument("--lora", action="store_true", help="train LoRA adapters only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--seconds", type=float, default=120, help="how long to measure")
    parser.add_argument("--output", type=Path, help="CSV file to append the rows to")
    parser.add_argument("--growth", action="store_true", help="how time grows with each size, instead")
    parser.add_argument("--plot", type=Path, help="SVG file to draw the ratios in")
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
    if options.plot is not None:
        draw(rows, options.plot)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        new = not options.output.exists()
        with options.output.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
