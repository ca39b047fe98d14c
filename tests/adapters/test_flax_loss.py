"""`make_loss` in the steps of trainers that own theirs: the gradient is that of `make_train_step`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from flax_problem import VOCAB, Mixer, batch, nnx_problem
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import gapo
from gapo.adapters.flax import make_eval_step, make_loss, make_train_step

CONFIG = gapo.GAPOConfig(rho=0.3)


def model_of(**options: Any) -> Any:
    """The problem's model; the second factor of a LoRA is not 0, so that both train."""
    model = Mixer(nnx.Rngs(0), **options)
    if options.get("lora"):
        model.up.lora.lora_b[...] = jax.random.normal(jax.random.key(1), model.up.lora.lora_b.shape, jnp.float32)
    return model


def device(**options: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in batch(**options).items()}


def equal(found: Any, expected: Any, tol: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


class LoraTrainer:
    """A trainer in the shape of Tunix's `PeftTrainer`: its own jitted steps over a loss of keyword arguments."""

    def __init__(self, model: Any, tx: Any, wrt: Any) -> None:
        self.model, self.lora = model, wrt is nnx.LoRAParam
        self.optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    def with_loss_fn(self, loss_fn: Any, has_aux: bool = False) -> LoraTrainer:
        @nnx.jit
        def train_step(model: Any, optimizer: Any, example: Any) -> Any:
            argnums = nnx.DiffState(0, nnx.LoRAParam) if self.lora else 0
            out, grads = nnx.value_and_grad(loss_fn, argnums=argnums, has_aux=has_aux)(model, batch=example)
            optimizer.update(model, grads)
            return out

        self.train = lambda example: train_step(self.model, self.optimizer, example)
        eval_step = nnx.jit(lambda model, example: loss_fn(model, batch=example))
        self.evaluate = lambda example: eval_step(self.model, example)
        return self


@pytest.mark.parametrize(
    ("wrt", "options"),
    [(nnx.Param, {}), (nnx.LoRAParam, {"lora": 2}), (nnx.Param, {"dropout": 0.5})],
    ids=["all", "lora", "dropout"],
)
def test_a_trainer_that_owns_its_step_takes_gapos(wrt: Any, options: dict[str, Any]) -> None:
    """Two steps: equal weights, equal metrics, and the random state goes on in the same way."""
    update = optax.sgd(0.1, momentum=0.9)  # Adam would make a step of the rounding in a gradient near 0
    trainer = LoraTrainer(model_of(**options), update, wrt).with_loss_fn(make_loss(config=CONFIG), True)
    model = model_of(**options)
    optimizer = nnx.Optimizer(model, update, wrt=wrt)
    step = make_train_step(config=CONFIG)
    for seed in (1, 2):
        loss, metrics = trainer.train(batch(seed))
        expected, _ = step(model, optimizer, batch(seed))
        assert metrics.keys() == expected.keys()
        equal((loss, metrics), (expected["loss"], expected), 1e-5)
        equal(nnx.state(trainer.model), nnx.state(model), 1e-5)
    assert float(metrics["gapo/radius"]) == pytest.approx(0.3, rel=1e-4)


def test_without_differentiation_it_evaluates() -> None:
    """In training and in evaluation a trainer calls one function; only the first takes an anchor."""
    trainer = LoraTrainer(model_of(), optax.sgd(0.1), nnx.Param).with_loss_fn(make_loss(config=CONFIG), has_aux=True)
    loss, metrics = trainer.evaluate(batch())
    for name, value in make_eval_step(config=CONFIG)(trainer.model, batch()).items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6)
    assert loss == metrics["loss"]
    absent = {name for name, value in metrics.items() if np.isnan(value)}
    assert absent == {name for name in metrics if name.startswith("gapo/")}
    assert "gapo/radius" in absent


def test_a_trainer_of_states_and_minibatches() -> None:
    """EasyDeL's shape: `jax.value_and_grad` over the graph's state, summed in a scan over minibatches."""
    graph, params, rest = nnx.split(model_of(), nnx.Param, ...)
    loss = make_loss(config=CONFIG)

    def calculate_loss(tree: Any, minibatch: Any) -> Any:
        return loss(nnx.merge(graph, tree, rest), minibatch)

    @jax.jit
    def training_step(params: Any, examples: Any) -> Any:
        grad_fn = jax.value_and_grad(calculate_loss, has_aux=True)

        def body(total: Any, minibatch: Any) -> Any:
            (_, metrics), grads = grad_fn(params, minibatch)
            return jax.tree.map(jnp.add, total, grads), metrics

        halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), examples)
        total, metrics = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), halves)
        return jax.tree.map(lambda g: g / 2, total), metrics

    grads, metrics = training_step(params, device())
    model, optimizer = nnx_problem(optax.MultiSteps(optax.sgd(1.0), 2))
    step = make_train_step(config=CONFIG)
    for i, half in enumerate(({n: x[:2] for n, x in batch().items()}, {n: x[2:] for n, x in batch().items()})):
        expected, _ = step(model, optimizer, half)
        assert float(metrics["gapo/weight_min"][i]) == pytest.approx(float(expected["gapo/weight_min"]), rel=1e-5)
    equal(jax.tree.map(lambda p, g: p - g, params, grads), nnx.state(model, nnx.Param), 1e-5)


class LinenDropout(linen.Module):
    """A causal model of two layers with dropout."""

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        x = linen.Embed(VOCAB, 8, name="embed")(ids)
        x = linen.Dropout(0.5, deterministic=False)(jnp.tanh(linen.Dense(8, name="up")(x)))
        return linen.Dense(VOCAB, name="lm_head")(x)


def linen_problem(tx: Any) -> tuple[Any, Any]:
    module = LinenDropout()
    params = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, jnp.zeros((1, 2), int))["params"]
    logits = lambda params, ids, _, rngs: module.apply({"params": params}, ids, rngs=rngs)  # noqa: E731
    return logits, TrainState.create(apply_fn=module.apply, params=params, tx=tx)


def up_alone(path: Any, _: Any) -> bool:
    return "up" in path


@pytest.mark.parametrize("frozen", [False, True])
def test_linen(frozen: bool) -> None:
    labels = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "trains" if "up" in jax.tree_util.keystr(path) else "frozen", tree
    )
    parts = optax.multi_transform({"trains": optax.sgd(0.1), "frozen": optax.set_to_zero()}, labels)
    logits, state = linen_problem(parts if frozen else optax.sgd(0.1))
    expected, metrics, _ = make_train_step(logits, CONFIG)(state, batch(), rng=jax.random.key(3))
    loss = make_loss(logits, CONFIG, wrt=up_alone if frozen else None)
    grad_fn = jax.value_and_grad(lambda p, b, k: loss(p, b, rng=k), has_aux=True)
    (value, found), grads = jax.jit(grad_fn)(state.params, device(), jax.random.key(3))
    equal(state.apply_gradients(grads=grads).params, expected.params)
    equal((value, found), (metrics["loss"], metrics))
    assert all((not g.any()) == (frozen and "up" not in jax.tree_util.keystr(path))
               for path, g in jax.tree_util.tree_leaves_with_path(grads))  # fmt: skip


def test_what_is_outside_of_jit_and_scaled() -> None:
    """Eagerly, through a `jit` inside of the derivative, and for a scaled loss: always the step's gradient."""
    logits, state = linen_problem(optax.sgd(1.0))
    loss = make_loss(lambda p, ids, mask: logits(p, ids, mask, {"dropout": jax.random.key(5)}), CONFIG)
    grads = jax.grad(loss, has_aux=True)(state.params, device())[0]
    inner = jax.jit(loss)
    equal(jax.grad(lambda p: 3 * inner(p, device())[0])(state.params), jax.tree.map(lambda g: 3 * g, grads), 1e-5)
    assert max(float(abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-3
    aux_alone = jax.grad(lambda p: inner(p, device())[1]["rewards/margins"])(state.params)
    assert not any(g.any() for g in jax.tree.leaves(aux_alone))


def test_the_members_of_an_axis_share_the_anchor() -> None:
    """In `shard_map` loss and gradient are those of the whole batch."""
    graph, params, rest = nnx.split(model_of(), nnx.Param, ...)

    def grad_of(loss: Any) -> Any:
        return jax.value_and_grad(lambda p, b: loss(nnx.merge(graph, p, rest, copy=True), b)[0])

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharded = jax.shard_map(
        grad_of(make_loss(config=CONFIG, axis_name="data")), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    equal(
        jax.jit(sharded)(params, device(pairs=8)),
        jax.jit(grad_of(make_loss(config=CONFIG)))(params, device(pairs=8)),
        2e-5,
    )


def test_errors() -> None:
    model = model_of(lora=2)
    lora = nnx.DiffState(0, nnx.LoRAParam)
    message = r"make_loss\(wrt=.*Param.*\) selects 7 parameters that the trainer does not differentiate, such as down"
    with pytest.raises(ValueError, match=message):
        nnx.grad(make_loss(wrt=nnx.Param), argnums=lora, has_aux=True)(model, device())
    with pytest.raises(ValueError, match=r"selects none of the 2 differentiated parameters"):
        nnx.grad(make_loss(wrt=nnx.BatchStat), argnums=lora, has_aux=True)(model, device())
    with pytest.raises(
        TypeError, match=r"without a logits_fn the model must be an nnx.Module, got dict: give make_loss a"
    ):
        make_loss()({"w": 1.0}, batch())
    logits, state = linen_problem(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"was given no key: call loss\(params, batch, rng=key\), with a new key"):
        make_loss(lambda p, ids, mask: logits(p, ids, mask, {}))(state.params, device())

    def remembers(logps: Any) -> Any:
        return logps.margins * logps.running("mean", logps.mean(logps.margins), initial=1.0, rate=0.5)

    with pytest.raises(ValueError, match=r"'remembers' has running statistics \(mean\), .*use .*make_train_step"):
        nnx.grad(make_loss(objective=remembers), has_aux=True)(model_of(), device())
