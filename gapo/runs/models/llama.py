"""Llama in JAX, a pure function of the weights under Hugging Face's names.

With it the tiny model, which transformers makes and saves, trains on JAX too. The function is that of
`transformers.LlamaForCausalLM` without biases, rope scaling and quantisation; models with these are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gapo.runs.errors import ConfigError

Params = dict[str, jax.Array]


def load(folder: str | Path) -> tuple[dict[str, Any], Params]:
    """(config.json, weights in float32) of a Llama that `save_pretrained` left in `folder`.

    Raises:
        ConfigError: no such folder, or another kind of model.
    """
    from safetensors.flax import load_file

    config = settings_of(folder)
    weights = load_file(Path(folder) / "model.safetensors")
    used = _names(config)
    unknown = sorted(name for name in weights if name not in used and not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ConfigError(
            f"backend jax trains plain Llama models, and {str(folder)!r} has weights that it would leave out, such as "
            f"{unknown[0]!r}: use backend torch, or gapo.adapters.flax with your own model"
        )
    return config, {name: x.astype(jnp.float32) for name, x in weights.items()}


def settings_of(folder: str | Path) -> dict[str, Any]:
    """config.json of a Llama that `logits` computes. Raises ConfigError like `load`."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise ConfigError(
            f"backend jax reads a local folder with config.json and model.safetensors; {str(folder)!r} is none. Use "
            'backend torch for Hub names, or model "tiny"'
        )
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    ropes = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]  # the latter before transformers 5
    rope = next((rope for rope in ropes if rope.get("rope_type", rope.get("type", "default")) != "default"), {})
    if config.get("model_type") != "llama" or rope:
        raise ConfigError(
            f"backend jax trains plain Llama models, got model_type {config.get('model_type')!r} with rope {rope}: use "
            "backend torch, or gapo.adapters.flax with your own model"
        )
    for name, plain in {"quantization_config": None, "hidden_act": "silu"}.items():
        if config.get(name, plain) != plain:
            raise ConfigError(
                f"backend jax trains plain Llama models, got {name} {config[name]!r}: use backend torch, or "
                "gapo.adapters.flax with your own model"
            )
    return config


def _names(config: dict[str, Any]) -> set[str]:
    """The weights that `logits` uses."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    parts = [*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{part}.weight" for part in (*parts, "input_layernorm", "post_attention_layernorm")}
    return names


def logits(params: Params, ids: jax.Array, config: dict[str, Any]) -> jax.Array:
    """(batch, seq) token ids to (batch, seq, vocab) logits; padding on the right."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 10000.0))
    batch, seq = ids.shape
    # Rotary positions (arXiv 2104.09864) in Hugging Face's layout: entry i of a head turns with entry i + head_dim / 2.
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.tile(jnp.arange(seq, dtype=jnp.float32)[:, None] * frequency, 2)[None, :, None, :]
    x = params["model.embed_tokens.weight"][ids]

    def norm(x: jax.Array, name: str) -> jax.Array:
        scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config["rms_norm_eps"])
        return params[f"{name}.weight"] * x * scale

    def linear(x: jax.Array, name: str) -> jax.Array:
        return x @ params[f"{name}.weight"].T

    def rotated(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, -1)
        return x * jnp.cos(angles) + jnp.concatenate([-second, first], -1) * jnp.sin(angles)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            linear(h, f"{layer}.self_attn.{name}_proj").reshape(batch, seq, count, head_dim)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        attended = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + linear(attended.reshape(batch, seq, -1), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (linear(h, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(jax.nn.silu(gate) * up, f"{layer}.mlp.down_proj")
    x = norm(x, "model.norm")
    return linear(x, "lm_head") if "lm_head.weight" in params else x @ params["model.embed_tokens.weight"].T
