"""LD-DPO's alpha and WPO's weights in Flax: value and gradient by hand in NNX, Linen and the loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import logp_by_hand as hand
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax_problem import nnx_problem

from gapo.adapters.flax import make_eval_step, make_loss, make_train_step, pair_logps
from gapo.data import collate_pairs
from gapo.pairs import REFERENCE

OPTIONS: dict[str, Any] = {"ld_alpha": hand.ALPHA, "use_weighting": True}
DPO: dict[str, Any] = {"objective": "dpo", "objective_settings": {"beta": hand.BETA}}


def problem(alpha: float | None = hand.ALPHA) -> dict[str, np.ndarray]:
    batch = collate_pairs(hand.rows(), pad_token_id=0)
    reference = dict(zip(REFERENCE, np.random.default_rng(5).uniform(-30, -10, (2, 4)).astype(np.float32), strict=True))
    mark = {} if alpha is None else {"ref_ld_alpha": np.full(4, alpha, np.float32)}
    return {**batch, **reference, **mark}


def by_hand(logits_of: Any, params: Any, batch: Any) -> tuple[float, Any]:
    """DPO's loss and gradient, the weights constants."""
    ids, labels = hand.stacked(batch)
    factors = hand.token_factors(labels, hand.ALPHA)
    weights = np.array(hand.wpo(logits_of(params, ids), labels))
    reference = batch[REFERENCE[0]] - batch[REFERENCE[1]]

    def loss(params: Any) -> Any:
        sums = (jax.nn.log_softmax(logits_of(params, ids)) * factors).sum((1, 2))
        return (weights * -jax.nn.log_sigmoid(hand.BETA * (sums[:4] - sums[4:] - reference))).mean()

    return jax.value_and_grad(loss)(params)


def close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-4, atol=2e-6)


def test_nnx_and_its_loss_and_evaluation_by_hand() -> None:
    model, optimizer = nnx_problem()
    batch = problem()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    value, grads = by_hand(lambda p, ids: nnx.merge(graph, p, rest, copy=True)(jnp.asarray(ids)), params, batch)
    loss = make_loss(**DPO, **OPTIONS)
    (found, _), found_grads = nnx.value_and_grad(loss, has_aux=True)(model, batch)
    assert float(found) == pytest.approx(float(value), rel=1e-4)
    close(found_grads, grads)
    assert float(loss(model, batch)[0]) == pytest.approx(float(value), rel=1e-4)  # not differentiated: an evaluation
    assert float(make_eval_step(**DPO, **OPTIONS)(model, batch)["loss"]) == pytest.approx(float(value), rel=1e-4)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    metrics, _ = make_train_step(**DPO, **OPTIONS)(model, optimizer, batch)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-4)
    close(nnx.state(model, nnx.Param), expected)


def test_linen_with_an_anchor_by_hand() -> None:
    """GAPO's pull at a margin is its weight of the gap, as the step measured it, times WPO's."""
    ids, labels = hand.stacked(problem())
    params = {
        "embed": jax.random.normal(jax.random.key(0), (96, 8)),
        "out": jax.random.normal(jax.random.key(1), (8, 96)),
    }
    logits = lambda p, ids, mask: jnp.tanh(p["embed"][ids]) @ p["out"]  # noqa: E731
    state = TrainState.create(apply_fn=logits, params=params, tx=optax.sgd(1.0))
    new, metrics, result = make_train_step(logits, **OPTIONS)(state, problem())
    weights = np.array(hand.wpo(logits(params, ids, None), labels))
    factors = hand.token_factors(labels, hand.ALPHA) / hand.lengths(labels)[:, None, None]
    pull = weights * 2.5 / (1 + np.exp(2.5 * np.asarray(result.anchor_gaps) - 0.25))
    np.testing.assert_allclose(result.weights, pull, rtol=1e-4)

    def loss(p: Any) -> Any:
        means = (jax.nn.log_softmax(logits(p, ids, None)) * factors).sum((1, 2))
        return -(pull * (means[:4] - means[4:])).mean()

    close(new.params, jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params)))
    gaps = np.asarray(result.anchor_gaps)
    assert float(metrics["loss"]) == pytest.approx(
        float(np.mean(weights * np.log1p(np.exp(0.25 - 2.5 * gaps)))), rel=1e-4
    )


def test_a_reference_of_another_alpha_is_refused() -> None:
    model, optimizer = nnx_problem()
    step = make_train_step(**DPO, ld_alpha=hand.ALPHA)
    for batch in (problem(None), problem(0.7)):
        with pytest.raises(ValueError, match=r"the policy is measured with ld_alpha=0.4, and the batch's reference"):
            step(model, optimizer, batch)
    with pytest.raises(ValueError, match="the policy is measured with ld_alpha=None"):
        make_eval_step(**DPO)(model, problem())
    with pytest.raises(ValueError, match="the policy is measured with ld_alpha=None"):
        pair_logps(lambda ids, mask: model(ids), problem())
    traced = nnx.jit(lambda model, batch: make_loss(**DPO, ld_alpha=hand.ALPHA)(model, batch)[0])
    assert np.isnan(float(traced(model, problem(0.7))))
    assert np.isfinite(float(traced(model, problem())))
    with pytest.raises(ValueError, match="use_weighting weights the loss of each pair, and objective 'aot_unpaired'"):
        make_train_step(objective="aot_unpaired", use_weighting=True)
