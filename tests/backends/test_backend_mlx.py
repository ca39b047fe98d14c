"""What only MLX has: lazy evaluation, mx.compile, bfloat16, LoRA over a quantised base, shared dropout masks."""

from __future__ import annotations

import logging
import sys
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx_models
import numpy as np
import pytest
from frameworks import LIBRARIES
from interrupts import interrupt_at
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_problem import BATCH, Mixer, margin_fn, mixer

import gapo
from gapo.adapters.mlx_lm import pair_logps
from gapo.backends.mlx import MlxForward, mlx_forward

MLX = LIBRARIES["mlx"]


def take_step(model: nn.Module, **options: Any) -> Any:
    return gapo.value_and_grad(margin_fn, gapo.GAPOConfig(**options), backend="mlx")(model, BATCH)


@pytest.mark.parametrize(("one_pass", "stages"), [(True, [2]), (False, [3, 1])])
def test_values_are_read_only_once_all_is_built(
    one_pass: bool, stages: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, order = mixer(), []
    evaluate = mx.eval

    def watched(x: mx.array) -> None:
        order.append("labels" if len(x.shape) == 2 else "model")
        evaluate(x)

    def forward(module: nn.Module, batch: Any) -> Any:
        order.append("forward")
        return margin_fn(module, batch)

    step = gapo.value_and_grad(forward, backend="mlx", one_pass=one_pass)
    step(model, BATCH)  # where its one pass is proved
    monkeypatch.setattr(mx, "eval", watched)
    order.clear()
    step(model, BATCH)
    # sequence_logps reads the labels, which are data. The step reads values behind clean, probe and anchor forward,
    # and behind that of the update.
    runs = [(what, len(list(times))) for what, times in groupby(what for what in order if what != "labels")]
    assert [what for what, _ in runs] == ["forward", "model"] * len(stages)
    assert [times for what, times in runs if what == "forward"] == stages


def test_bfloat16_weights() -> None:
    model = mixer()
    model.set_dtype(mx.bfloat16)
    with pytest.warns(RuntimeWarning, match="round the perturbation away"):
        result, grads = take_step(model, rho=0.02, anchor="exact")
    assert 0 < float(result.changed_fraction) < 0.5
    assert result.anchor_gaps.dtype == result.weights.dtype == mx.float32
    assert all(g.dtype == mx.bfloat16 for _, g in tree_flatten(grads))
    with pytest.raises(ValueError, match=r'changed none .* use anchor="first_order"'):
        take_step(model, rho=1e-6, anchor="exact")
    result, _ = take_step(model, rho=1e-6, anchor="first_order")
    assert float(mx.abs(result.anchor_gaps).max()) > 0


def test_lora_over_a_quantised_base() -> None:
    model = mixer()
    nn.quantize(model, group_size=64, bits=8, class_predicate=lambda path, m: isinstance(m, nn.Linear))
    model.freeze()
    model.up = LoRALinear.from_base(model.up, r=4, dropout=0.0)
    model.up.lora_b = 0.1 * mx.random.normal(model.up.lora_b.shape)
    result, grads = take_step(model, rho=0.3)
    assert sorted(name for name, _ in tree_flatten(grads)) == ["up.lora_a", "up.lora_b"]
    assert float(result.radius) == pytest.approx(0.3, rel=1e-4)
    assert float(mx.abs(result.anchor_gaps).max()) > 1e-4


def test_dropout_masks_are_shared() -> None:
    model = mixer(dropout=0.5).train()
    result, _ = take_step(model, rho=0.0)
    np.testing.assert_array_equal(np.array(result.anchor_gaps), 0)
    # The stream goes on as if the clean forward alone had drawn from it.
    mx.random.seed(3)
    margin_fn(model, BATCH)
    expected = mx.random.uniform()
    mx.random.seed(3)
    again, _ = take_step(model, rho=0.1)
    assert float(mx.random.uniform()) == float(expected)
    assert float(mx.abs(again.margins - take_step(model, rho=0.1)[0].margins).max()) > 1e-4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("one_pass", "forward"), [(True, 1), (True, 2), *((False, n) for n in (1, 2, 3, 4))])
def test_weights_come_back_after_an_exception(error: type[BaseException], one_pass: bool, forward: int) -> None:
    model = mixer()
    before = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    calls: list[int] = []

    def fails(module: nn.Module, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == forward:
            raise error("in a forward")
        return margin_fn(module, batch)

    step = gapo.value_and_grad(fails, gapo.GAPOConfig(rho=0.5), backend="mlx", one_pass=one_pass)
    calls.extend([0] * 9)  # the first step proves the one pass, and does not fail
    step(model, BATCH)
    calls.clear()
    with pytest.raises(error, match="in a forward"):
        step(model, BATCH)
    for name, x in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(np.array(x), before[name])


def test_ctrl_c_at_any_line_while_the_weights_are_the_anchors() -> None:
    model = mixer()
    before = {name: np.array(x) for name, x in tree_flatten(model.parameters())}
    codes = {MlxForward._run.__code__, nn.Module.update.__code__}
    for line in range(1, 500):
        sys.settrace(interrupt_at(line, codes))
        try:
            take_step(model, rho=0.5)
        except KeyboardInterrupt:
            continue
        finally:
            sys.settrace(None)
            for name, x in tree_flatten(model.parameters()):
                np.testing.assert_array_equal(np.array(x), before[name])
        break
    assert 30 < line < 499


def test_what_a_failing_forward_left_in_the_module_goes() -> None:
    """As mlx-lm's gradient checkpointing leaves arrays of its own there."""
    model = mixer()
    before = dict(tree_flatten(model.parameters()))

    def fails(module: Mixer, batch: Any) -> Any:
        module.up.weight = 2 * module.up.weight
        raise RuntimeError("in the forward")

    with pytest.raises(RuntimeError, match="in the forward"):
        gapo.value_and_grad(fails, backend="mlx")(model, BATCH)
    assert all(x is before[name] for name, x in tree_flatten(model.parameters()))


def test_params_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r'params must be an mlx.nn.Module for backend="mlx", got dict'):
        gapo.value_and_grad(margin_fn, backend="mlx")({}, BATCH)


@pytest.mark.usefixtures("mlx_compiles")
def test_compiled_equals_eager() -> None:
    """mx.compile for real; no value is read while it traces."""
    model = mixer()
    step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(rho=0.3), backend="mlx")
    traces = []

    def outputs() -> Any:
        result, grads = step(model, BATCH)
        return result.loss, result.anchor_gaps, result.weights, grads

    def counted() -> Any:
        traces.append(1)
        return outputs()

    mx.disable_compile()
    eager = tree_flatten(outputs())
    mx.eval([x for _, x in eager])
    mx.enable_compile()
    compiled = mx.compile(counted, inputs=model.state, outputs=model.state)
    for _ in range(2):
        found = tree_flatten(compiled())
        for (name, a), (_, b) in zip(eager, found, strict=True):
            np.testing.assert_allclose(np.array(b), np.array(a), rtol=1e-4, atol=1e-5, err_msg=name)
    assert traces == [1]


class Stateful(nn.Module):
    """Statistics of its own, a batch norm's, and a counter: all move in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(32, 8), nn.BatchNorm(8)
        self.lm_head = nn.Linear(8, 32)
        self.sums = [mx.zeros((8,))]
        self.freeze(keys=["sums"], recurse=False)
        self.calls = 0

    def __call__(self, ids: mx.array) -> mx.array:
        self.calls += 1
        x = mx.cumsum(self.embed(ids), axis=1)
        self.sums = [self.sums[0] + mx.sum(mx.stop_gradient(x), axis=(0, 1))]
        return self.lm_head(self.norm(x) + 0.01 * self.calls)


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_state_of_the_module_moves_once_in_a_step(anchor: str) -> None:
    mx.random.seed(0)
    once, model = Stateful().train(), Stateful().train()
    once.update(model.parameters())
    margin_fn(once, BATCH)
    result, _ = take_step(model, rho=0.0, anchor=anchor)
    np.testing.assert_array_equal(np.array(result.anchor_gaps), 0)
    assert (model.calls, once.calls) == (2, 2)
    state = dict(tree_flatten(model.parameters()))
    for name, x in tree_flatten(once.parameters()):
        np.testing.assert_array_equal(np.array(state[name]), np.array(x), err_msg=name)
    assert float(mx.abs(model.norm.running_mean).max()) > 0


@pytest.mark.filterwarnings("ignore:first_order_ratio")  # what is refused has no meaning
def test_a_forward_that_is_another_when_run_again_is_refused() -> None:
    model, rng = mixer(), np.random.default_rng(0)

    def noisy(module: nn.Module, batch: Any) -> Any:
        chosen, rejected = margin_fn(module, batch)
        return chosen * float(rng.uniform(0.5, 1.5)), rejected

    with pytest.raises(ValueError, match=r"the margins of pairs \[.*\] are others when .* run again"):
        gapo.value_and_grad(noisy, backend="mlx")(model, BATCH)


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_first_order_where_mlx_has_no_forward_derivative(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Against central differences of the margins along delta, which the exact anchor's two radii give."""
    mlx_forward._log_pair_by_pair.cache_clear()
    model, batch = mlx_models.make(kind), mlx_models.batch()
    options: dict[str, Any] = {"adaptive": False, "probe": "margin"}

    def gaps(rho: float, anchor: str) -> np.ndarray:
        config = gapo.GAPOConfig(rho=rho, anchor=anchor, **options)
        step = gapo.value_and_grad(pair_logps, config, backend="mlx", one_pass=False)
        return np.array(step(model, batch)[0].anchor_gaps)

    with caplog.at_level(logging.WARNING, logger="gapo"):
        found = gaps(0.02, "first_order")
        gaps(0.02, "first_order")
    assert [record.message.startswith("MLX cannot differentiate this model forward") for record in caplog.records] == [
        True
    ]
    # gap(rho) = a rho + b rho^2 + ...: twice the gap at half the radius, the quadratic term taken out.
    half, whole = gaps(0.01, "exact"), gaps(0.02, "exact")
    np.testing.assert_allclose(found, 4 * half - whole, rtol=2e-2, atol=2e-5)
    assert np.abs(found).min() > 1e-4


@mx.custom_function
def rounded(x: mx.array) -> mx.array:
    """Rounds; its backward lets the gradient straight through, and its forward derivative is 0."""
    return mx.round(8 * x) / 8


@rounded.vjp
def straight_through(primal: Any, cotangent: Any, output: Any) -> Any:
    return cotangent


class Rounded(Mixer):
    def __call__(self, ids: mx.array) -> mx.array:
        x = self.embed(ids)
        x = x + mx.cumsum(x, 1) / mx.arange(1, ids.shape[1] + 1)[None, :, None].astype(x.dtype)
        return self.lm_head(x + rounded(self.down(mx.tanh(self.up(x)))))


def test_first_order_follows_the_backward_where_the_two_derivatives_differ() -> None:
    """Against <grad M_i, delta> of MLX's own gradient, one pair after another."""
    mx.random.seed(0)
    model = Rounded()
    rho, names = 0.3, ["up.weight", "down.weight"]
    config = gapo.GAPOConfig(rho=rho, anchor="first_order", adaptive=False, probe="margin", perturb="^(up|down).weight")
    result, _ = gapo.value_and_grad(margin_fn, config, backend="mlx")(model, BATCH)

    def margin(i: int) -> dict[str, np.ndarray]:
        grads = nn.value_and_grad(model, lambda m: mx.subtract(*margin_fn(m, BATCH))[i])(model)[1]
        return {name: np.array(g, dtype=np.float64) for name, g in tree_flatten(grads) if name in names}

    each = [margin(i) for i in range(4)]
    mean = {name: sum(g[name] for g in each) / 4 for name in names}
    norm = np.sqrt(sum((g**2).sum() for g in mean.values()))
    expected = [rho * sum((g[name] * mean[name]).sum() for name in names) / norm for g in each]
    np.testing.assert_allclose(np.array(result.anchor_gaps), expected, rtol=1e-4, atol=1e-6)
