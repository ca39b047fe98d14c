"""`update="anchor"` and masks in each adapter: the gradient is `gapo.value_and_grad`'s, which tests/core proves."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import hf_models
import jax
import mlx.core as mx
import mlx_problem
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax_problem import Mixer
from flax_problem import batch as flax_batch
from mlx import nn
from mlx.utils import tree_flatten
from trainers import callback_of, make_trainer
from transformers import TrainerCallback

import gapo
from gapo.adapters import hf
from gapo.adapters.flax import make_loss, make_train_step
from gapo.adapters.flax import pair_logps as flax_pair_logps
from gapo.adapters.hf.margins import pair_logps
from gapo.adapters.mlx_lm import make_loss as make_mlx_loss
from gapo.adapters.mlx_lm import pair_logps as mlx_pair_logps
from gapo.adapters.mlx_pairs import as_arrays

CONFIG = gapo.GAPOConfig(rho=0.3, update="anchor", anchor="exact")


class Gradients(TrainerCallback):
    """The gradients as the optimizer is to get them, and the weights at that moment."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        ("gapo", gapo.GAPOConfig(rho=0.3, update="anchor", sft_weight=0.3)),
        ("simpo", gapo.GAPOConfig(rho=0.3, update="anchor", last_layers=1)),
        ("simpo", gapo.GAPOConfig(rho=0.3, update="anchor", perturb={"up_proj": np.arange(32) < 10})),
    ],
    ids=["gapo", "last layer", "mask"],
)
def test_a_trainer_accumulates_it(tmp_path: Path, objective: str, config: gapo.GAPOConfig) -> None:
    batches: list[Any] = []
    trainer = make_trainer(
        tmp_path,
        config=config,
        max_steps=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        callback={"objective": objective, "on_step": lambda result, batch: batches.append(batch)},
    )
    trainer.add_callback(gradients := Gradients())
    model = hf_models.make("llama")
    trainer.train()
    step = gapo.value_and_grad(pair_logps, config, objective, backend="torch")
    by_batch = [step(model, batch)[1] for batch in batches]
    assert len(by_batch) == 2
    for name, g in gradients.seen.items():
        torch.testing.assert_close(g, (by_batch[0][name] + by_batch[1][name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_trainer_whose_anchor_fails_keeps_the_weights(tmp_path: Path, where: str) -> None:
    trainer = make_trainer(tmp_path, config=CONFIG)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    weight = trainer.model.model.layers[0].mlp.up_proj.weight

    def fail(*args: Any) -> None:
        if not torch.equal(weight, before["model.layers.0.mlp.up_proj.weight"]):
            raise RuntimeError("at the anchor")

    head = trainer.model.lm_head
    (head.register_forward_hook if where == "forward" else head.register_full_backward_hook)(fail)
    with pytest.raises(RuntimeError, match="at the anchor"):
        trainer.train()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_what_a_trainer_cannot_do_with_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, config=CONFIG)
    callback_of(trainer).detach()
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
    with pytest.raises(ValueError, match="update='anchor' is not supported with fp16=True"):
        hf.GAPOCallback(CONFIG).attach(trainer)


def test_arguments_with_a_mask_go_into_json(tmp_path: Path) -> None:
    masks = {"up_proj": np.arange(32) < 8}
    args = hf.GAPOConfig(output_dir=str(tmp_path), perturb=masks, update="anchor", report_to="none")  # type: ignore[arg-type]
    settings = json.loads(args.to_json_string())
    assert (settings["perturb"], settings["update"]) == ("Mask(up_proj: 0.25 of its entries)", "anchor")
    assert args.step_config().perturb["up_proj"] is masks["up_proj"]  # type: ignore[index]


@pytest.mark.parametrize("objective", ["gapo", "simpo"])
def test_flax(objective: str) -> None:
    batch = flax_batch()
    graph, params, rest = nnx.split(Mixer(nnx.Rngs(0)), nnx.Param, ...)

    def margin_fn(params: Any, batch: Any) -> Any:
        return flax_pair_logps(lambda ids, mask: nnx.merge(graph, params, rest, copy=True)(ids), batch)

    _, expected = gapo.value_and_grad(margin_fn, CONFIG, objective, backend="jax")(params, batch)
    model = Mixer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    make_train_step(config=CONFIG, objective=objective)(model, optimizer, batch)
    loss = make_loss(config=CONFIG, objective=objective)
    grads = nnx.jit(nnx.grad(lambda m: 3.0 * loss(m, batch)[0]))(Mixer(nnx.Rngs(0)))
    for new, old, g, of_loss in zip(
        *map(jax.tree.leaves, (nnx.state(model, nnx.Param), params, expected, grads)), strict=True
    ):
        np.testing.assert_allclose(old - new, g, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(of_loss, 3.0 * g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("objective", ["gapo", "simpo"])
@pytest.mark.usefixtures("quick_kernels")
def test_mlx(objective: str, compiled: bool) -> None:
    model = mlx_problem.mixer()
    ids, labels, _ = as_arrays(mlx_problem.BATCH)
    step = gapo.value_and_grad(mlx_pair_logps, CONFIG, objective, backend="mlx")
    expected = dict(tree_flatten(step(model, (ids, labels))[1]))
    before = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    loss_and_grad = nn.value_and_grad(model, make_mlx_loss(CONFIG, objective=objective))
    model.train()

    def taken(ids: mx.array, labels: mx.array) -> Any:
        return loss_and_grad(model, ids, labels)[1]

    if compiled:
        mx.enable_compile()
    try:
        taken = partial(mx.compile, inputs=model.state, outputs=model.state)(taken) if compiled else taken
        grads = dict(tree_flatten(taken(ids, labels)))
        mx.eval(grads)
    finally:
        mx.disable_compile()
    assert grads.keys() == expected.keys()
    for name, g in expected.items():
        np.testing.assert_allclose(np.array(grads[name]), np.array(g), rtol=1e-3, atol=1e-5, err_msg=name)
    for name, x in tree_flatten(model.trainable_parameters()):
        np.testing.assert_array_equal(np.array(x), before[name])
