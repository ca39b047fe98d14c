"""One tiny causal transformer written over the Array API, and its parameters as each backend takes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from frameworks import LIBRARIES, Library

import gapo


def make_params(
    *, layers: int = 1, width: int = 4, vocab: int = 7, tied: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random float64 weights by dotted name."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocab, width)}
    for i in range(layers):
        shapes |= {f"layers.{i}.{name}.weight": (width, width) for name in ("query", "key", "value", "out")}
        shapes |= {f"layers.{i}.up.weight": (2 * width, width), f"layers.{i}.down.weight": (width, 2 * width)}
        shapes |= {f"layers.{i}.norm.weight": (width,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, width)
    return {
        name: rng.normal(size=shape) / np.sqrt(shape[-1]) + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes.items()
    }


def logits(p: dict[str, Any], ids: Any, xp: Any) -> Any:
    """(batch, seq) token ids to (batch, seq, vocab) logits."""
    batch, seq = ids.shape
    width = p["embed.weight"].shape[1]
    x = xp.reshape(xp.take(p["embed.weight"], xp.reshape(ids, (-1,)), axis=0), (batch, seq, width))
    positions = xp.arange(seq)
    future = positions[None, :] > positions[:, None]
    for i in range(sum(name.endswith("query.weight") for name in p)):
        w = {name: p[f"layers.{i}.{name}.weight"] for name in ("query", "key", "value", "out", "up", "down", "norm")}
        h = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * w["norm"]
        query, key, value = (xp.matmul(h, xp.permute_dims(w[name], (1, 0))) for name in ("query", "key", "value"))
        scores = xp.matmul(query, xp.permute_dims(key, (0, 2, 1))) / float(np.sqrt(width))
        scores = xp.where(future[None, :, :], xp.full_like(scores, -1e9), scores)
        scores = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        attention = scores / xp.sum(scores, axis=-1, keepdims=True)
        x = x + xp.matmul(xp.matmul(attention, value), xp.permute_dims(w["out"], (1, 0)))
        x = x + xp.matmul(xp.tanh(xp.matmul(x, xp.permute_dims(w["up"], (1, 0)))), xp.permute_dims(w["down"], (1, 0)))
    head = p.get("lm_head.weight", p["embed.weight"])
    return xp.matmul(x, xp.permute_dims(head, (1, 0)))


def make_batch(*, pairs: int = 3, seq: int = 6, vocab: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pairs with a masked prompt and padding of random length."""
    rng = np.random.default_rng(seed)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = rng.integers(0, vocab, (pairs, seq))
        labels = ids.copy()
        for row in labels:
            start = rng.integers(1, seq)
            row[:start] = -100
            row[rng.integers(start + 1, seq + 1) :] = -100
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels}
    return batch


def make_margin_fn(library: Library, tied: bool = False, pair: bool = True) -> Callable[[Any, Any], Any]:
    """`margin_fn` of the backend: (chosen_logps, rejected_logps), or their difference for pair=False."""

    def margin_fn(params: Any, batch: dict[str, np.ndarray]) -> Any:
        p = flat(library, params)
        xp = namespace_of(library)
        logps = []
        for side in ("chosen", "rejected"):
            ids = library.asarray(batch[f"{side}_input_ids"])
            logps.append(gapo.sequence_logps(logits(p, ids, xp), library.asarray(batch[f"{side}_labels"])))
        return tuple(logps) if pair else logps[0] - logps[1]

    return margin_fn


def namespace_of(library: Library) -> Any:
    name = {"torch": "array_api_compat.torch", "numpy": "array_api_compat.numpy"}.get(library.name, library.module)
    return importlib.import_module(name)


def generator(library: Library, seed: int) -> Any:
    """The backend's random generator or key."""
    if library.name == "torch":
        return importlib.import_module("torch").Generator().manual_seed(seed)
    if library.name == "numpy":
        return np.random.default_rng(seed)
    return importlib.import_module("jax" if library.name == "jax" else "mlx.core").random.key(seed)


def flat(library: Library, params: Any, grads: bool = False) -> dict[str, Any]:
    """The parameters of a backend's `params` by dotted name, or for grads=True its gradients."""
    if library.name == "torch" and not grads:
        return dict(params.named_parameters())
    if library.name == "mlx":
        return dict(importlib.import_module("mlx.utils").tree_flatten(params if grads else params.parameters()))
    return dict(params)


def flat_grads(library: Library, grads: Any) -> dict[str, np.ndarray]:
    """Gradients by dotted name, as NumPy."""
    return {name: library.numpy(g) for name, g in flat(library, grads, grads=True).items()}


def to_backend(library: Library, params: dict[str, np.ndarray], dtype: str) -> Any:
    """`params` as the backend takes them: a module for torch and MLX, a dict for JAX and NumPy."""
    arrays = {name: library.asarray(value, dtype) for name, value in params.items()}
    if library.name == "torch":
        return _torch_module(arrays)
    if library.name == "mlx":
        nn, utils = importlib.import_module("mlx.nn"), importlib.import_module("mlx.utils")
        module = nn.Module()
        for name, value in utils.tree_unflatten(list(arrays.items())).items():
            setattr(module, name, value)
        return module
    return arrays


def _torch_module(arrays: dict[str, Any]) -> Any:
    nn = importlib.import_module("torch.nn")
    root = nn.Module()
    for name, value in arrays.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(value))
    return root


def update(library: Library, params: Any, grads: Any, learning_rate: float) -> Any:
    """One step of SGD in the backend's own arithmetic; the parameters afterwards."""
    if library.name == "torch":
        torch = importlib.import_module("torch")
        with torch.no_grad():
            for name, p in params.named_parameters():
                p -= learning_rate * grads[name]
        return params
    if library.name == "mlx":
        importlib.import_module("mlx.optimizers").SGD(learning_rate).update(params, grads)
        return params
    return {name: params[name] - learning_rate * grads[name] for name in params}


BACKENDS = {name: LIBRARIES[name] for name in gapo.backends.BACKENDS}

# How near each backend comes to float64 arithmetic on float64 input: NumPy differentiates numerically.
RTOL = {"numpy": 1e-9, "torch": 1e-10, "jax": 1e-10, "mlx": 1e-6}
