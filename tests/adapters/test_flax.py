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
from flax_problem import VOCAB, WIDTH, Mixer, batch, nnx_problem
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gapo
from gapo.adapters.flax import make_eval_step, make_train_step, pair_logps
from gapo.data import collate
from gapo.metrics import reward_metrics, step_metrics
from gapo.pairs import REFERENCE

CONFIG = gapo.GAPOConfig(rho=0.3)


class LinenMixer(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        x = linen.Embed(VOCAB, WIDTH, name="embed")(ids)
        x = x + jnp.cumsum(x, 1) / jnp.arange(1, ids.shape[1] + 1)[None, :, None]
        hidden = jax.nn.tanh(linen.Dense(32, name="up")(x))
        return linen.Dense(VOCAB, name="lm_head")(x + linen.Dense(WIDTH, name="down")(hidden))


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


class Small(nnx.Module):
    """An embedding, a layer and a head, with whatever stands between."""

    def __init__(self, between: Any = None, lora: int = 0) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCAB, 8, rngs=rngs)
        self.up = nnx.LoRALinear(8, 8, lora_rank=lora, rngs=rngs) if lora else nnx.Linear(8, 8, rngs=rngs)
        self.between = between(rngs) if between else None
        self.lm_head = nnx.Linear(8, VOCAB, rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        x = self.embed(ids)
        x = x + jnp.tanh(self.up(x))
        return self.lm_head(x if self.between is None else self.between(x))


def same(a: Any, b: Any) -> list[str]:
    """Paths of the variables that are equal in two states."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return [jax.tree_util.keystr(path) for (path, x), y in pairs if np.array_equal(x, y)]


def test_the_optimizer_says_what_trains() -> None:
    model = Small(lora=2)
    model.up.lora.lora_b[...] = jax.random.normal(jax.random.key(1), (2, 8), jnp.float32)
    graph, lora, rest = nnx.split(nnx.clone(model), nnx.LoRAParam, ...)
    fn = lambda p, b: pair_logps(lambda ids, _: nnx.merge(graph, p, rest, copy=True)(ids), b)  # noqa: E731
    device = {name: jnp.asarray(x) for name, x in batch().items()}
    result, grads = jax.jit(gapo.value_and_grad(fn, CONFIG, backend="jax"))(lora, device)
    for wrt in (nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains("lora"))):
        trains = nnx.clone(model)
        optimizer = nnx.Optimizer(trains, optax.sgd(0.1), wrt=wrt)
        _, found = make_train_step(config=CONFIG)(trains, optimizer, batch())
        assert_close(found.anchor_gaps, result.anchor_gaps)
        assert_close(nnx.state(trains, nnx.LoRAParam), jax.tree.map(lambda p, g: p - 0.1 * g, lora, grads))
        assert len(same(nnx.state(model), nnx.state(trains))) == len(jax.tree.leaves(nnx.state(model))) - 2


def test_a_filter_against_the_optimizers_is_refused() -> None:
    model = Small(lora=2)
    for asked, held, counts in ((nnx.Param, nnx.LoRAParam, (7, 2)), (nnx.LoRAParam, nnx.Param, (2, 7))):
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=held)
        message = (
            rf"asks for {counts[0]} variables, and the optimizer, made with wrt=.*holds {counts[1]}: leave wrt out"
        )
        with pytest.raises(ValueError, match=message):
            make_train_step(config=CONFIG, wrt=asked)(model, optimizer, batch())


def frozen_but_for_up(tree: Any) -> Any:
    labels = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "trains" if "up" in jax.tree_util.keystr(path) else "frozen", tree
    )
    return optax.multi_transform({"trains": optax.adam(0.1), "frozen": optax.set_to_zero()}, labels)


def test_what_the_optimizer_freezes_is_not_perturbed() -> None:
    """The step of the rest alone, its parameters the only ones that there are."""
    module = LinenMixer()
    params = module.init(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    device = {name: jnp.asarray(x) for name, x in batch().items()}
    fn = lambda p, b: pair_logps(lambda ids, _: module.apply({"params": {**params, **p}}, ids), b)  # noqa: E731
    result, _ = jax.jit(gapo.value_and_grad(fn, CONFIG, backend="jax"))({"up": params["up"]}, device)
    tx = frozen_but_for_up(params)
    for every, unmoved in ((tx, 5), (optax.MultiSteps(tx, 2).gradient_transformation(), 7)):
        state = TrainState.create(apply_fn=module.apply, params=params, tx=every)
        new, _, found = make_train_step(config=CONFIG)(state, batch())
        assert_close(found.anchor_gaps, result.anchor_gaps)
        assert float(found.rho) == float(np.float32(0.3))
        assert float(found.radius) == pytest.approx(0.3, rel=1e-4)
        assert len(same(params, new.params)) == unmoved


def test_the_same_in_nnx() -> None:
    model = Small()
    optimizer = nnx.Optimizer(model, frozen_but_for_up(None), wrt=nnx.Param)
    graph, up, rest = nnx.split(model, nnx.PathContains("up"), ...)
    fn = lambda p, b: pair_logps(lambda ids, _: nnx.merge(graph, p, rest, copy=True)(ids), b)  # noqa: E731
    device = {name: jnp.asarray(x) for name, x in batch().items()}
    result, _ = jax.jit(gapo.value_and_grad(fn, CONFIG, backend="jax"))(up, device)
    assert_close(make_train_step(config=CONFIG)(model, optimizer, batch())[1].anchor_gaps, result.anchor_gaps)


def test_a_model_and_optimizer_in_one() -> None:
    step = make_train_step(objective="simpo")
    single = Small()
    step(single, nnx.Optimizer(single, optax.sgd(0.1), wrt=nnx.Param), batch())
    for with_model in (True, False):
        model = Small()
        both = nnx.ModelAndOptimizer(model, optax.sgd(0.1))
        step(*([model] if with_model else []), both, batch())
        assert_close(nnx.state(model), nnx.state(single))
    with pytest.raises(ValueError, match="holds another model than the one given"):
        step(single, both, batch())


class LinenDropout(linen.Module):
    """A causal model whose dropout is on but for `deterministic`."""

    @linen.compact
    def __call__(self, ids: Any, deterministic: bool = False) -> Any:
        x = linen.Embed(VOCAB, 8)(ids)
        x = linen.Dropout(0.5, deterministic=deterministic)(jnp.tanh(linen.Dense(8)(x)))
        return linen.Dense(VOCAB, name="lm_head")(x)


def test_linen_draws_dropout_from_the_rng() -> None:
    module = LinenDropout()
    params = module.init(jax.random.key(0), jnp.zeros((1, 2), int), deterministic=True)["params"]
    state = TrainState.create(apply_fn=module.apply, params=params, tx=optax.sgd(0.1))
    config = gapo.GAPOConfig(rho=0.0)
    by_hand = lambda p, ids, _, rngs: module.apply({"params": p}, ids, rngs=rngs)  # noqa: E731
    step, given = make_train_step(config=config), make_train_step(by_hand, config, objective="simpo")
    keys = jax.random.split(jax.random.key(7), 2)
    one, two, again = (step(state, batch(), rng=key)[1:] for key in (*keys, keys[0]))
    np.testing.assert_array_equal(one[1].anchor_gaps, 0)  # one mask for both forwards
    np.testing.assert_array_equal(one[1].margins, again[1].margins)
    assert float(jnp.abs(one[1].margins - two[1].margins).max()) > 1e-3
    _, other, _ = given(state, batch(), rng=keys[0])
    assert float(other["rewards/margins"]) == pytest.approx(float(one[0]["rewards/margins"]), rel=1e-5)
    with pytest.raises(ValueError, match=r"was given no key: call train_step\(state, batch, rng=key\), with a new key"):
        step(state, batch())
    with pytest.raises(
        ValueError, match=r"was given no key: give make_eval_step a logits_fn that .* deterministic=True"
    ):
        make_eval_step()(state, batch())
    deaf = make_train_step(lambda p, ids, _: module.apply({"params": p}, ids, deterministic=True))
    with pytest.raises(ValueError, match=r"nothing takes the rng: dropout needs a logits_fn\(.*, rngs\)"):
        deaf(state, batch(), rng=keys[0])


def test_evaluation_is_deterministic_and_leaves_the_mode() -> None:
    model = Small(lambda rngs: nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)))
    before = jax.tree.map(lambda x: x, nnx.state(model))
    eval_step = make_eval_step(config=CONFIG)
    first, second = (float(eval_step(model, batch())["loss"]) for _ in range(2))
    assert not model.between.layers[0].deterministic
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model)), strict=True):
        assert (a == b).all()
    model.eval()
    device = {name: jnp.asarray(x) for name, x in batch().items()}
    chosen, rejected = pair_logps(lambda ids, _: model(ids), device)
    expected = jnp.mean(jax.nn.softplus(CONFIG.gamma - CONFIG.beta * (chosen - rejected)))
    assert first == second == pytest.approx(float(expected), rel=1e-5)


def test_statistics_of_a_batch_are_refused() -> None:
    model = Small(lambda rngs: nnx.BatchNorm(8, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    step = make_train_step(objective="simpo")
    with pytest.raises(
        ValueError, match=r"batch normalisation in training mode mixes the pairs.*use_running_average=True"
    ):
        step(model, optimizer, batch())
    model.set_attributes(use_running_average=True)
    assert math.isfinite(float(step(model, optimizer, batch())[0]["loss"]))


def test_padding_that_the_default_call_would_not_see_is_refused() -> None:
    model = Small()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    left = token_pairs.arrays(4, side="left")
    message = r"chosen_attention_mask has padding before a token, .*padding_side='right'\), or give a logits_fn"
    for data in (left, {name: jnp.asarray(x) for name, x in left.items()}):
        with pytest.raises(ValueError, match=message):
            make_train_step()(model, optimizer, data)
        with pytest.raises(ValueError, match=message):
            make_eval_step()(model, data)
    mixed = {name: np.concatenate([left[name][:1], batch()[name][1:]]) for name in left}
    graph, state = nnx.split(model)
    loss, found = jax.jit(lambda s, b: [make_eval_step()(nnx.merge(graph, s), x)["loss"] for x in b])(
        state, [mixed, batch()]
    )
    assert math.isnan(float(loss))
    assert math.isfinite(float(found))
    masked = make_eval_step(lambda model, ids, mask: model(ids * mask))(model, left)  # each token sees itself alone
    assert float(masked["loss"]) == pytest.approx(float(make_eval_step()(model, batch())["loss"]), rel=1e-5)


def test_a_model_that_returns_no_logits() -> None:
    model = Small()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    message = r"must return logits \(batch, seq, vocab\), got tuple: give a logits_fn"
    with pytest.raises(TypeError, match=message):
        make_train_step(lambda model, ids, _: (model(ids), None))(model, optimizer, batch())


def test_shapes_that_do_not_fit() -> None:
    model = Small()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for change in ({"rejected_labels": batch()["rejected_labels"][:, 1:]}, {n: x[0] for n, x in batch().items()}):
        with pytest.raises(ValueError, match=r"the columns of a batch of pairs must be \(N, seq\), of one shape; got"):
            make_train_step()(model, optimizer, {**batch(), **change})
    with pytest.raises(ValueError, match=r"ref_chosen_logps must be \(N,\) = \(4,\), got \(4, 1\)"):
        make_eval_step()(model, {**batch(), "ref_chosen_logps": np.zeros((4, 1))})


def test_batches_of_many_lengths_compile_once_or_twice() -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, VOCAB, n).tolist() for n in (5, 9, 12, 17, 21, 26, 30, 37, 6, 8, 11, 31)]
    rows = [{f"{side}_input_ids": x, f"{side}_labels": [-100, *x[1:]]} for x in ids for side in ("chosen",)]
    rows = [{**row, **{n.replace("chosen", "rejected"): x[::-1] for n, x in row.items()}} for row in rows]
    seen = set()

    def logits(model: Any, ids: Any, _: Any) -> Any:
        seen.add(ids.shape)
        return model(ids)

    model = Small()
    eval_step = make_eval_step(logits)
    losses = [float(eval_step(model, b)["loss"]) for b in collate.batches(rows, 1, pad_token_id=0)]
    assert len(losses) == 12
    assert seen == {(2, 32), (2, 37)}
    alone = [float(make_eval_step()(model, b)["loss"]) for b in collate.batches(rows[:2], 1, pad_token_id=3)]
    assert set(np.round(alone, 5)) <= set(np.round(losses, 5))  # the padding tells nothing


def with_reference(model: Any, data: Any) -> dict[str, np.ndarray]:
    """The batch with the model's own summed log-probabilities for the reference's."""
    averages = pair_logps(lambda ids, _: model(ids), data)
    lengths = [(data[f"{side}_labels"] != -100).sum(-1) for side in ("chosen", "rejected")]
    return {**data, **{n: np.array(a * c) for n, a, c in zip(REFERENCE, averages, lengths, strict=True)}}


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
    assert result.anchor_gaps is None
    np.testing.assert_allclose(metrics["gapo/weight_mean"], np.mean(result.weights), rtol=1e-6)
    np.testing.assert_allclose(result.log_ratio_margins, 0, atol=1e-5)
    assert float(metrics["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert_close(nnx.state(model, nnx.Param), expected)
    with pytest.raises(ValueError, match=r"objective 'dpo' needs ref_chosen_logps and ref_rejected_logps"):
        train_step(model, optimizer, plain)
    with pytest.raises(ValueError, match=r"gamma is of objectives 'gapo' and 'simpo'.*; 'dpo' takes beta"):
        train_step(model, optimizer, data, gamma=0.1)
    with pytest.raises(ValueError, match="objective must be one of 'gapo', 'simpo'"):
        make_train_step(objective="orpo")


def steep(logps: gapo.objectives.LogProbs) -> Any:
    """A user's own objective: the margin's cube, and the anchor's where there is one."""
    return -(logps.margins**3) if not logps.has("anchor") else -(logps.anchor_gaps**3)


@pytest.mark.parametrize("anchored", [False, True])
def test_an_objective_of_ones_own(anchored: bool) -> None:
    """Against `jax.grad` of the formula; with an anchor, of each pair's margin at the gap that the step measured."""
    own = gapo.objectives.Objective(name="steep", function=steep, needs_anchor=anchored)
    model, optimizer = nnx_problem()
    graph, params, rest = nnx.split(nnx.clone(model), nnx.Param, ...)
    config = gapo.GAPOConfig(rho=0.3, sft_weight=0.5)
    metrics, result = make_train_step(config=config, objective=own if anchored else steep)(model, optimizer, batch())
    assert (result.anchor_gaps is not None, "gapo/radius" in metrics) == (anchored, anchored)
    anchor_margins = result.anchor_margins if anchored else 0.0

    def loss(p: Any) -> Any:
        chosen, rejected = pair_logps(lambda ids, _: nnx.merge(graph, p, rest, copy=True)(ids), batch())
        return jnp.mean(-((chosen - rejected - anchor_margins) ** 3) - 0.5 * chosen)

    value, grads = jax.value_and_grad(loss)(params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert_close(nnx.state(model, nnx.Param), jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    evaluated = float(make_eval_step(config=config, objective=own if anchored else steep)(Small(), batch())["loss"])
    chosen, rejected = pair_logps(lambda ids, _: Small()(ids), batch())
    margins = chosen - rejected
    probe = jax.nn.softplus(config.gamma - config.beta * margins) if anchored else -(margins**3)
    assert evaluated == pytest.approx(float(probe.mean()), rel=1e-5)


def test_one_target_for_all_pairs_is_one_for_each() -> None:
    states = []
    for gamma in (0.7, np.full(4, 0.7, np.float32)):
        model, optimizer = nnx_problem()
        make_train_step(objective="simpo")(model, optimizer, batch(), gamma=gamma)
        states.append(nnx.state(model, nnx.Param))
    assert_close(*states)
    with pytest.raises(ValueError, match="gamma must be a finite number, got nan"):
        make_train_step()(model, optimizer, batch(), gamma=float("nan"))


def test_target_gap_finds_the_radius_that_spreads_the_gaps_so() -> None:
    (model, optimizer), (other, other_optimizer) = nnx_problem(), nnx_problem()
    config = gapo.GAPOConfig(target_gap=0.3, anchor="first_order")
    metrics, result = make_train_step(config=config)(model, optimizer, batch())
    assert np.std(np.asarray(result.anchor_gaps)) == pytest.approx(0.3, rel=1e-4)
    assert float(metrics["gapo/anchor_gap_std"]) == pytest.approx(0.3, rel=1e-4)
    # The same radius, set by hand, leads to the same weights.
    by_hand = gapo.GAPOConfig(rho=float(metrics["gapo/rho"]), anchor="first_order")
    make_train_step(config=by_hand)(other, other_optimizer, batch())
    assert_close(nnx.state(model, nnx.Param), nnx.state(other, nnx.Param))
