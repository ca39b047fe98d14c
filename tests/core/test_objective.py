"""The objective against scalar arithmetic in Python floats, on every array library."""

import inspect
import math

import numpy as np
import pytest
from frameworks import LIBRARIES, Library, require
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import gapo

pytestmark = pytest.mark.filterwarnings("ignore:.*float64.*:UserWarning")
over_libraries = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

logp = st.floats(-20, 0, allow_subnormal=False)
# Few sizes: JAX compiles each operation for each.
pairs = st.sampled_from([1, 2, 5]).flatmap(
    lambda n: st.lists(st.tuples(logp, logp, logp, logp), min_size=n, max_size=n)
)
beta = st.floats(0.1, 10)
gamma = st.floats(-2, 5)


def softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def oracle_loss(row, beta, gamma, loss_type, smoothing):
    """-log sigmoid(x) is softplus(-x)."""
    chosen, rejected, anchor_chosen, anchor_rejected = row
    x = beta * ((chosen - anchor_chosen) - (rejected - anchor_rejected)) - gamma
    one = softplus if loss_type == "sigmoid" else (lambda z: max(0.0, 1 + z))
    return (1 - smoothing) * one(-x) + smoothing * one(x)


def columns(library: Library, rows, dtype="float64"):
    return [library.asarray(np.array(column), dtype) for column in zip(*rows, strict=True)]


@over_libraries
@given(
    rows=pairs,
    beta=beta,
    gamma=gamma,
    loss_type=st.sampled_from(["sigmoid", "hinge"]),
    smoothing=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_loss_equals_scalar_arithmetic(library, rows, beta, gamma, loss_type, smoothing):
    options = {"beta": beta, "gamma": gamma, "loss_type": loss_type, "label_smoothing": smoothing}
    expected = [oracle_loss(row, beta, gamma, loss_type, smoothing) for row in rows]
    got = {
        r: library.numpy(gapo.loss(*columns(library, rows), **options, reduction=r)) for r in ("none", "sum", "mean")
    }
    tolerance = {"rtol": max(library.double_rtol, 1e-11), "atol": 1e-5 if library.name == "mlx" else 1e-11}
    np.testing.assert_allclose(got["none"], expected, **tolerance)
    np.testing.assert_allclose(got["sum"], math.fsum(expected), **tolerance)
    np.testing.assert_allclose(got["mean"], math.fsum(expected) / len(rows), **tolerance)


@over_libraries
@given(rows=pairs, beta=beta, gamma=gamma, smoothing=st.sampled_from([0.0, 0.2]))
def test_gradient_is_minus_the_weighted_mean_margin_gradient(autodiff, rows, beta, gamma, smoothing):
    options = {"beta": beta, "gamma": gamma, "label_smoothing": smoothing}
    arrays = columns(autodiff, rows)
    chosen, rejected, anchor_chosen, anchor_rejected = autodiff.grad(lambda *a: gapo.loss(*a, **options), *arrays)
    weights = autodiff.numpy(gapo.weights(gapo.anchor_gap(*arrays), **options))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if autodiff.name == "mlx" else {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(chosen, -weights / len(rows), **tolerance)
    np.testing.assert_allclose(rejected, weights / len(rows), **tolerance)
    assert not anchor_chosen.any()
    assert not anchor_rejected.any()


@over_libraries
@given(
    gaps=st.lists(st.floats(-5, 5), min_size=1, max_size=8),
    beta=beta,
    gamma=gamma,
    loss_type=st.sampled_from(["sigmoid", "hinge"]),
    smoothing=st.sampled_from([0.0, 0.2]),
)
def test_weights_are_the_derivative_of_the_loss(library, gaps, beta, gamma, loss_type, smoothing):
    h = 1e-6
    assume(loss_type != "hinge" or all(abs(abs(beta * g - gamma) - 1) > 1e-3 for g in gaps))  # not at its kinks
    slope = [
        (
            oracle_loss((g + h, 0, 0, 0), beta, gamma, loss_type, smoothing)
            - oracle_loss((g - h, 0, 0, 0), beta, gamma, loss_type, smoothing)
        )
        / (2 * h)
        for g in gaps
    ]
    options = {"beta": beta, "gamma": gamma, "loss_type": loss_type, "label_smoothing": smoothing}
    found = library.numpy(gapo.weights(library.asarray(np.array(gaps)), **options))
    np.testing.assert_allclose(found, np.negative(slope), atol=1e-5)


def test_hinge_on_both_sides_of_its_kink(library):
    x = library.asarray(np.array([-1.5, 0.5, 0.75, 1.25, 1.75, 2.5]))
    zero = library.asarray(np.zeros(6))
    options = {"beta": 1.0, "gamma": 0.0, "loss_type": "hinge"}
    loss = library.numpy(gapo.loss(x, zero, zero, zero, reduction="none", **options))
    np.testing.assert_array_equal(loss, [2.5, 0.5, 0.25, 0, 0, 0])
    np.testing.assert_array_equal(library.numpy(gapo.weights(x, **options)), [1, 1, 1, 0, 0, 0])


@over_libraries
@given(gaps=st.lists(st.floats(-3, 3), min_size=5, max_size=5, unique=True), beta=beta, gamma=gamma)
def test_weights_fall_as_gaps_rise(library, gaps, beta, gamma):
    ascending = np.sort(gaps)
    weights = library.numpy(gapo.weights(library.asarray(ascending), beta=beta, gamma=gamma))
    assert (np.diff(weights) <= 0).all()
    apart = -np.diff(beta / (1 + np.exp(beta * ascending - gamma))) > 1e-5 * beta  # more than rounding can hide
    assert (np.diff(weights)[apart] < 0).all()
    assert ((weights >= 0) & (weights <= beta * (1 + library.double_rtol))).all()


@over_libraries
@given(rows=pairs, seed=st.integers(0, 99))
def test_permuting_pairs_permutes_weights(library, rows, seed):
    order = np.random.default_rng(seed).permutation(len(rows))
    weights = library.numpy(gapo.weights(gapo.anchor_gap(*columns(library, rows))))
    permuted = library.numpy(gapo.weights(gapo.anchor_gap(*columns(library, [rows[i] for i in order]))))
    np.testing.assert_allclose(permuted, weights[order], rtol=1e-6)


def test_equal_anchor_gives_equal_weights(library):
    logps = columns(library, [(-1.0, -2.0), (-5.0, -0.5), (-0.1, -0.1)])
    gap = gapo.anchor_gap(*logps, *logps)
    weights = library.numpy(gapo.weights(gap, beta=2.0, gamma=0.5))
    np.testing.assert_allclose(weights, 2.0 / (1 + math.exp(-0.5)), rtol=1e-6)


@pytest.mark.parametrize("x", [-1e4, 1e4])
def test_extreme_logits_are_finite(autodiff, x):
    zero = autodiff.asarray(np.zeros(1), "float32")
    chosen = autodiff.asarray(np.array([x]), "float32")
    value = autodiff.numpy(gapo.loss(chosen, zero, zero, zero, beta=1.0, gamma=0.0))
    slope = autodiff.grad(lambda c: gapo.loss(c, zero, zero, zero, beta=1.0, gamma=0.0), chosen)[0]
    np.testing.assert_allclose(value, max(0.0, -x), rtol=1e-6)
    np.testing.assert_allclose(slope, [-1.0 if x < 0 else 0.0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_reduced_in_float32(library, dtype):
    if library.name in ("numpy", "strict") and (dtype == "bfloat16" or library.name == "strict"):
        pytest.skip(f"{library.name} has no {dtype}")
    # 4096 equal losses: a sum in 16 bits would stall long before their true sum
    arrays = [library.asarray(np.full(4096, value), dtype) for value in (-1.0, -2.0, -1.5, -2.25)]
    loss = gapo.loss(*arrays, reduction="sum")
    assert "float32" in str(loss.dtype)
    np.testing.assert_allclose(library.numpy(loss), 4096 * softplus(-(2.5 * 0.25 - 0.25)), rtol=1e-4)


def test_target_may_differ_by_pair(library):
    rows = [(-1.0, -2.0, -1.5, -2.25), (-1.0, -1.0, -1.0, -1.5)]
    targets = [0.1, 0.9]
    loss = gapo.loss(*columns(library, rows), gamma=library.asarray(np.array(targets)), reduction="none")
    expected = [oracle_loss(row, 2.5, target, "sigmoid", 0) for row, target in zip(rows, targets, strict=True)]
    np.testing.assert_allclose(library.numpy(loss), expected, rtol=1e-6)


@pytest.mark.parametrize("function", [gapo.loss, gapo.weights])
def test_defaults_are_those_of_the_step(function):
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    for name in ("beta", "gamma", "loss_type", "label_smoothing"):
        assert defaults[name] == getattr(gapo.GAPOConfig(), name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": 0}, ValueError, r"beta must be a finite number > 0, got 0"),
        ({"beta": float("nan")}, ValueError, r"beta must be a finite number > 0, got nan"),
        ({"gamma": "high"}, ValueError, r"gamma must be a finite number, got 'high'"),
        ({"label_smoothing": 0.5}, ValueError, r"label_smoothing must be a finite number in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be a finite number in \[0, 0.5\), got -0.1"),
        ({"loss_type": "ipo"}, ValueError, r"loss_type must be one of 'sigmoid', 'hinge', got 'ipo'"),
        ({"reduction": "max"}, ValueError, r"reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        ({"backend": "tf"}, ValueError, r"backend must be one of 'numpy', 'torch', 'jax', 'mlx' or None, got 'tf'"),
    ],
)
def test_options_out_of_range_are_named(change, error, message):
    x = np.zeros(2)
    with pytest.raises(error, match=message):
        gapo.loss(x, x, x, x, **change)
    if "reduction" not in change:
        with pytest.raises(error, match=message):
            gapo.weights(x, **change)


def test_arrays_that_do_not_fit_are_named(library):
    ok, short = library.asarray(np.zeros(3)), library.asarray(np.zeros(2))
    with pytest.raises(
        ValueError, match=r"chosen_logps and rejected_logps must have the same shape; got \(3,\) and \(2,\)"
    ):
        gapo.loss(ok, short, ok, ok)
    with pytest.raises(ValueError, match=r"chosen_logps must have shape \(N,\) with N >= 1.*got \(3, 1\)"):
        gapo.loss(*[library.asarray(np.zeros((3, 1)))] * 4)
    with pytest.raises(ValueError, match=r"N >= 1.*got \(0,\)"):
        gapo.loss(*[library.asarray(np.zeros(0))] * 4)
    with pytest.raises(TypeError, match="chosen_logps must be floating point"):
        gapo.loss(*[library.asarray(np.zeros(3, dtype=np.int32))] * 4)
    with pytest.raises(ValueError, match="gamma must be a number or one for each of the 3 pairs"):
        gapo.loss(ok, ok, ok, ok, gamma=short)
    with pytest.raises(ValueError, match="gamma must be a number or one for each of the 3 pairs"):
        gapo.weights(ok, gamma=short)
    with pytest.raises(ValueError, match=r"anchor_gap must have shape \(N,\) with N >= 1.*got \(3, 1\)"):
        gapo.weights(library.asarray(np.zeros((3, 1))))
    with pytest.raises(TypeError, match=r"rejected_logps must be an array.*got list"):
        gapo.loss(ok, [0.0] * 3, ok, ok)
    if library.name not in ("numpy", "strict"):
        with pytest.raises(TypeError, match="all arrays must be of one library"):
            gapo.loss(ok, np.zeros(3), ok, ok)
        with pytest.raises(
            TypeError, match=f"backend='numpy' was stated, but chosen_logps is an array of {library.name}"
        ):
            gapo.loss(ok, ok, ok, ok, backend="numpy")
        expected = library.numpy(gapo.loss(ok, ok, ok, ok))
        assert library.numpy(gapo.loss(ok, ok, ok, ok, backend=library.name)) == expected


@pytest.mark.parametrize("backend", ["torch", None])
def test_torch_compile_traces_without_a_graph_break(backend):
    torch = require("torch")
    rows = [torch.randn(4, dtype=torch.float64) for _ in range(4)]
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: gapo.loss(*a, backend=backend), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*rows), gapo.loss(*rows))


def test_oracle_can_fail():
    """The oracle and the code differ at once when the code's target changes sign."""
    row = (-1.0, -2.0, -1.5, -2.25)
    library = LIBRARIES["numpy"]
    wrong = float(gapo.loss(*columns(library, [row]), beta=2.5, gamma=-0.25))
    assert abs(wrong - oracle_loss(row, 2.5, 0.25, "sigmoid", 0)) > 0.1
