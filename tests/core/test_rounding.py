"""Sixteen bits and the anchor: which anchor "auto" takes, gaps against float64, and what is said where they are lost.

Weights are rounded to bfloat16 first, as those of checkpoints are: fresh float32 weights hide what a cast loses.
"""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import models
import numpy as np
import pytest
from frameworks import Library, require

import gapo

RHO = 0.025


@contextmanager
def chosen(caplog: pytest.LogCaptureFixture, anchor: str) -> Iterator[None]:
    """The one log line within names this anchor."""
    with caplog.at_level(logging.INFO, "gapo.rounding"):
        caplog.clear()
        yield
    lines = [r.getMessage() for r in caplog.records if r.name == "gapo.rounding"]
    assert len(lines) == 1, lines
    assert f'takes anchor="{anchor}"' in lines[0]


def bfloat16_grid(x: np.ndarray) -> np.ndarray:
    """`x` rounded to 8 significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**8) / 2**8, exponent)


@pytest.fixture(scope="module")
def torch_case() -> Any:
    require("torch")
    hf_models = pytest.importorskip("hf_models")
    model = hf_models.make("llama", layers=1)
    model.load_state_dict({name: x.bfloat16().float() for name, x in model.state_dict().items()})
    batch = hf_models.batch(4)
    exact = torch_step(copy.deepcopy(model).double(), batch, anchor="exact").anchor_gaps
    return model, batch, exact.numpy()


def torch_step(model: Any, batch: Any, one_pass: bool = True, **options: Any) -> gapo.StepResult:
    from gapo.adapters.hf.margins import pair_logps

    config = gapo.GAPOConfig(**{"rho": RHO, **options})
    return gapo.value_and_grad(pair_logps, config, backend="torch", one_pass=one_pass)(model, batch)[0]


def autocast(dtype: str) -> Any:
    import torch

    return torch.autocast("cpu", dtype=getattr(torch, dtype))


def within_forward(model: Any, dtype: str = "bfloat16") -> Any:
    """As accelerate does it: no autocast is active outside of the model's call."""
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with autocast(dtype):
            outputs = forward(*args, **kwargs)
        outputs["logits"] = outputs["logits"].float()
        return outputs

    model.forward = functools.wraps(forward)(run)
    return model


def half_weights(model: Any) -> Any:
    return model.bfloat16()


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize(
    ("prepare", "around"),
    [
        (lambda model: model, lambda: autocast("bfloat16")),
        (lambda model: model, lambda: autocast("float16")),
        (within_forward, nullcontext),
        (half_weights, nullcontext),
    ],
    ids=["autocast", "float16", "within", "weights"],
)
def test_torch_takes_first_order_in_16_bits(
    torch_case: Any, caplog: Any, prepare: Callable[[Any], Any], around: Any, one_pass: bool
) -> None:
    model, batch, exact = torch_case
    model = prepare(copy.deepcopy(model))
    with chosen(caplog, "first_order"), around():
        result = torch_step(model, batch, one_pass)
    np.testing.assert_allclose(result.anchor_gaps.float().numpy(), exact, rtol=0.02)
    assert float(result.first_order_ratio) == pytest.approx(1, abs=0.01)
    assert float(result.changed_fraction) == 1


def test_torch_stays_exact_in_32_bits(torch_case: Any, caplog: Any) -> None:
    model, batch, exact = torch_case
    with chosen(caplog, "exact"):
        result = torch_step(model, batch)
    np.testing.assert_allclose(result.anchor_gaps.numpy(), exact, rtol=1e-2)
    assert (result.anchor_gaps == torch_step(model, batch, anchor="exact").anchor_gaps).all()


def test_torch_products_in_tf32(torch_case: Any, caplog: Any) -> None:
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # on CPUs bfloat16 products
    try:
        with chosen(caplog, "first_order"):
            torch_step(*torch_case[:2])
    finally:
        torch.set_float32_matmul_precision(before)


def test_torch_sees_through_custom_functions_compilers_and_checkpoints() -> None:
    torch = require("torch")
    from torch.utils.checkpoint import checkpoint

    from gapo.backends.torch.half import quantises, rounds

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x.bfloat16())
            return x.bfloat16().float() ** 2

        @staticmethod
        def backward(ctx: Any, g: Any) -> Any:
            return 2 * g * ctx.saved_tensors[0].float()

    x = torch.ones(3, 3, requires_grad=True)
    assert rounds([Half.apply(x).sum(-1)])
    assert rounds([torch.compile(lambda x: (x.half() @ x.half()).float().sum(-1), backend="aot_eager")(x)])
    assert not rounds([torch.compile(lambda x: (x @ x).sum(-1), backend="aot_eager")(x)])
    kept = checkpoint(lambda x: (x.bfloat16() @ x.bfloat16()).float().sum(-1), x, use_reentrant=False)
    assert rounds([kept])
    kept.sum().backward()  # the look unpacked nothing
    with torch.no_grad():
        frozen = x.bfloat16().float()
    assert not rounds([(frozen @ x).sum(-1)])  # 16 bits below what is trained move nothing
    eight_bits = torch.nn.Module()
    eight_bits.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8, device="meta"), requires_grad=False)
    assert quantises(eight_bits)
    assert not quantises(torch.nn.Linear(2, 2))


def test_an_exact_anchor_under_autocast_says_so_once(torch_case: Any) -> None:
    from gapo.adapters.hf.margins import pair_logps

    model, batch, exact = torch_case
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=RHO, anchor="exact"), backend="torch")
    with (
        autocast("bfloat16"),
        pytest.warns(RuntimeWarning, match=r"computes in 16 bits .*first_order_ratio .* use anchor=\"first_order\""),
    ):
        result, _ = step(model, batch)
    assert np.abs(result.anchor_gaps.numpy() / exact - 1).max() > 0.05  # what is warned of
    with autocast("bfloat16"):
        step(model, batch)  # warnings are errors here


def test_a_fresh_lora_is_looked_at_again(torch_case: Any) -> None:
    hf_models = pytest.importorskip("hf_models")
    from gapo.adapters.hf.margins import pair_logps

    model = hf_models.lora("llama")
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=RHO, anchor="exact"), backend="torch")
    with autocast("bfloat16"):
        step(model, hf_models.batch())  # B is 0: nothing moves, and nothing is said
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
        with pytest.warns(RuntimeWarning, match="computes in 16 bits"):
            step(model, hf_models.batch())


def test_a_drop_far_from_the_predicted_one_is_warned_of(backend: Library) -> None:
    """Whatever the framework and dtype: `exp` of a large radius falls further than its slope says."""

    def margin_fn(params: Any, _: Any) -> Any:
        xp = models.namespace_of(backend)
        return xp.exp(4 * models.flat(backend, params)["w"])

    arrays = {"w": np.array([1.0, 1.2])}
    for anchor, hint in (("exact", "16-bit compute .* may round"), ("auto", "No 16-bit compute was seen")):
        step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(anchor=anchor, rho=1.0), backend=backend.name)
        with pytest.warns(RuntimeWarning, match=rf"first_order_ratio is 0\.\d+: .*{hint}"):
            result, _ = step(models.to_backend(backend, arrays, "float64"), None)
        assert float(backend.numpy(result.first_order_ratio)) < 0.5
        step(models.to_backend(backend, arrays, "float64"), None)  # once is enough: warnings are errors here
    for quiet in ({"direction": "gaussian", "rho": 1.0}, {"rho": 0.0}, {"rho": 1e-3}):
        step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(anchor="exact", **quiet), backend=backend.name)
        step(models.to_backend(backend, arrays, "float64"), None, rng=models.generator(backend, 0))


def test_no_gradient_is_no_cause(backend: Library) -> None:
    if backend.name == "numpy":
        pytest.skip("its central differences are no zero either")

    def margin_fn(params: Any, _: Any) -> Any:
        return models.flat(backend, params)["w"] * backend.asarray(np.array([0.1, 0.2, -0.3]), "float64")

    for anchor in ("exact", "first_order"):  # 0.1 + 0.2 - 0.3 is 5e-17: the pairs cancel, and the ratio is noise
        config = gapo.GAPOConfig(anchor=anchor, probe="margin", adaptive=False)
        step = gapo.value_and_grad(margin_fn, config, backend=backend.name)
        step(models.to_backend(backend, {"w": np.array([1.0])}, "float64"), None)


def test_gaps_that_do_not_add_up_to_the_gradient_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from gapo.backends.numpy import NumpyForward

    right = NumpyForward.directional
    monkeypatch.setattr(NumpyForward, "directional", lambda *args: 1.2 * right(*args))
    step = gapo.value_and_grad(lambda p, x: x @ p["w"], gapo.GAPOConfig(anchor="first_order"), backend="numpy")
    with pytest.warns(RuntimeWarning, match=r"first_order_ratio is 1.2 with anchor=\"first_order\""):
        step({"w": np.array([1.0, 2.0])}, np.eye(2))


def jax_case() -> Any:
    """A function of two layers that may compute in bfloat16, its parameters and its batch."""
    jnp = require("jax").numpy
    rng = np.random.default_rng(0)
    arrays = {"a": bfloat16_grid(rng.normal(size=(16, 16)) / 4), "b": bfloat16_grid(rng.normal(size=(16,)) / 4)}
    batch = bfloat16_grid(rng.normal(size=(4, 16)))

    def margin_fn(params: Any, x: Any, dtype: Any = None) -> Any:
        p = {name: value.astype(dtype or value.dtype) for name, value in params.items()}
        return jnp.tanh(x.astype(p["a"].dtype) @ p["a"]) @ p["b"]

    return margin_fn, arrays, batch


def jax_step(margin_fn: Any, arrays: Any, batch: Any, dtype: str, **options: Any) -> Any:
    jax = require("jax")
    step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(**{"rho": RHO, **options}), backend="jax")
    params = {name: jax.numpy.asarray(x, dtype) for name, x in arrays.items()}
    result = jax.jit(step)(params, jax.numpy.asarray(batch))[0]
    jax.block_until_ready(result)
    jax.effects_barrier()
    return result


def test_jax_gaps_in_16_bits(caplog: Any) -> None:
    jnp = require("jax").numpy
    margin_fn, arrays, batch = jax_case()
    exact = np.array(jax_step(margin_fn, arrays, batch, "float64", anchor="exact").anchor_gaps)

    def half(params: Any, x: Any) -> Any:
        return margin_fn(params, x, jnp.bfloat16)

    for fn, dtype in ((half, "float32"), (margin_fn, "bfloat16")):
        with chosen(caplog, "first_order"):
            result = jax_step(fn, arrays, batch, dtype)
        np.testing.assert_allclose(np.array(result.anchor_gaps), exact, atol=0.03 * np.abs(exact).max())
    with chosen(caplog, "exact"):
        result = jax_step(margin_fn, arrays, batch, "float32")
    np.testing.assert_allclose(np.array(result.anchor_gaps), exact, rtol=1e-3)
    with pytest.warns(RuntimeWarning, match="a forward in 16 bits rounds .* first_order_ratio"):
        jax_step(half, arrays, batch, "float32", anchor="exact")
    with pytest.warns(RuntimeWarning, match="16-bit weights round .* first_order_ratio"):
        jax_step(margin_fn, arrays, batch, "bfloat16", anchor="exact", rho=2e-3)


def test_jax_sees_16_bits_in_inner_programs() -> None:
    jax = require("jax")
    from gapo.backends.jax import JaxForward

    def product(w: Any, dtype: Any) -> Any:
        return (w.astype(dtype) @ w.astype(dtype)).astype(w.dtype)

    half, wide = ((lambda w, d=d: product(w, d)) for d in (jax.numpy.bfloat16, jax.numpy.float32))
    for fn, rounds in ((half, True), (wide, False)):
        for inner in (
            jax.checkpoint(fn),
            jax.jit(fn),
            lambda w, fn=fn: jax.lax.scan(lambda c, _: (fn(c), None), w, None, length=2)[0],
            lambda w, fn=fn: jax.lax.cond(w[0, 0] > 0, fn, lambda w: w, w),
        ):
            forward = JaxForward(lambda p, b, inner=inner: inner(p).sum(-1), jax.numpy.eye(2, dtype="float32"), None)
            assert forward.half_compute() is rounds


def test_flax_modules_that_compute_in_bfloat16(caplog: Any) -> None:
    """Parameters in float32, as Flax keeps them whatever `dtype` says."""
    jax = require("jax")
    jnp, nnx = jax.numpy, pytest.importorskip("flax.nnx")
    import optax

    from gapo.adapters.flax import make_train_step

    class Model(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, dtype: Any) -> None:
            rngs = nnx.Rngs(0)
            self.embed = nnx.Embed(7, 16, dtype=dtype, rngs=rngs)
            self.up = nnx.Linear(16, 16, dtype=dtype, rngs=rngs)
            self.head = nnx.Linear(16, 7, dtype=dtype, rngs=rngs)
            on_grid = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), nnx.state(self, nnx.Param))
            nnx.update(self, on_grid)

        def __call__(self, ids: Any) -> Any:
            return self.head(jnp.tanh(self.up(self.embed(ids))))

    batch = models.make_batch(pairs=4, seed=3)
    batch |= {f"{side}_attention_mask": np.ones_like(batch[f"{side}_input_ids"]) for side in ("chosen", "rejected")}
    gaps = {}
    for dtype, anchor in ((jnp.bfloat16, "first_order"), (jnp.float32, "exact")):
        model = Model(dtype)
        train_step = make_train_step(config=gapo.GAPOConfig(rho=RHO))
        with chosen(caplog, anchor):
            _, result = train_step(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), batch)
        gaps[anchor] = np.array(result.anchor_gaps)
    np.testing.assert_allclose(gaps["first_order"], gaps["exact"], atol=0.05 * np.abs(gaps["exact"]).max())


def test_jax_warns_within_shard_map() -> None:
    jax = require("jax")
    from functools import partial

    from jax.sharding import Mesh, PartitionSpec

    P = PartitionSpec
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    config = gapo.GAPOConfig(anchor="exact", rho=1.0)
    step = gapo.value_and_grad(lambda p, x: jax.numpy.exp(4 * x @ p), config, backend="jax", axis_name="data")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    def sharded(params: Any, batch: Any) -> Any:
        return step(params, batch)[0].anchor_gaps

    def run() -> Any:
        gaps = jax.block_until_ready(sharded(np.array([1.0, 1.2]), np.eye(2)))
        jax.effects_barrier()
        return gaps

    with pytest.warns(RuntimeWarning, match="first_order_ratio"):
        gaps = run()
    assert np.isfinite(np.array(gaps)).all()


def test_mlx_gaps_in_16_bits(caplog: Any) -> None:
    mx = require("mlx.core")
    from mlx import nn

    backend = models.BACKENDS["mlx"]
    arrays = {name: bfloat16_grid(x) for name, x in models.make_params(width=8, seed=3).items()}
    batch, margin_fn = models.make_batch(pairs=4, seed=3), models.make_margin_fn(backend)

    def take(dtype: str, **options: Any) -> Any:
        step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(**{"rho": RHO, **options}), backend="mlx")
        return step(models.to_backend(backend, arrays, dtype), batch)[0]

    exact = backend.numpy(take("float32", anchor="exact").anchor_gaps)
    for dtype in ("bfloat16", "float16"):
        with chosen(caplog, "first_order"):
            found = backend.numpy(take(dtype).anchor_gaps)
        np.testing.assert_allclose(found, exact, atol=0.03 * np.abs(exact).max())
    with chosen(caplog, "exact"):
        take("float32")

    class Quantised(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.QuantizedLinear.from_linear(nn.Linear(32, 8), group_size=32)
            self.base.scales = self.base.scales.astype(mx.bfloat16)
            self.adapter = nn.Linear(32, 8)
            self.base.freeze()

    step = gapo.value_and_grad(lambda m, x: (m.base(x) + m.adapter(x)).sum(-1), backend="mlx")
    with chosen(caplog, "first_order"):
        step(Quantised(), mx.random.normal((3, 32), key=mx.random.key(0)))


def test_a_compiled_step_that_cannot_call_back_warns_while_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = require("mlx.core")
    from mlx import nn

    model = nn.Linear(8, 1)
    model.set_dtype(mx.bfloat16)
    x = mx.random.normal((3, 8), key=mx.random.key(0))
    monkeypatch.setattr("gapo.anchor.is_concrete", lambda _: False)  # as under mx.compile, which takes a C++ compiler
    for options, expected in (
        ({"anchor": "exact"}, pytest.warns(RuntimeWarning, match="compiled step cannot measure")),
        ({}, nullcontext()),
    ):
        step = gapo.value_and_grad(lambda m, x: m(x)[:, 0], gapo.GAPOConfig(rho=1e-3, **options), backend="mlx")
        with expected:
            mx.eval(step(model, x)[0].anchor_gaps)


def test_mlx_lms_report_warns_once() -> None:
    mx = require("mlx.core")
    pytest.importorskip("mlx_lm")
    from mlx import nn

    from gapo.adapters.mlx_lm import MetricsCallback
    from gapo.adapters.mlx_metrics import keep_training

    model = nn.Linear(2, 2)
    report = MetricsCallback(model)
    keep_training(model, {"gapo/first_order_ratio": mx.array(1.1)})
    report.on_train_loss_report({})
    keep_training(model, {"gapo/first_order_ratio": mx.array(0.2)})
    with pytest.warns(RuntimeWarning, match=r"first_order_ratio is 0\.2: .*first_order"):
        report.on_train_loss_report({})
    report.on_train_loss_report({})


@pytest.mark.parametrize("name", ["torch", "jax", "mlx"])
def test_complex_parameters_are_refused(name: str) -> None:
    if name == "torch":
        torch = require("torch")
        params: Any = torch.nn.Module()
        params.w = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
        params.v = torch.nn.Parameter(torch.ones(2))
    elif name == "jax":
        jnp = require("jax").numpy
        params = {"w": jnp.ones(2, dtype="complex64"), "v": jnp.ones(2)}
    else:
        mx = require("mlx.core")
        from mlx import nn

        params = nn.Module()
        params.w, params.v = mx.ones(2).astype(mx.complex64), mx.ones(2)
    step = gapo.value_and_grad(lambda p, b: b, backend=name)
    with pytest.raises(ValueError, match="parameters must be real, and 'w' is complex: freeze"):
        step(params, None)


def test_the_log_says_it_once_for_a_step_function(caplog: Any) -> None:
    step = gapo.value_and_grad(lambda p, x: x @ p["w"], backend="numpy")
    with chosen(caplog, "exact"):
        for _ in range(3):
            step({"w": np.array([1.0, 2.0])}, np.eye(2))


@pytest.fixture(autouse=True)
def _errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
