"""The step once more, from method.md alone: three forwards and autograd in float64 PyTorch, token by token.

It shares no line with the package: log-probabilities are summed in loops, the weights come from autograd of the loss.
"""

from __future__ import annotations

from typing import Any

import models
import numpy as np
from frameworks import require

torch = require("torch")
xp = require("array_api_compat.torch")


def logps(params: dict[str, torch.Tensor], batch: dict[str, np.ndarray], side: str) -> torch.Tensor:
    """Mean log-probability of each response, summed token by token."""
    ids, labels = torch.from_numpy(batch[f"{side}_input_ids"]), batch[f"{side}_labels"]
    logits = models.logits(params, ids, xp)
    rows = []
    for i, row in enumerate(labels):
        terms = [
            logits[i, t - 1, row[t]] - torch.log(torch.exp(logits[i, t - 1]).sum())
            for t in range(1, len(row))
            if row[t] != -100
        ]
        rows.append(sum(terms) / len(terms))
    return torch.stack(rows)


def margins(params: dict[str, torch.Tensor], batch: dict[str, np.ndarray]) -> torch.Tensor:
    return logps(params, batch, "chosen") - logps(params, batch, "rejected")


def step(
    arrays: dict[str, np.ndarray],
    batch: dict[str, np.ndarray],
    *,
    beta: float = 2.5,
    gamma: Any = 0.25,
    rho: float = 0.025,
    adaptive: bool = True,
    probe: str = "loss",
    anchor: str = "exact",
    selected: list[str] | None = None,
    sft_weight: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> dict[str, Any]:
    """Everything a step gives, as NumPy; `selected` names the perturbed parameters."""
    params = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in arrays.items()}
    selected = [name for name in params if name != "lm_head.weight"] if selected is None else selected
    gamma = torch.as_tensor(gamma, dtype=torch.float64)
    m = margins(params, batch)
    probe_loss = torch.log1p(torch.exp(gamma - beta * m)).mean() if probe == "loss" else -m.mean()
    g = dict(
        zip(selected, torch.autograd.grad(probe_loss, [params[n] for n in selected], retain_graph=True), strict=True)
    )
    scale = {n: params[n].detach().abs() if adaptive else torch.ones_like(g[n]) for n in selected}
    norm = torch.cat([(scale[n] * g[n]).ravel() for n in selected]).norm()
    delta = {n: rho * scale[n] ** 2 * g[n] / norm for n in selected}
    with torch.no_grad():
        moved = margins({n: p + delta.get(n, 0) for n, p in params.items()}, batch)
    if anchor == "first_order":
        rows = [torch.autograd.grad(m[i], [params[n] for n in selected], retain_graph=True) for i in range(len(m))]
        drop = [-sum((row * delta[n]).sum() for row, n in zip(grads, selected, strict=True)) for grads in rows]
        moved = m.detach() - torch.stack(drop)
    gap = (m.detach() - moved).requires_grad_()
    x = beta * gap - gamma
    if loss_type == "sigmoid":
        losses = (1 - label_smoothing) * torch.log1p(torch.exp(-x)) + label_smoothing * torch.log1p(torch.exp(x))
    else:
        losses = (1 - label_smoothing) * torch.relu(1 - x) + label_smoothing * torch.relu(1 + x)
    weights = -torch.autograd.grad(losses.sum(), gap)[0]
    live = (weights * -m).mean() - sft_weight * logps(params, batch, "chosen").mean()
    grads = torch.autograd.grad(live, list(params.values()))
    loss = losses.mean() - sft_weight * logps(params, batch, "chosen").mean()
    flat = torch.cat([g[n].ravel() for n in selected])
    return {
        "loss": loss.detach().numpy(),
        "margins": m.detach().numpy(),
        "anchor_margins": moved.numpy(),
        "anchor_gaps": gap.detach().numpy(),
        "weights": weights.numpy(),
        "grad_norm": flat.norm().numpy(),
        "radius": np.float64(rho),
        "grads": {
            n: (torch.zeros_like(params[n]) if d is None else d).numpy() for n, d in zip(params, grads, strict=True)
        },
    }
