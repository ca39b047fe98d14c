"""What only JAX has: jit without recompilation, flops, a mesh, checkpointed models, bfloat16, donated buffers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import LIBRARIES
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_problem import margin_fn, problem, step

import gapo

JAX = LIBRARIES["jax"]


def assert_close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_jit_equals_eager_and_compiles_once(anchor: str) -> None:
    params, batch = problem("float64")
    taken = step(gapo.GAPOConfig(rho=0.3, anchor=anchor))
    traces = []

    @jax.jit
    def jitted(params: Any, batch: Any, gamma: Any) -> Any:
        traces.append(1)
        return taken(params, batch, gamma=gamma)

    expected = taken(params, batch, gamma=jnp.full(8, 0.25))
    assert_close(jitted(params, batch, jnp.full(8, 0.25)), expected, 1e-9)
    for shift in (0.1, 0.2):
        result, grads = jitted(jax.tree.map(lambda x: x + shift, params), batch, jnp.full(8, shift))  # noqa: B023
    assert traces == [1]
    assert isinstance(result, gapo.StepResult)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def flops(fn: Any, *args: Any) -> float:
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


@pytest.mark.parametrize(("anchor", "forwards"), [("exact", 4), ("first_order", 3)])
def test_no_third_forward(anchor: str, forwards: int) -> None:
    """In forwards: the clean one and one pullback are 1 + 2, the anchor's forward 1. The gaps are sums of those."""
    params, batch = problem()
    params = {name: jnp.concatenate([x] * 4, 0) if "embed" in name else x for name, x in params.items()}
    taken = step(gapo.GAPOConfig(anchor=anchor))

    def with_a_third(params: Any, batch: Any) -> Any:
        return margin_fn(jax.lax.optimization_barrier(params), batch), taken(params, batch)

    one = flops(margin_fn, params, batch)
    assert flops(taken, params, batch) / one < forwards + 0.7
    assert flops(with_a_third, params, batch) / one > forwards + 0.7


@pytest.mark.parametrize("shape", [(4, 2), *(pytest.param(one, marks=pytest.mark.slow) for one in ((8, 1), (1, 8)))])
def test_a_mesh_equals_one_device(shape: tuple[int, int]) -> None:
    params, batch = problem()
    expected = jax.jit(step())(params, batch)
    devices = np.array(jax.devices())
    assert len(devices) == 8
    mesh = Mesh(devices.reshape(shape), ("data", "model"))
    rows = NamedSharding(mesh, P("data"))
    columns = {name: NamedSharding(mesh, P(None, "model") if x.ndim == 2 else P()) for name, x in params.items()}
    placed = {name: jax.device_put(x, columns[name]) for name, x in params.items()}
    result, grads = jax.jit(step(), out_shardings=(None, columns))(placed, jax.device_put(batch, rows))
    assert_close((result, grads), expected, 2e-5)
    assert all(grads[name].sharding.is_equivalent_to(columns[name], x.ndim) for name, x in params.items())


def test_members_of_an_axis_share_one_anchor() -> None:
    params, batch = problem("float64")
    expected, grads = step()(params, batch)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    taken = step(axis_name="data")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P(), P()))
    def sharded(params: Any, batch: Any) -> Any:
        result, grads = taken(params, batch)
        return result.anchor_gaps, result.radius, jax.lax.pmean(grads, "data")

    gaps, radius, mean = sharded(params, batch)
    assert_close(gaps, expected.anchor_gaps, 1e-9)
    assert_close(mean, grads, 1e-9)
    assert float(radius) == pytest.approx(0.3)


def test_checkpointed_models() -> None:
    params, batch = problem("float64")
    for anchor in ("exact", "first_order"):
        config = gapo.GAPOConfig(rho=0.3, anchor=anchor)
        found = jax.jit(step(config, jax.checkpoint(margin_fn)))(params, batch)
        assert_close(found, step(config)(params, batch), 1e-9)


def test_bfloat16_weights_have_a_float32_delta() -> None:
    params, batch = problem("bfloat16")
    with pytest.warns(RuntimeWarning, match="round the perturbation away"):
        result, grads = step(gapo.GAPOConfig(rho=0.02, anchor="exact"))(params, batch)
    assert 0 < float(result.changed_fraction) < 0.5
    assert result.anchor_gaps.dtype == result.weights.dtype == jnp.float32
    assert all(g.dtype == jnp.bfloat16 for g in grads.values())
    result, _ = jax.jit(step(gapo.GAPOConfig(rho=0.02, anchor="first_order")))(params, batch)
    assert float(result.radius) == pytest.approx(0.02, rel=1e-4)
    assert float(result.changed_fraction) == 1


def test_donated_buffers() -> None:
    params, batch = problem("float64")
    expected = step()(params, batch)

    @partial(jax.jit, donate_argnums=0)
    def update(params: Any, batch: Any) -> Any:
        result, grads = step()(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), result

    before = jax.tree.map(jnp.copy, params)
    new, result = update(params, batch)
    assert_close(result, expected[0], 1e-4)
    assert_close(new, jax.tree.map(lambda p, g: p - 0.1 * g, before, expected[1]), 1e-4)


def test_leaves_that_are_no_floats_stay_out() -> None:
    params, batch = problem("float64")
    tree = {"weights": params, "steps": jnp.asarray(3)}
    result, grads = step(fn=lambda p, b: margin_fn(p["weights"], b))(tree, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(tree)
    assert grads["steps"].dtype == jax.dtypes.float0
    assert_close(grads["weights"], step()(params, batch)[1])
    assert np.isfinite(float(result.loss))


@jax.tree_util.register_dataclass
@dataclass
class Module:
    """As Equinox has them: a pytree whose leaves are arrays and whatever else the fields hold."""

    w: Any
    more: Any


@pytest.mark.parametrize(
    ("leaf", "kind"), [(jax.nn.relu, "custom_jvp"), ("relu", "str"), (np.array(["a"]), "ndarray"), (object(), "object")]
)
def test_leaves_that_are_no_arrays_are_refused(leaf: Any, kind: str) -> None:
    taken = step(fn=lambda p, batch: batch @ p.w)
    message = rf"params must be a pytree of arrays; the leaf 'more' is of type {kind}\..* eqx.partition\("
    with pytest.raises(TypeError, match=message):
        taken(Module(jnp.ones(2), leaf), jnp.ones((3, 2)))


def test_leaves_that_can_be_arrays() -> None:
    """NumPy arrays and Python numbers are arrays; None is no leaf."""
    params = {"w": np.ones(2, np.float32), "b": 0.5, "n": 3, "on": True, "none": None, "bare": np.float32(2)}
    fn = lambda p, batch: batch @ p["w"] * p["bare"] + p["b"] * p["n"]  # noqa: E731
    _, grads = step(fn=fn)(params, jnp.ones((3, 2)))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert float(grads["b"]) / float(grads["w"][0]) == pytest.approx(3 / 2)
    assert grads["n"].dtype == grads["on"].dtype == jax.dtypes.float0


def test_gaussian_needs_a_key() -> None:
    params, batch = problem("float64")
    gaussian = step(gapo.GAPOConfig(direction="gaussian"))
    with pytest.raises(ValueError, match=r'direction="gaussian" draws random numbers: call .*rng=jax.random.key'):
        gaussian(params, batch)
    keys = jax.random.split(jax.random.key(0), 2)
    gaps = [jax.jit(lambda key: gaussian(params, batch, rng=key)[0].anchor_gaps)(key) for key in keys]
    assert float(jnp.abs(gaps[0] - gaps[1]).max()) > 0
