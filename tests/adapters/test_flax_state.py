"""What a Flax step takes over from the step before: donated memory, and an objective's running statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax_problem import VOCAB, batch, nnx_problem

import gapo
from gapo.adapters.flax import make_train_step, pair_logps

CONFIG = gapo.GAPOConfig(rho=0.3)
EQUAL = {"rtol": 1e-6, "atol": 1e-7}


def table_problem() -> Any:
    """A `TrainState` of one table of logits, (VOCAB, VOCAB): the next token by the last one."""
    params = {"table": 0.1 * jax.random.normal(jax.random.key(0), (VOCAB, VOCAB), jnp.float32)}
    return TrainState.create(apply_fn=lambda p, ids: p["params"]["table"][ids], params=params, tx=optax.adam(0.1))


def arrays_of(state: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]


def test_donated_memory_is_given_away_and_changes_no_more_than_rounding() -> None:
    """XLA fuses a program that may write over its inputs in another order."""
    runs = {}
    for donate in (False, True):
        model, optimizer = nnx_problem(optax.sgd(0.1, momentum=0.9), dropout=0.5)
        step = make_train_step(config=CONFIG, donate=donate)
        losses = []
        for seed in (1, 2):
            before = {name: arrays_of(nnx.state(part)) for name, part in (("model", model), ("optimizer", optimizer))}
            data = {name: jnp.asarray(x) for name, x in batch(seed).items()}
            losses.append(step(model, optimizer, data)[0]["loss"])
            for arrays in before.values():
                assert {x.is_deleted() for x in arrays} == {donate}
            assert not any(x.is_deleted() for x in data.values())
        keyless = nnx.state((model, optimizer), nnx.Not(nnx.RngState))
        runs[donate] = [*losses, *jax.tree.leaves(keyless)]
    for plain, donated in zip(runs[False], runs[True], strict=True):
        np.testing.assert_allclose(np.asarray(plain), np.asarray(donated), rtol=1e-5, atol=1e-7)


def test_a_linen_state_is_donated() -> None:
    plain, donated = table_problem(), table_problem()
    steps = [make_train_step(config=CONFIG, donate=donate) for donate in (False, True)]
    for seed in (1, 2):
        before = arrays_of((donated.params, donated.opt_state))
        (plain, expected, _), (donated, metrics, _) = (
            step(state, batch(seed)) for step, state in zip(steps, (plain, donated), strict=True)
        )
        assert all(x.is_deleted() for x in before)
        assert metrics["loss"] == expected["loss"]
    np.testing.assert_array_equal(plain.params["table"], donated.params["table"])


def test_a_step_that_is_refused_donates_nothing() -> None:
    model, optimizer = nnx_problem()
    step = make_train_step(objective="dpo", donate=True)
    with pytest.raises(ValueError, match="objective 'dpo' needs ref_chosen_logps"):
        step(model, optimizer, batch())
    assert not any(x.is_deleted() for x in arrays_of(nnx.state((model, optimizer))))


def shifted(logps: Any) -> Any:
    """(M - b)^2 / 2 with a running mean b of the margins, which starts at 0.5 and takes a quarter of each batch."""
    center = logps.running("center", logps.mean(logps.margins), initial=0.5, rate=0.25)
    return (logps.margins - center) ** 2 / 2


def by_hand(margins: Any, params: Any, center: float) -> tuple[float, float, Any]:
    """Loss, next center and next parameters of one step of gradient descent on `shifted`, rate 0.1."""
    m, rows = jax.jit(lambda p: (margins(p), jax.jacrev(margins)(p)))(params)
    m = np.asarray(m, np.float64)
    loss = float(np.mean((m - center) ** 2) / 2)
    moved = jax.tree.map(lambda p, r: p - 0.1 * np.tensordot((m - center) / len(m), np.asarray(r), 1), params, rows)
    return loss, 0.75 * center + 0.25 * float(m.mean()), moved


def test_running_statistics_in_nnx() -> None:
    model, optimizer = nnx_problem()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    step, center, running = make_train_step(objective=shifted), 0.5, None
    for seed in (1, 2):
        data = {name: jnp.asarray(x) for name, x in batch(seed).items()}

        def margins(p: Any, data: Any = data) -> Any:
            chosen, rejected = pair_logps(lambda ids, _: nnx.merge(graph, p, rest, copy=True)(ids), data)
            return chosen - rejected

        loss, center, params = by_hand(margins, params, center)
        metrics, result = step(model, optimizer, data, running=running)
        running = result.running
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(running["center"]) == pytest.approx(center, rel=1e-4)
        for a, b in zip(jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def test_running_statistics_in_linen() -> None:
    state = table_problem().replace(tx=optax.sgd(0.1), opt_state=optax.sgd(0.1).init({}))
    params, step, center, running = state.params, make_train_step(objective=shifted), 0.5, None
    for seed in (1, 2):
        data = {name: jnp.asarray(x) for name, x in batch(seed).items()}

        def margins(p: Any, data: Any = data) -> Any:
            chosen, rejected = pair_logps(lambda ids, _: p["table"][ids], data)
            return chosen - rejected

        loss, center, params = by_hand(margins, params, center)
        state, metrics, result = step(state, data, running=running)
        running = result.running
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(running["center"]) == pytest.approx(center, rel=1e-4)
        np.testing.assert_allclose(state.params["table"], params["table"], rtol=1e-5, atol=1e-6)


def test_running_statistics_that_would_start_anew_are_refused() -> None:
    step, state = make_train_step(objective=shifted), table_problem()
    with pytest.raises(
        ValueError, match=r"'shifted' has running statistics \(center\), .*pass running=None at the first"
    ):
        step(state, batch())
    with pytest.raises(ValueError, match=r"running holds mean, and objective 'shifted' keeps center: pass the last"):
        step(state, batch(), running={"mean": 1.0})
    with pytest.raises(ValueError, match=r"running holds mean, and objective 'simpo' keeps none"):
        make_train_step(objective="simpo")(state, batch(), running={"mean": 1.0})
    step(state, batch(), running=None)
    _, _, result = make_train_step(objective="simpo")(state, batch(), running=None)
    assert result.running is None


def test_an_anchor_in_the_batch_is_taken() -> None:
    """An anchor of the caller's own: each gap is the margin over it, and the step perturbs nothing."""
    state = table_problem()
    own = {"anchor_chosen_logps": np.full(4, -2.0, np.float32), "anchor_rejected_logps": np.full(4, -3.0, np.float32)}
    _, _, result = make_train_step()(state, {**batch(), **own})
    np.testing.assert_allclose(result.anchor_gaps, result.margins - 1, **EQUAL)
    assert result.radius is None
