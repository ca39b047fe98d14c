"""LD-DPO's alpha and WPO's weights in MLX-LM: value and gradient by hand, compiled too; a reference refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import logp_by_hand as hand
import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

import gapo
from gapo.adapters.mlx_lm import make_loss, pair_logps
from gapo.adapters.mlx_pairs import as_arrays
from gapo.data import collate_pairs
from gapo.pairs import REFERENCE

OPTIONS: dict[str, Any] = {"ld_alpha": hand.ALPHA, "use_weighting": True}
DPO: dict[str, Any] = {"objective": "dpo", "objective_settings": {"beta": hand.BETA}}


def model() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(nn.Embedding(96, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 96)).train()


def problem(alpha: float | None = hand.ALPHA) -> dict[str, np.ndarray]:
    batch = collate_pairs(hand.rows(), pad_token_id=0)
    reference = dict(zip(REFERENCE, np.random.default_rng(5).uniform(-30, -10, (2, 4)).astype(np.float32), strict=True))
    mark = {} if alpha is None else {"ref_ld_alpha": np.full(4, alpha, np.float32)}
    return {**batch, **reference, **mark}


def gradient_by_hand(net: nn.Module, factors: np.ndarray, pull: Any, ids: np.ndarray) -> Any:
    """Of `mean(pull(chosen - rejected))`, (N,) differences of the factors' sums."""

    def loss(net: nn.Module) -> mx.array:
        logits = net(mx.array(ids))
        logs = logits - mx.logsumexp(logits, -1, keepdims=True)
        sums = (logs * mx.array(factors, dtype=mx.float32)).sum((1, 2))
        return mx.mean(pull(sums[:4] - sums[4:]))

    return nn.value_and_grad(net, loss)(net)


def close(found: Any, expected: Any) -> None:
    expected = dict(tree_flatten(expected))
    for name, x in tree_flatten(found):
        np.testing.assert_allclose(np.array(x), np.array(expected[name]), rtol=5e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_dpo_by_hand(compiled: bool) -> None:
    net, batch = model(), problem()
    ids, labels = hand.stacked(batch)
    weights = mx.array(hand.wpo(np.array(net(mx.array(ids))), labels))
    reference = mx.array(batch[REFERENCE[0]] - batch[REFERENCE[1]])
    factors = hand.token_factors(labels, hand.ALPHA)
    pull = lambda d: weights * mx.logaddexp(mx.array(0.0), -hand.BETA * (d - reference))  # noqa: E731
    value, grads = gradient_by_hand(net, factors, pull, ids)
    step = nn.value_and_grad(net, make_loss(**DPO, **OPTIONS))
    if compiled:
        step = partial(mx.compile(partial(step, net), inputs=net.state, outputs=net.state))
        (found, _), found_grads = step(*as_arrays(batch))
    else:
        (found, _), found_grads = step(net, *as_arrays(batch))
    assert float(found) == pytest.approx(float(value), rel=1e-4)
    close(found_grads, grads)
    net.eval()
    assert float(make_loss(**DPO, **OPTIONS)(net, *as_arrays(batch))[0]) == pytest.approx(float(value), rel=1e-4)


def test_with_an_anchor_by_hand() -> None:
    """GAPO's pull at a margin is its weight of the gap, as the step measured it, times WPO's."""
    net, results = model(), []
    ids, labels = hand.stacked(problem())
    weights = np.array(hand.wpo(np.array(net(mx.array(ids))), labels))
    loss = make_loss(gapo.GAPOConfig(rho=0.3), on_step=results.append, **OPTIONS)
    _, found = nn.value_and_grad(net, loss)(net, *as_arrays(problem()))
    pull = weights * 2.5 / (1 + np.exp(2.5 * np.array(results[0].anchor_gaps) - 0.25))
    np.testing.assert_allclose(np.array(results[0].weights), pull, rtol=1e-4)
    factors = hand.token_factors(labels, hand.ALPHA) / hand.lengths(labels)[:, None, None]
    close(found, gradient_by_hand(net, factors, lambda d: -mx.array(pull, dtype=mx.float32) * d, ids)[1])
    # The second step goes by what the first one proved of the model, and sees the weights of its own batch.
    _, again = nn.value_and_grad(net, loss)(net, *as_arrays(problem()))
    close(again, found)


def test_a_reference_of_another_alpha_is_refused() -> None:
    net = model()
    for batch, option in ((problem(None), hand.ALPHA), (problem(0.7), hand.ALPHA), (problem(), None)):
        for loss_of in (net.train, net.eval):
            loss_of()
            with pytest.raises(ValueError, match=f"the policy is measured with ld_alpha={option}, and the batch's"):
                make_loss(**DPO, ld_alpha=option)(net, *as_arrays(batch))
    for batch in (problem(), as_arrays(problem())):
        with pytest.raises(ValueError, match="the policy is measured with ld_alpha=None"):
            pair_logps(net, batch)
        pair_logps(net, batch, ld_alpha=hand.ALPHA)
    with pytest.raises(ValueError, match="use_weighting weights the loss of each pair, and objective 'dr_dpo'"):
        make_loss(objective="dr_dpo", use_weighting=True)
