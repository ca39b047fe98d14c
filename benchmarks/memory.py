"""Memory of a device under each recipe and configuration, computed from their files: what fits on 8 devices of 80 GB.

`python benchmarks/memory.py [--devices 8] [--batch_size N]` prints the table of docs/devices.md. The models are built
without memory, from the dimensions that their makers publish. All pairs are taken to be of the full length. What
kernels, communication and fragments take comes on top.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

RECIPES = Path(__file__).resolve().parent.parent / "gapo" / "recipes"
_MISTRAL = transformers.MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
_LLAMA = transformers.LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
_GEMMA = transformers.Gemma2Config(
    vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
    num_key_value_heads=8, head_dim=256, tie_word_embeddings=True,
)  # fmt: skip
MODELS = {
    "mistral-7b-instruct": _MISTRAL, "mistral-7b-base": _MISTRAL, "llama-3-8b-base": _LLAMA,
    "llama-3-8b-instruct": _LLAMA, "gemma-2-9b-it": _GEMMA,
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a configuration holds a model.

    Attributes:
        weight: bytes of a weight, an activation and a gradient.
        state: bytes for each parameter between steps, of which each device holds its part: the optimizer's moments (8),
            gradients summed over micro-batches, and DeepSpeed's own float32 weights.
        sharded: whether weights, and the gradients of a micro-batch, are in parts too. Such a step takes two passes;
            with whole weights it takes one, for which each layer keeps what its pairs' gradients are made of.
    """

    weight: int
    state: int
    sharded: bool


WAYS = {
    "fsdp2": Way(weight=4, state=8 + 4, sharded=True),
    "zero3": Way(weight=4, state=8 + 4 + 4, sharded=True),
    "zero2": Way(weight=2, state=8 + 4 + 4, sharded=False),
}


@cache
def layers_of(recipe: str) -> tuple[int, tuple[tuple[int, int], ...], int]:
    """Parameters of the model, (in, out) of each linear layer of a block, and the most parameters of a block."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(MODELS[recipe])
    block = model.model.layers[0]
    linear = tuple((m.in_features, m.out_features) for m in block.modules() if isinstance(m, torch.nn.Linear))
    return model.num_parameters(), linear, sum(p.numel() for p in block.parameters())


def per_device(recipe: str, way: Way, devices: int, batch_size: int, max_length: int) -> dict[str, float]:
    """Gigabytes (1e9 bytes) of a device, by use, where a step needs most."""
    parameters, linear, block = layers_of(recipe)
    config = MODELS[recipe]
    tokens = 2 * batch_size * max_length  # a pair has two rows
    depth, head = config.num_hidden_layers, config.vocab_size * config.hidden_size
    checkpoints = way.weight * tokens * depth * config.hidden_size
    logits = 4 * tokens * config.vocab_size
    # One block runs again, with its layers' inputs and outputs and their gradients; the logits have a gradient too.
    activations = checkpoints + way.weight * tokens * 2 * sum(i + o for i, o in linear) + 2 * logits
    gradient = way.weight * parameters / (devices if way.sharded else 1)
    held = {
        "weights": gradient,  # as many bytes
        "optimizer": way.state * parameters / devices,
        # A block, the next one, and the embeddings and the head.
        "gathered": way.weight * 2 * (block + head) if way.sharded else 0,
    }
    if way.sharded:
        # The backward of the probe or of the update; or the anchor's forward, with probe and policy set aside.
        held["step"] = max(gradient + activations, 2 * gradient + checkpoints + 2 * logits)
    else:
        kept = depth * sum(min(batch_size * i * o, tokens * (i + o)) for i, o in linear)
        kept += min(batch_size * head, tokens * (config.hidden_size + config.vocab_size))
        # The one backward; or afterwards, with the sum over the pairs beside what it is made of.
        held["step"] = max(activations, way.weight * kept + gradient)
    return {name: size / 1e9 for name, size in held.items()}


def settings_of(recipe: str) -> dict[str, Any]:
    """The recipe's own settings."""
    settings: dict[str, Any] = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    return settings


def table(devices: int, batch_size: int | None = None) -> list[str]:
    """Lines of Markdown: a recipe and a configuration each, with the recipe's number of pairs or another."""
    lines = [
        "| recipe | configuration | pairs a device, in all | weights | optimizer | gathered | step | sum, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in MODELS:
        settings = settings_of(recipe)
        pairs = batch_size or settings["batch_size"]
        for name, way in WAYS.items():
            sizes = per_device(recipe, way, devices, pairs, settings["max_length"])
            cells = " | ".join(f"{size:.1f}" for size in sizes.values())
            lines.append(f"| {recipe} | {name} | {pairs}, {pairs * devices} | {cells} | {sum(sizes.values()):.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--batch_size", type=int, help="pairs a device instead of the recipe's")
    options = parser.parse_args()
    print("\n".join(table(options.devices, options.batch_size)))


if __name__ == "__main__":
    main()
