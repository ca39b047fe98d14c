"""One list of checks that every backend passes: values, gradients, purity, radius, selection, errors."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import models
import numpy as np
import oracle
import pytest
from frameworks import Library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gapo
from gapo.backends.numpy import NumpyBackend
from gapo.step import run

ARRAYS = ("loss", "margins", "anchor_margins", "anchor_gaps", "weights", "grad_norm", "radius")


def take_step(
    backend: Library,
    arrays: dict[str, np.ndarray],
    batch: dict[str, np.ndarray],
    dtype: str = "float64",
    **options: Any,
) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """A step of the backend on `arrays`: (result as NumPy, gradients by name, the parameters)."""
    gamma = options.pop("gamma", None)
    pair = options.pop("pair", True)
    rng = options.pop("rng", models.generator(backend, 0))
    number = gamma if isinstance(gamma, float) else 0.25
    config = gapo.GAPOConfig(gamma=number, **options)
    step = gapo.value_and_grad(models.make_margin_fn(backend, pair=pair), config, backend=backend.name)
    params = models.to_backend(backend, arrays, dtype)
    per_pair = None if gamma is None or isinstance(gamma, float) else backend.asarray(gamma, dtype)
    result, grads = step(params, batch, gamma=per_pair, rng=rng)
    found = {name: None if x is None else backend.numpy(x) for name, x in vars(result).items()}
    return found, models.flat_grads(backend, grads), params


def assert_same(
    found: tuple[dict[str, Any], dict[str, np.ndarray], Any], expected: dict[str, Any], rtol: float
) -> None:
    result, grads, _ = found
    for name in ARRAYS:
        np.testing.assert_allclose(result[name], expected[name], rtol=rtol, atol=rtol, err_msg=name)
    scale = max(np.abs(g).max() for g in expected["grads"].values())
    assert set(grads) == set(expected["grads"])
    for name, g in expected["grads"].items():
        np.testing.assert_allclose(grads[name], g, rtol=rtol, atol=rtol * scale, err_msg=name)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """Options of `make_params`, a batch and the options of a step."""
    seed = draw(st.integers(0, 2**16))
    pairs = draw(st.sampled_from([1, 3]))  # the shapes of the other tests: JAX compiles each operation for each
    model = {"layers": draw(st.integers(1, 2)), "tied": draw(st.booleans()), "seed": seed}
    batch = models.make_batch(pairs=pairs, seed=seed)
    per_pair = st.lists(st.floats(-1, 1), min_size=pairs, max_size=pairs).map(np.array)
    options = {
        "beta": draw(st.floats(0.1, 10)),
        "gamma": draw(st.floats(-1, 2) | per_pair),
        "rho": draw(st.sampled_from([0.001, 0.05, 0.3])),
        "adaptive": draw(st.booleans()),
        "probe": draw(st.sampled_from(["loss", "margin"])),
        "anchor": draw(st.sampled_from(["exact", "first_order"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "loss_type": draw(st.sampled_from(["sigmoid", "hinge"])),
        "sft_weight": draw(st.sampled_from([0.0, 0.5])),
    }
    return model, batch, options


@pytest.mark.filterwarnings("ignore:first_order_ratio")  # radii at which the drop is not linear are drawn too
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_agrees_with_the_oracle(backend: Library, case: Any) -> None:
    model, batch, options = case
    width = 2 if backend.name == "numpy" else 4  # two forwards for each weight there
    arrays = models.make_params(width=width, **model)
    selected = [name for name in arrays if name != "lm_head.weight"]
    expected = oracle.step(arrays, batch, selected=selected, **options)
    found = take_step(backend, arrays, batch, perturb="^(?!lm_head)", **options)
    # The kink of the hinge is no place to compare gradients at.
    if (
        options["loss_type"] == "hinge"
        and np.abs(1 - np.abs(options["beta"] * expected["anchor_gaps"] - options["gamma"])).min() < 1e-3
    ):
        return
    assert_same(found, expected, models.RTOL[backend.name])


@pytest.mark.parametrize(
    "options",
    [
        {"sft_weight": 0.5, "label_smoothing": 0.1, "probe": "margin", "gamma": np.array([0.1, 0.5, -0.3])},
        {"sft_weight": 0.5, "loss_type": "hinge", "adaptive": False, "anchor": "first_order", "beta": 1.0},
    ],
)
def test_every_option_agrees_with_the_oracle(backend: Library, options: dict[str, Any]) -> None:
    """What the draws above may miss, certainly."""
    arrays, batch = models.make_params(seed=14), models.make_batch(pairs=3, seed=14)
    expected = oracle.step(arrays, batch, rho=0.3, **options)
    assert_same(take_step(backend, arrays, batch, rho=0.3, **options), expected, models.RTOL[backend.name])


def test_float32_agrees_with_the_oracle(backend: Library) -> None:
    if backend.name == "numpy":
        return  # float64 only, by design
    arrays, batch = models.make_params(layers=2, seed=3), models.make_batch(pairs=4, seed=3)
    found = take_step(backend, arrays, batch, "float32", rho=0.3)
    assert_same(found, oracle.step(arrays, batch, rho=0.3), 1e-5)
    assert all(str(found[0][name].dtype) == "float64" for name in ARRAYS)  # as read; the backend's own dtype below
    step = gapo.value_and_grad(models.make_margin_fn(backend), backend=backend.name)
    result, grads = step(models.to_backend(backend, arrays, "float32"), batch)
    assert all("float32" in str(getattr(result, name).dtype) for name in ARRAYS)
    assert all("float32" in str(g.dtype) for g in models.flat(backend, grads, grads=True).values())


def test_ten_steps_of_sgd_stay_with_the_oracle(backend: Library) -> None:
    width = 2 if backend.name == "numpy" else 4  # two forwards for each weight there
    arrays, batch = models.make_params(width=width, seed=5), models.make_batch(pairs=3, seed=5)
    step = gapo.value_and_grad(models.make_margin_fn(backend), gapo.GAPOConfig(rho=0.1), backend=backend.name)
    params = models.to_backend(backend, arrays, "float64")
    reference = dict(arrays)
    for _ in range(10):
        params = models.update(backend, params, step(params, batch)[1], 0.05)
        grads = oracle.step(reference, batch, rho=0.1)["grads"]
        reference = {name: value - 0.05 * grads[name] for name, value in reference.items()}
    for name, value in models.flat(backend, params).items():
        np.testing.assert_allclose(backend.numpy(value), reference[name], rtol=1e-4, atol=1e-5)


def test_parameters_stay_bit_for_bit(backend: Library) -> None:
    arrays, batch = models.make_params(seed=1), models.make_batch(seed=1)
    _, _, params = take_step(backend, arrays, batch, rho=0.5)
    for name, value in models.flat(backend, params).items():
        assert (backend.numpy(value) == arrays[name]).all(), name


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("direction", ["pessimistic", "gaussian"])
@pytest.mark.parametrize("rho", [1e-3, 0.5])
def test_radius_is_rho(backend: Library, adaptive: bool, direction: str, rho: float) -> None:
    arrays, batch = models.make_params(seed=2), models.make_batch(seed=2)
    result, _, _ = take_step(backend, arrays, batch, adaptive=adaptive, direction=direction, rho=rho)
    np.testing.assert_allclose(result["radius"], rho, rtol=1e-5)
    assert (result["first_order_ratio"] is None) == (direction == "gaussian")


def test_radius_whose_square_is_below_every_float32(backend: Library) -> None:
    def margin_fn(params: Any, _: Any) -> Any:
        total = models.namespace_of(backend).sum(models.flat(backend, params)["w"])
        return models.namespace_of(backend).stack([total, total])

    dtype = "float64" if backend.name == "numpy" else "float32"  # the NumPy backend computes in float64 alone
    step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(rho=1e-25, adaptive=False), backend=backend.name)
    result, _ = step(models.to_backend(backend, {"w": np.linspace(1e-25, 2e-25, 9)}, dtype), None)
    np.testing.assert_allclose(backend.numpy(result.radius), 1e-25, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_every_weight_moves_the_share_of_changed_weights_is_exactly_one(backend: Library, dtype: str) -> None:
    if backend.name == "numpy" and dtype == "float32":
        pytest.skip("the NumPy backend computes in float64 alone")
    arrays = {f"layer{i}": np.linspace(1.0, 2.0, size) for i, size in enumerate((24, 7, 96, 13, 5))}

    def margin_fn(params: Any, _: Any) -> Any:
        xp, p = models.namespace_of(backend), models.flat(backend, params)
        return xp.stack([sum(xp.sum(p[name]) for name in arrays), xp.sum(p["layer0"])])

    step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(rho=5.0, probe="margin"), backend=backend.name)
    result, _ = step(models.to_backend(backend, arrays, dtype), None)
    assert float(backend.numpy(result.changed_fraction)) == 1


def test_changed_fraction_is_a_share_of_all_selected_weights(backend: Library) -> None:
    arrays = {"u": np.array([1.0, 2.0, 0.0]), "v": np.array([1.0]), "lm_head": np.ones(9)}

    def margin_fn(params: Any, _: Any) -> Any:
        xp, p = models.namespace_of(backend), models.flat(backend, params)
        return xp.stack([xp.sum(p["u"]) + xp.sum(p["v"]), xp.sum(p["lm_head"])])

    for adaptive, changed in ((True, 3 / 4), (False, 1.0)):  # the adaptive geometry leaves a weight of 0 where it is
        step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(adaptive=adaptive), backend=backend.name)
        result, _ = step(models.to_backend(backend, arrays, "float64"), None)
        assert float(backend.numpy(result.changed_fraction)) == pytest.approx(changed)


def test_rho_zero_gives_equal_weights(backend: Library) -> None:
    arrays, batch = models.make_params(seed=2), models.make_batch(seed=2)
    result, grads, _ = take_step(backend, arrays, batch, rho=0.0, beta=2.0, gamma=0.5)
    np.testing.assert_array_equal(result["anchor_gaps"], 0)
    np.testing.assert_allclose(result["weights"], 2.0 / (1 + np.exp(-0.5)), rtol=1e-6)
    assert max(np.abs(g).max() for g in grads.values()) > 0


def test_pessimistic_direction_lowers_the_mean_margin(backend: Library) -> None:
    arrays, batch = models.make_params(seed=4), models.make_batch(seed=4)
    for adaptive in (True, False):
        result, _, _ = take_step(backend, arrays, batch, probe="margin", adaptive=adaptive, rho=1e-3)
        assert result["anchor_gaps"].mean() > 0


def test_first_order_error_falls_as_rho_squared(backend: Library) -> None:
    arrays, batch = models.make_params(seed=6), models.make_batch(pairs=3, seed=6)
    errors = []
    for rho in (0.2, 0.1, 0.05):
        exact, first = (
            take_step(backend, arrays, batch, rho=rho, anchor=anchor)[0]["anchor_gaps"]
            for anchor in ("exact", "first_order")
        )
        errors.append(np.abs(exact - first).max())
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert (orders > 1.6).all(), (errors, orders)


def test_first_order_ratio_is_one_for_a_small_radius(backend: Library) -> None:
    arrays, batch = models.make_params(seed=7), models.make_batch(seed=7)
    for probe in ("loss", "margin"):
        result, _, _ = take_step(backend, arrays, batch, rho=1e-3, probe=probe)
        np.testing.assert_allclose(result["first_order_ratio"], 1, atol=0.02)
        result, _, _ = take_step(backend, arrays, batch, rho=0.3, probe=probe, anchor="first_order")
        np.testing.assert_allclose(result["first_order_ratio"], 1, rtol=1e-5)


def test_gradient_of_zero_gives_gaps_of_zero(backend: Library) -> None:
    arrays, batch = models.make_params(seed=1), models.make_batch(seed=1)
    for side in ("input_ids", "labels"):  # both answers alike: every margin is 0, whatever the weights
        batch[f"rejected_{side}"] = batch[f"chosen_{side}"]
    for anchor in ("exact", "first_order"):
        result, grads, _ = take_step(backend, arrays, batch, anchor=anchor, probe="margin")
        np.testing.assert_allclose(result["anchor_gaps"], 0, atol=1e-9)
        assert all(np.isfinite(g).all() for g in grads.values())


def test_gradient_of_exactly_zero_is_no_nan(backend: Library) -> None:
    arrays, batch = models.make_params(seed=1), models.make_batch(seed=1)
    zeros = {name: np.zeros_like(value) for name, value in arrays.items()}  # abs(theta) * g is 0 everywhere
    for anchor in ("exact", "first_order"):
        result, grads, _ = take_step(backend, zeros, batch, anchor=anchor)
        assert result["radius"] == 0
        assert result["first_order_ratio"] == 1
        assert result["changed_fraction"] == (1 if anchor == "first_order" else 0)
        np.testing.assert_array_equal(result["anchor_gaps"], 0)
        assert all(np.isfinite(g).all() for g in grads.values())


def test_large_margins_keep_their_direction(backend: Library) -> None:
    arrays, batch = models.make_params(seed=8), models.make_batch(seed=8)
    arrays["lm_head.weight"] = arrays["lm_head.weight"] * 200
    result, _, _ = take_step(backend, arrays, batch, beta=10.0)
    np.testing.assert_allclose(result["radius"], 0.025, rtol=1e-4)
    assert np.isfinite(result["loss"])


def test_permuting_pairs_permutes_the_result(backend: Library) -> None:
    arrays, batch = models.make_params(seed=9), models.make_batch(seed=9)
    order = np.array([2, 0, 1])
    first = take_step(backend, arrays, batch, rho=0.3)
    second = take_step(backend, arrays, {name: x[order] for name, x in batch.items()}, rho=0.3)
    rtol = models.RTOL[backend.name]
    for name in ("margins", "anchor_gaps", "weights"):
        np.testing.assert_allclose(first[0][name][order], second[0][name], rtol=rtol, atol=rtol)
    for name, g in first[1].items():
        np.testing.assert_allclose(g, second[1][name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_margins_alone_give_the_same_step(backend: Library, anchor: str) -> None:
    arrays, batch = models.make_params(seed=10), models.make_batch(seed=10)
    both, one = (take_step(backend, arrays, batch, pair=pair, anchor=anchor) for pair in (True, False))
    np.testing.assert_allclose(both[0]["weights"], one[0]["weights"], rtol=1e-6)
    assert one[0]["chosen_logps"] is None
    np.testing.assert_allclose(
        both[0]["chosen_logps"] - both[0]["rejected_logps"], both[0]["margins"], rtol=1e-6, atol=1e-7
    )
    with pytest.raises(ValueError, match=r"sft_weight=0.1 needs the chosen log-probs"):
        take_step(backend, arrays, batch, pair=False, sft_weight=0.1, anchor=anchor)


@pytest.mark.parametrize(
    ("options", "selected"),
    [
        ({}, lambda name: name != "lm_head.weight"),
        ({"perturb": "all"}, lambda name: True),
        ({"perturb": r"(query|key)\.weight"}, lambda name: "query" in name or "key" in name),
        ({"last_layers": 1}, lambda name: name.startswith("layers.1.")),
        ({"last_layers": 2, "perturb": "up"}, lambda name: "up" in name),
    ],
)
def test_selection(backend: Library, options: dict[str, Any], selected: Any) -> None:
    arrays, batch = models.make_params(layers=2, seed=11), models.make_batch(seed=11)
    expected = oracle.step(arrays, batch, rho=0.3, selected=[name for name in arrays if selected(name)])
    assert_same(take_step(backend, arrays, batch, rho=0.3, **options), expected, models.RTOL[backend.name])


def test_errors(backend: Library) -> None:
    arrays, batch = models.make_params(seed=1), models.make_batch(seed=1)
    with pytest.raises(ValueError, match=r"perturb='nowhere' .* selects none of the \d+ trainable parameters"):
        take_step(backend, arrays, batch, perturb="nowhere")
    with pytest.raises(ValueError, match=r"last_layers=5 was asked, but .* 1 numbered layers"):
        take_step(backend, arrays, batch, last_layers=5)
    with pytest.raises(ValueError, match=r"gamma must be a number or one for each of the 3 pairs, got shape \(2,\)"):
        take_step(backend, arrays, batch, gamma=np.zeros(2))
    both = models.make_margin_fn(backend)
    for bad, error, got in (
        (lambda p, b: "no array", TypeError, "got str"),
        (lambda p, b: (1, 2, 3), TypeError, "got 3 values"),
        (lambda p, b: both(p, b)[0][:, None], ValueError, r"N >= 1 pairs; got \(3, 1\)"),
        (lambda p, b: both(p, b)[0][:0], ValueError, r"got \(0,\)"),
        (lambda p, b: (both(p, b)[0], both(p, b)[1][:2]), ValueError, r"got \(3,\), \(2,\)"),
    ):
        with pytest.raises(error, match=f"margin_fn must return margins .*{got}"):
            gapo.value_and_grad(bad, backend=backend.name)(models.to_backend(backend, arrays, "float64"), batch)


@pytest.mark.parametrize(("value", "got"), [(np.ones(2, np.float32), "float32"), ([1.0, 1.0], "list")])
def test_numpy_takes_float64_alone(value: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"params\['w'\] must be a float64 array, got {got}"):
        gapo.value_and_grad(lambda p, b: b @ p["w"], backend="numpy")({"w": value}, np.eye(2))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy says so too
def test_values_that_are_not_finite(backend: Library) -> None:
    batch = models.make_batch(seed=1)
    arrays = models.make_params(seed=1)
    arrays["layers.0.norm.weight"][:] = np.nan
    said = (
        r"margins of pairs \[0, 1, 2\] are not finite in the clean forward; weights of 'layers.0.norm.weight' were not"
    )
    with pytest.raises(FloatingPointError, match=said):
        take_step(backend, arrays, batch)

    def log_margin(params: Any, _: Any) -> Any:  # has no value from w = 1.05 on, where the anchor goes
        return models.namespace_of(backend).log(1.05 - models.flat(backend, params)["w"])

    params = models.to_backend(backend, {"w": np.array([1.0, 1.0])}, "float64")
    step = gapo.value_and_grad(log_margin, gapo.GAPOConfig(rho=0.5), backend=backend.name)
    with pytest.raises(FloatingPointError, match=r"pairs \[0, 1\] are not finite in the anchor forward; rho=0.5"):
        step(params, None)
    np.testing.assert_array_equal(backend.numpy(models.flat(backend, params)["w"]), 1.0)


def test_another_ranks_margins_stop_this_one_too() -> None:
    class Ranks(NumpyBackend):
        def all_reduce(self, x: np.ndarray, op: str) -> np.ndarray:  # the mean drop is not finite: on another rank
            return x * (np.nan if op == "mean" and x.ndim == 0 else 1)

    config, backend = gapo.GAPOConfig(), Ranks()
    forward = backend.forward(lambda p, b: b @ p["w"], {"w": np.ones(2)}, np.eye(2), config)
    with pytest.raises(FloatingPointError, match="margins of another rank's pairs are not finite in the anchor forwa"):
        run(forward, config, backend)


@pytest.mark.parametrize(
    ("which", "error"), [("first", RuntimeError), ("second", KeyboardInterrupt), ("last", MemoryError)]
)
def test_a_forward_that_fails_leaves_the_parameters(backend: Library, which: str, error: type[BaseException]) -> None:
    """The clean forward, the one after it, and the anchor's, which is the last but in MLX."""
    width = 2 if backend.name == "numpy" else 4
    arrays, batch = models.make_params(width=width, seed=1), models.make_batch(seed=1)
    params, plain = models.to_backend(backend, arrays, "float64"), models.make_margin_fn(backend)
    calls, fail_at = [], [0]

    def margin_fn(p: Any, b: Any) -> Any:
        calls.append(1)
        if len(calls) == fail_at[0]:
            raise error("in a forward")
        return plain(p, b)

    step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(rho=0.5), backend=backend.name)
    step(params, batch)  # JAX calls a new function once more, to read it
    calls.clear()
    expected, _ = step(params, batch)
    fail_at[0] = {"first": 1, "second": 2, "last": len(calls)}[which]
    calls.clear()
    with pytest.raises(error, match="in a forward"):
        step(params, batch)
    for name, value in models.flat(backend, params).items():
        assert (backend.numpy(value) == arrays[name]).all(), name
    fail_at[0] = 0
    np.testing.assert_array_equal(backend.numpy(step(params, batch)[0].weights), backend.numpy(expected.weights))


def test_per_pair_gradient_identity(backend: Library) -> None:
    """grad loss = -(1/N) sum w_i grad M_i, with grad M_i from steps on one pair each at rho = 0."""
    arrays, batch = models.make_params(seed=12), models.make_batch(pairs=3, seed=12)
    result, grads, _ = take_step(backend, arrays, batch, rho=0.3)
    total = {name: np.zeros_like(g) for name, g in grads.items()}
    for i in range(3):
        one, by_pair, _ = take_step(backend, arrays, {name: x[i : i + 1] for name, x in batch.items()}, rho=0.0)
        for name, g in by_pair.items():
            total[name] += result["weights"][i] / 3 * g / one["weights"][0]
    for name, g in grads.items():
        np.testing.assert_allclose(g, total[name], rtol=1e-5, atol=models.RTOL[backend.name])


def test_gaussian_draws_follow_the_generator(backend: Library) -> None:
    arrays, batch = models.make_params(seed=13), models.make_batch(seed=13)
    gaps = [
        take_step(backend, arrays, batch, direction="gaussian", rho=0.5, rng=models.generator(backend, seed))[0][
            "anchor_gaps"
        ]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(gaps[0], gaps[1])
    assert np.abs(gaps[0] - gaps[2]).max() > 1e-6


def test_the_result_says_what_its_fields_are() -> None:
    documented = inspect.getdoc(gapo.StepResult) or ""
    for field in dataclasses.fields(gapo.StepResult):
        assert f"\n    {field.name}: " in documented


def test_a_result_cannot_be_written_to() -> None:
    result, _ = gapo.value_and_grad(lambda p, b: b @ p["w"], backend="numpy")({"w": np.ones(2)}, np.eye(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.loss = 0  # type: ignore[misc]


def test_unknown_backend_and_absent_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of 'numpy', 'torch', 'jax', 'mlx', got 'tensorflow'"):
        gapo.value_and_grad(lambda p, b: p, backend="tensorflow")
    with pytest.raises(TypeError, match=r"config must be a gapo.GAPOConfig, got dict"):
        gapo.value_and_grad(lambda p, b: p, {}, backend="numpy")  # type: ignore[arg-type]
    import sys

    for name, module in (("torch", "torch"), ("jax", "jax"), ("mlx", "mlx.core")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModuleNotFoundError, match=rf'pip install "gapo\[{name}\]"'):
            gapo.value_and_grad(lambda p, b: p, backend=name)
        monkeypatch.undo()
