"""GAPO in Flax: NNX and Linen train as the bare step says; accumulation, LoRA, dropout, checkpoints, a mesh."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import token_pairs
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gapo
from gapo.adapters.flax import make_eval_step, make_train_step, pair_logps
from gapo.data import collate
from gapo.metrics import reward_metrics, step_metrics

CONFIG = gapo.GAPOConfig(rho=0.3)
WIDTH, VOCAB = 16, token_pairs.VOCAB


class Mixer(nnx.Module):
    """A causal model in a few lines: a running mean of what came before, and an MLP."""

    def __init__(self, rngs: nnx.Rngs, dropout: float = 0.0, lora: int = 0) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        make = (lambda i, o: nnx.LoRALinear(i, o, lora_rank=lora, rngs=rngs)) if lora else None
        self.up = make(WIDTH, 32) if make else nnx.Linear(WIDTH, 32, rngs=rngs)
        self.down = nnx.Linear(32, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        x = self.embed(ids)
        x = x + jnp.cumsum(x, 1) / jnp.arange(1, ids.shape[1] + 1)[None, :, None]
        return self.lm_head(x + self.down(self.dropout(jax.nn.tanh(self.up(x)))))


class LinenMixer(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        x = linen.Embed(VOCAB, WIDTH, name="embed")(ids)
        x = x + jnp.cumsum(x, 1) / jnp.arange(1, ids.shape[1] + 1)[None, :, None]
        hidden = jax.nn.tanh(linen.Dense(32, name="up")(x))
        return linen.Dense(VOCAB, name="lm_head")(x + linen.Dense(WIDTH, name="down")(hidden))


def batch(seed: int = 0, pairs: int = 4) -> dict[str, np.ndarray]:
    return token_pairs.arrays(pairs, seed)


def nnx_problem(tx: Any = None, **options: Any) -> tuple[Any, Any]:
    model = Mixer(nnx.Rngs(0), **options)
    return model, nnx.Optimizer(model, tx or optax.sgd(0.1), wrt=nnx.Param)


def bare_step(model: Any, data: Any, config: gapo.GAPOConfig = CONFIG) -> tuple[Any, Any]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def margin_fn(p: Any, b: Any) -> Any:
        merged = nnx.merge(graph, p, rest, copy=True)
        return pair_logps(lambda ids, _: merged(ids), b)

    return gapo.value_and_grad(margin_fn, config, backend="jax")(params, data)


def assert_close(found: Any, expected: Any, tol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


def test_nnx_takes_the_step_of_the_backend() -> None:
    model, optimizer = nnx_problem()
    result, grads = bare_step(model, batch())
    before = nnx.state(model, nnx.Param)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before, grads)
    metrics, found = make_train_step(config=CONFIG)(model, optimizer, batch())
    assert_close(nnx.state(model, nnx.Param), expected)
    assert_close(found.weights, result.weights)
    assert set(metrics) == {"loss", *step_metrics(result, CONFIG)}
    assert "rewards/accuracies" in metrics
    assert float(metrics["gapo/radius"]) == pytest.approx(0.3, rel=1e-4)


def test_linen_takes_the_step_of_the_backend() -> None:
    module = LinenMixer()
    params = module.init(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    state = TrainState.create(apply_fn=module.apply, params=params, tx=optax.sgd(0.1))
    fn = lambda p, b: pair_logps(lambda ids, _: module.apply({"params": p}, ids), b)  # noqa: E731
    _, grads = gapo.value_and_grad(fn, CONFIG, backend="jax")(params, batch())
    new, metrics, result = make_train_step(config=CONFIG)(state, batch())
    assert_close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    assert int(new.step) == 1
    assert metrics["gapo/weight_min"] == result.weights.min()


def test_multisteps_accumulates() -> None:
    model, optimizer = nnx_problem(optax.MultiSteps(optax.sgd(0.1), 2))
    grads = [bare_step(model, batch(seed))[1] for seed in (1, 2)]
    before = nnx.state(model, nnx.Param)
    expected = jax.tree.map(lambda p, a, b: p - 0.05 * (a + b), before, *grads)
    train_step = make_train_step(config=CONFIG)
    for seed in (1, 2):
        train_step(model, optimizer, batch(seed))
    assert_close(nnx.state(model, nnx.Param), expected)


def test_lora_alone_trains() -> None:
    model = Mixer(nnx.Rngs(0), lora=2)
    model.up.lora.lora_b[...] = jax.random.normal(jax.random.key(1), (2, 32), jnp.float32)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    metrics, _ = make_train_step(config=CONFIG, wrt=nnx.LoRAParam)(model, optimizer, batch())
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, nnx.state(model))
    paths = [jax.tree_util.keystr(path) for path, moved in jax.tree_util.tree_leaves_with_path(changed) if moved]
    assert len(paths) == 2
    assert all("lora" in path for path in paths)
    assert float(metrics["gapo/radius"]) == pytest.approx(0.3, rel=1e-4)


def test_dropout_masks_are_shared_within_a_step_and_new_in_the_next() -> None:
    model, optimizer = nnx_problem(optax.sgd(0.0), dropout=0.5)
    train_step = make_train_step(config=gapo.GAPOConfig(rho=0.0))
    first, second = (train_step(model, optimizer, batch())[1] for _ in range(2))
    np.testing.assert_array_equal(first.anchor_gaps, 0)
    assert float(jnp.abs(first.margins - second.margins).max()) > 1e-4


def test_evaluation_has_no_anchor() -> None:
    model, _ = nnx_problem()
    data = {name: jnp.asarray(x) for name, x in batch().items()}
    chosen, rejected = pair_logps(lambda ids, _: model(ids), data)
    metrics = make_eval_step(config=CONFIG)(model, batch())
    expected = jnp.mean(jax.nn.softplus(CONFIG.gamma - CONFIG.beta * (chosen - rejected)))
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    for name, value in reward_metrics(chosen, rejected, CONFIG).items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6)


def test_orbax_checkpoint_resumes_the_trajectory(tmp_path: Path) -> None:
    train_step = make_train_step(config=CONFIG)
    model, optimizer = nnx_problem(optax.adam(1e-2))
    train_step(model, optimizer, batch(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step-1", nnx.state((model, optimizer)))
    train_step(model, optimizer, batch(2))
    again, other = nnx_problem(optax.adam(1e-2))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update((again, other), checkpointer.restore(tmp_path / "step-1", nnx.state((again, other))))
    train_step(again, other, batch(2))
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)


def test_a_mesh_equals_one_device() -> None:
    model, optimizer = nnx_problem()
    make_train_step(config=CONFIG)(model, optimizer, batch(pairs=8))
    sharded, other = nnx_problem()
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    state = nnx.state(sharded, nnx.Param)
    spec = lambda x: NamedSharding(mesh, P(None, "model") if x.ndim == 2 else P())  # noqa: E731
    nnx.update(sharded, jax.tree.map(lambda x: jax.device_put(x, spec(x)), state))
    placed = jax.device_put(batch(pairs=8), NamedSharding(mesh, P("data")))
    make_train_step(config=CONFIG)(sharded, other, placed)
    assert_close(nnx.state(sharded, nnx.Param), nnx.state(model, nnx.Param), 2e-5)


def test_a_loss_that_is_not_finite_is_left_out_by_optax() -> None:
    """Under jit nothing can raise: the loss is NaN, and so are the weights but for `optax.apply_if_finite`."""
    empty = batch()
    empty["chosen_labels"][2] = -100  # an answer without a token
    for tx, kept in ((optax.sgd(0.1), False), (optax.apply_if_finite(optax.sgd(0.1), 3), True)):
        model, optimizer = nnx_problem(tx)
        before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        step = make_train_step(config=CONFIG)
        metrics, _ = step(model, optimizer, empty)
        assert math.isnan(float(metrics["loss"]))
        after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        same = [np.array_equal(a, b) for a, b in zip(after, jax.tree.leaves(before), strict=True)]
        assert all(same) if kept else not any(same)
        if kept:
            metrics, _ = step(model, optimizer, batch())
            assert math.isfinite(float(metrics["loss"]))


def test_errors() -> None:
    model, optimizer = nnx_problem()
    with pytest.raises(
        TypeError, match=r"train_step takes \(nnx.Module, nnx.Optimizer, batch\), or .* got \(Mixer, dict\)"
    ):
        make_train_step()(model, batch())
    with pytest.raises(KeyError, match=r"a batch of pairs needs .* 'chosen_input_ids' is missing, got input_ids"):
        make_train_step()(model, optimizer, {"input_ids": 1})


def with_reference(model: Any, data: Any) -> dict[str, np.ndarray]:
    """The batch with the model's own summed log-probabilities for the reference's."""
    averages = pair_logps(lambda ids, _: model(ids), data)
    lengths = [(data[f"{side}_labels"] != -100).sum(-1) for side in ("chosen", "rejected")]
    return {**data, **{n: np.array(a * c) for n, a, c in zip(collate.REFERENCE, averages, lengths, strict=True)}}


def test_dpo_takes_its_own_gradient() -> None:
    model, optimizer = nnx_problem()
    plain, data = batch(), with_reference(model, batch())
    before = nnx.state(model, nnx.Param)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def half_margins(p: Any) -> Any:  # where the policy is the reference, -beta / 2 times the summed margins
        chosen, rejected = pair_logps(lambda ids, _: nnx.merge(graph, p, rest, copy=True)(ids), plain)
        chosen, rejected = (
            x * (plain[f"{side}_labels"] != -100).sum(-1) for x, side in ((chosen, "chosen"), (rejected, "rejected"))
        )
        return -0.25 * jnp.mean(chosen - rejected)

    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before, jax.grad(half_margins)(params))
    options = {"objective": "dpo", "objective_settings": {"beta": 0.5}}
    assert float(make_eval_step(**options)(model, data)["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    train_step = make_train_step(**options)
    metrics, result = train_step(model, optimizer, data)
    assert result is None
    assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert_close(nnx.state(model, nnx.Param), expected)
    with pytest.raises(ValueError, match=r"objective 'dpo' needs ref_chosen_logps and ref_rejected_logps"):
        train_step(model, optimizer, plain)
    with pytest.raises(ValueError, match=r"gamma is of objectives 'gapo' and 'simpo'; 'dpo' takes beta"):
        train_step(model, optimizer, data, gamma=0.1)
    with pytest.raises(ValueError, match="objective must be one of 'gapo', 'simpo'"):
        make_train_step(objective="orpo")
