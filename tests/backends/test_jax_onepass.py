"""The one pass on JAX, against two `jax.grad`s and a `jax.jvp` in float64, and where it must not be taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gapo
from gapo.backends import jax_onepass
from gapo.backends.jax import JaxForward
from gapo.backends.jaxrows.group_gradients import UNROLLED, _weighted_sum

VOCAB, WIDTH, TOKENS, PAIRS, LAYERS = 11, 6, 5, 3, 3
DRAWS = np.random.default_rng(0)
IDS = DRAWS.integers(0, VOCAB, (2 * PAIRS, TOKENS))
Params = dict[str, Any]


def draw(*shape: int) -> np.ndarray:
    return DRAWS.normal(size=shape) * 0.5


BASE = {"embed": draw(VOCAB, WIDTH), "w": draw(WIDTH, WIDTH), "b": draw(WIDTH), "scale": draw(WIDTH)}
BASE["head"] = draw(WIDTH, VOCAB)
STACKED = {"w": draw(LAYERS, WIDTH, WIDTH), "b": draw(LAYERS, WIDTH), "scale": draw(LAYERS, WIDTH)}
FROZEN = dict(BASE)


def some(*names: str, **more: Any) -> Params:
    return {name: BASE[name] for name in names} | more


def norm(x: Any) -> Any:
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def logps(logits: Any, ids: Any = IDS) -> Any:
    by_token = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(ids)[:, 1:, None], -1)
    return by_token[..., 0].mean(1)


def halves(x: Any) -> tuple[Any, Any]:
    return x[:PAIRS], x[PAIRS:]


def layer(x: Any, p: Params) -> Any:
    return x + jnp.tanh(norm(x) * p["scale"] @ p["w"] + p["b"])


def model(p: Params, ids: Any = IDS) -> Any:
    return layer(p["embed"][ids], p) @ p.get("head", p["embed"].T)


def dense(p: Params) -> Any:
    return halves(logps(model(p)))


def margins(p: Params) -> Any:
    chosen, rejected = dense(p)
    return chosen - rejected


def side_by_side(p: Params) -> Any:
    return tuple(logps(model(p, ids), ids) for ids in halves(IDS))


def by_vmap(p: Params) -> Any:
    return jax.vmap(lambda c, r: tuple(logps(model(p, x[None]), x[None])[0] for x in (c, r)))(
        *map(jnp.asarray, halves(IDS))
    )


def attention(p: Params) -> Any:
    x = p["embed"][IDS]
    heads = (x @ p["w"]).reshape(2 * PAIRS, TOKENS, 2, WIDTH // 2)
    shares = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", heads, heads), -1)
    return halves(logps((x + jnp.einsum("bhqk,bkhd->bqhd", shares, heads).reshape(x.shape)) @ p["head"]))


def scanned(p: Params, wrap: Callable[..., Any] = lambda fn: fn) -> Any:
    x, _ = jax.lax.scan(lambda x, q: (wrap(layer)(x, q), None), p["embed"][IDS], p["layers"])
    return halves(logps(x @ p["head"]))


def shared_by_steps(p: Params) -> Any:
    x, _ = jax.lax.scan(lambda x, _: (layer(x, p), None), p["embed"][IDS], None, length=3)
    return halves(logps(x @ p["head"]))


def recurrent(p: Params) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(h @ p["w"] + x + p["b"])
        return h, h

    _, states = jax.lax.scan(step, jnp.zeros((2 * PAIRS, WIDTH)), p["embed"][IDS].swapaxes(0, 1))
    return halves(logps(states.swapaxes(0, 1) @ p["head"]))


def lora(p: Params) -> Any:
    x = jnp.asarray(FROZEN["embed"])[IDS]
    return halves(logps(jnp.tanh(x @ FROZEN["w"] + x @ p["a"] @ p["b"]) @ FROZEN["head"]))


def merged_lora(p: Params) -> Any:
    return halves(logps(model({**FROZEN, "w": FROZEN["w"] + p["a"] @ p["b"]})))


def convolution(p: Params) -> Any:
    x = p["embed"][IDS].swapaxes(1, 2)
    x = jnp.tanh(jax.lax.conv_general_dilated(x, p["kernel"], (1,), "SAME").swapaxes(1, 2))
    return halves(logps(x @ p["head"]))


def mixture(p: Params) -> Any:
    x = p["embed"][IDS]
    experts = jnp.tanh(jnp.einsum("btd,edf->btef", x, p["experts"]))
    return halves(logps((x + jnp.einsum("btef,bte->btf", experts, jax.nn.softmax(x @ p["router"]))) @ p["head"]))


def merged_rows(p: Params) -> Any:
    return halves(logps(layer(p["embed"][IDS.reshape(-1)], p).reshape(2 * PAIRS, TOKENS, WIDTH) @ p["head"]))


def dropout(p: Params) -> Any:
    x = layer(p["embed"][IDS], p)
    return halves(logps(jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), x / 0.5, 0) @ p["head"]))


def one_hot(p: Params) -> Any:
    by_word = jax.nn.log_softmax(layer(jax.nn.one_hot(IDS, VOCAB) @ p["embed"], p) @ p["head"])
    return halves((by_word[:, :-1] * jax.nn.one_hot(IDS[:, 1:], VOCAB)).sum((1, 2)))


def pairs_own_weights(p: Params) -> Any:
    return (p["own"] * FROZEN["w"][:PAIRS]).sum(1) + (jnp.tanh(p["own"]) ** 2).sum(1)


def batch_norm(p: Params) -> Any:
    x = layer(p["embed"][IDS], p)
    return halves(logps(layer((x - x.mean((0, 1))) / x.std((0, 1)), p) @ p["head"]))


def attention_over_rows(p: Params) -> Any:
    x = layer(p["embed"][IDS], p)
    shares = jax.nn.softmax(jnp.einsum("btd,ctd->bc", x, x), -1)
    return halves(logps(layer(jnp.einsum("bc,ctd->btd", shares, x), p) @ p["head"]))


def contrast(p: Params) -> Any:
    m = margins(p)
    return m - jax.nn.logsumexp(m)


def clipped_derivative(p: Params) -> Any:
    """A derivative that is not linear in its cotangent: what comes back at 1 says nothing of other cotangents."""

    @jax.custom_vjp
    def same(x: Any) -> Any:
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))
    return halves(logps(layer(same(layer(p["embed"][IDS], p)), p) @ p["head"]))


def row_by_row(p: Params) -> Any:
    return halves(jax.lax.map(lambda ids: logps(model(p, ids[None]), ids[None])[0], jnp.asarray(IDS)))


WITH_HEAD = {"embed": BASE["embed"], "head": BASE["head"]}
ONE_PASS = {
    "dense": (dense, BASE),
    "tied": (dense, some("embed", "w", "b", "scale")),
    "margins": (margins, BASE),
    "side_by_side": (side_by_side, BASE),
    "vmap": (by_vmap, BASE),
    "attention": (attention, some("embed", "w", "head")),
    "scan": (scanned, WITH_HEAD | {"layers": STACKED}),
    "shared_by_steps": (shared_by_steps, BASE),
    "recurrent": (recurrent, some("embed", "w", "b", "head")),
    "remat": (jax.checkpoint(dense), BASE),
    "lora": (lora, {"a": draw(WIDTH, 2), "b": draw(2, WIDTH)}),
    "merged_lora": (merged_lora, {"a": draw(WIDTH, 2), "b": draw(2, WIDTH)}),
    "convolution": (convolution, WITH_HEAD | {"kernel": draw(WIDTH, WIDTH, 3)}),
    "mixture": (mixture, WITH_HEAD | {"experts": draw(4, WIDTH, WIDTH), "router": draw(WIDTH, 4)}),
    "merged_rows": (merged_rows, BASE),
    "dropout": (dropout, BASE),
    "one_hot": (one_hot, BASE),
    "pairs_own_weights": (pairs_own_weights, {"own": draw(PAIRS, WIDTH)}),
}
TWO_PULLS = {
    "batch_norm": (batch_norm, "reduce_sum sums over the groups"),
    "attention_over_rows": (attention_over_rows, "dot_general sums over the groups"),
    "contrast": (contrast, "reduce_sum sums over the groups"),
    "clipped_derivative": (clipped_derivative, "not among the operations"),
    "row_by_row": (row_by_row, "goes through the groups one by one"),
}


def taken(fn: Callable[..., Any], params: Params, by_side: bool, *, linear: bool = True) -> bool:
    """Whether a step takes one pass. Its gradients and derivatives along a direction are compared with autodiff's."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        direction = jax.tree.map(lambda x: jnp.asarray(draw(*x.shape)), params)
        weights = [jnp.asarray(draw(PAIRS)) for _ in range(2)]
        weights = weights if by_side else [weights[0], -weights[0]]

        def outputs(p: Params) -> tuple[Any, ...]:
            out = fn(p)
            return out if isinstance(out, tuple) else (out,)

        def margin(p: Params) -> Any:
            out = outputs(p)
            return out[0] - out[1] if len(out) == 2 else out[0]

        one_pass = []

        @jax.jit
        def both(p: Params, direction: Params) -> Any:
            forward = JaxForward(lambda p, _: fn(p), p, None, by_side=by_side)
            names = list(forward.parameters)
            forward.pullback([jnp.ones(PAIRS), -jnp.ones(PAIRS)][: len(forward.outputs)], names)
            one_pass.append(forward._by_pair is not None)
            rule = dict(zip(names, jax.tree.leaves(direction), strict=True))
            along = forward.directional(lambda name, _: rule[name], names) if linear else None
            expected = jax.grad(lambda p: sum(jnp.vdot(w, y) for w, y in zip(weights, outputs(p), strict=False)))(p)
            pushed = jax.jvp(margin, (p,), (direction,))[1] if linear else None
            return (forward.pack(forward.pullback(weights[: len(forward.outputs)])), along), (expected, pushed)

        ours, autodiffs = both(params, direction)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(autodiffs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        return one_pass[0]


@pytest.mark.parametrize("case", ONE_PASS)
def test_one_pass_is_autodiffs(case: str) -> None:
    assert taken(*ONE_PASS[case], by_side=True)


@pytest.mark.parametrize("case", ["dense", "side_by_side", "vmap", "scan"])
def test_one_pass_by_margin(case: str) -> None:
    assert taken(*ONE_PASS[case], by_side=False)


@pytest.mark.parametrize("case", TWO_PULLS)
def test_pairs_that_cannot_be_told_apart(case: str, caplog: pytest.LogCaptureFixture) -> None:
    jax_onepass._tell.cache_clear()
    fn, why = TWO_PULLS[case]
    with caplog.at_level(logging.WARNING, "gapo"):
        assert not taken(fn, BASE, by_side=True, linear=case != "clipped_derivative")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the one-pass step does not apply to this function (" in line
    assert why in line


def test_rematerialised_layers_keep_their_memory(caplog: pytest.LogCaptureFixture) -> None:
    jax_onepass._tell.cache_clear()
    with caplog.at_level(logging.WARNING, "gapo"):
        assert not taken(lambda p: scanned(p, jax.checkpoint), WITH_HEAD | {"layers": STACKED}, by_side=True)
    assert "times the memory, as where layers are rematerialised" in caplog.records[0].getMessage()


@pytest.mark.parametrize(("anchor", "bar"), [("exact", 1.45), ("first_order", 1.12)])
def test_flops_and_memory(anchor: str, bar: float) -> None:
    """Against one backward of the margins, which is what SimPO takes."""
    params = {"embed": draw(64, 32), "w": draw(32, 32), "b": draw(32), "scale": draw(32), "head": draw(32, 64)}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    ids = jnp.asarray(DRAWS.integers(0, 64, (4, 64)))

    def margin_fn(p: Params, ids: Any) -> Any:
        scores = logps(model(p, ids), ids)
        return scores[:2] - scores[2:]

    def cost(fn: Any) -> tuple[float, float]:
        compiled = jax.jit(fn).lower(params, ids).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(anchor=anchor), backend="jax")
    flops, memory = cost(step)
    plain_flops, plain_memory = cost(jax.grad(lambda p, ids: jax.nn.softplus(-margin_fn(p, ids)).mean()))
    assert flops / plain_flops < bar
    assert memory / plain_memory < 1.15


@pytest.mark.parametrize("groups", [1, 2, UNROLLED, UNROLLED + 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_sums_over_groups_in_float32_or_wider(groups: int, axis: int) -> None:
    shape = [4, 3]
    shape.insert(axis, groups)
    x, weights = DRAWS.integers(-8, 8, shape), DRAWS.integers(-(2**12), 2**12, groups)
    exact = np.zeros((4, 3))
    for i in range(groups):
        exact += weights[i] * x.take(i, axis)
    # bfloat16 holds x, but neither the weights nor partial sums.
    total = _weighted_sum(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weights, jnp.float32), axis)
    assert total.dtype == jnp.bfloat16
    np.testing.assert_array_equal(total, jnp.asarray(exact, jnp.bfloat16))
    np.testing.assert_array_equal(_weighted_sum(jnp.asarray(x, jnp.float32), jnp.asarray(weights), axis), exact)
