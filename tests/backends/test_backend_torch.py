"""What only PyTorch has: weights written in place, 16-bit weights, dropout, autocast, checkpointing, real models."""

from __future__ import annotations

import copy
import math
import sys
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from torch import nn

import gapo
from gapo.adapters.hf.margins import pair_logps
from gapo.backends.torch import TorchBackend
from gapo.backends.torch.head import head_parameters
from gapo.objectives import resolve
from gapo.perturbation import Perturbation
from gapo.step import run


def take_step(model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    return gapo.value_and_grad(pair_logps, gapo.GAPOConfig(**options), backend="torch")(model, batch)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_weights_are_bit_for_bit_the_same_after_success(kind: str) -> None:
    model = hf_models.make(kind)
    before, storage = weights_of(model), [p.data_ptr() for p in model.parameters()]
    result, grads = take_step(model, hf_models.batch(), rho=0.5)
    assert float(result.anchor_gaps.abs().max()) > 1e-4
    assert_untouched(model, before)
    assert storage == [p.data_ptr() for p in model.parameters()]
    assert set(grads) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["forward", "move"])
def test_weights_come_back_after_an_exception(error: type[BaseException], where: str) -> None:
    model = hf_models.make("llama")
    before = weights_of(model)

    def fails(module: nn.Module, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            moved = [n for n, p in module.named_parameters() if not torch.equal(p.data, before[n])]
            assert len(moved) > 5
            raise error("in the anchor forward")
        return pair_logps(module, batch)

    config = gapo.GAPOConfig(rho=0.5)
    if where == "forward":
        with pytest.raises(error, match="in the anchor forward"):
            gapo.value_and_grad(fails, config, backend="torch")(model, hf_models.batch())
    else:
        calls = []

        class Failing(TorchBackend):
            def norm(self, x: torch.Tensor, size: torch.Tensor | None = None) -> torch.Tensor:
                calls.append(x)
                if len(calls) == 25:  # amid the applied parameters
                    raise error("while moving")
                return super().norm(x, size)

        forward = Failing().forward(pair_logps, model, hf_models.batch(), config)
        with pytest.raises(error, match="while moving"):
            run(forward, config, Failing())
        assert len(calls) == 25 > len(forward.parameters)
    assert_untouched(model, before)


def test_a_gradient_that_is_not_finite_names_the_parameter() -> None:
    model = hf_models.make("llama")
    before = weights_of(model)
    name = "model.layers.0.mlp.up_proj.weight"
    dict(model.named_parameters())[name].register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError, match=f"probe gradient of '{name}' is not finite; no weight was changed"):
        gapo.value_and_grad(pair_logps, backend="torch", one_pass=False)(model, hf_models.batch())
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("one_pass", "anchor", "forwards", "backwards"),
    [(False, "exact", 2, 2), (True, "exact", 2, 1), (True, "first_order", 1, 1)],
)
def test_how_often_it_runs(one_pass: bool, anchor: str, forwards: int, backwards: int) -> None:
    model, counts = hf_models.make("llama"), {"forward": 0, "backward": 0}
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(anchor=anchor), backend="torch", one_pass=one_pass)
    step(model, hf_models.batch())  # the first step of a model is compared with autograd
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda *_: counts.__setitem__("forward", counts["forward"] + 1))
    layer.register_full_backward_hook(lambda *_: counts.__setitem__("backward", counts["backward"] + 1))
    step(model, hf_models.batch())
    assert counts == {"forward": forwards, "backward": backwards}


def test_bfloat16_weights_warn_or_refuse() -> None:
    model = hf_models.make("llama").to(torch.bfloat16)
    batch = hf_models.batch()
    before = weights_of(model)
    with pytest.warns(RuntimeWarning, match=r"round the perturbation away: .* use anchor=\"first_order\"") as told:
        result, _ = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=0.05, anchor="exact"), backend="torch")(
            model, batch
        )
    assert told[0].filename == __file__  # where the step was called
    assert 0 < float(result.changed_fraction) < 1
    with pytest.raises(ValueError, match=r'changed none of the \d+ selected parameters.*use anchor="first_order"'):
        take_step(model, batch, rho=1e-6, anchor="exact")
    assert_untouched(model, before)
    result, grads = take_step(model, batch, rho=1e-6, anchor="first_order")
    assert float(result.changed_fraction) == 1
    assert float(result.anchor_gaps.abs().max()) > 0
    assert next(iter(grads.values())).dtype == torch.bfloat16
    for name in ("loss", "margins", "anchor_gaps", "weights", "radius"):
        assert getattr(result, name).dtype == torch.float32


def test_float32_delta_of_bfloat16_weights_reaches_the_anchor() -> None:
    # A radius large against the rounding: the bfloat16 gap comes near the float32 one.
    exact = hf_models.make("llama")
    half = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    gaps = []
    for model in (exact, half):
        gaps.append(
            take_step(model, hf_models.batch(), rho=20.0, perturb="norm", anchor="exact")[0].anchor_gaps
        )  # and no warning
    assert float((gaps[0] - gaps[1]).abs().max()) < 0.25 * float(gaps[0].abs().max())


def test_dropout_masks_are_shared() -> None:
    model = hf_models.make("llama", dropout=0.3).train()
    torch.manual_seed(0)
    result, _ = take_step(model, hf_models.batch(), rho=0.0)
    assert torch.equal(result.anchor_gaps, torch.zeros(3))
    # Dropout is on, and the stream of random numbers goes on as if there were no anchor.
    torch.manual_seed(0)
    pair_logps(model, hf_models.batch())
    expected = torch.rand(3)
    torch.manual_seed(0)
    again, _ = take_step(model, hf_models.batch(), rho=0.1)
    assert torch.equal(torch.rand(3), expected)
    assert float((again.margins - take_step(model, hf_models.batch(), rho=0.1)[0].margins).abs().max()) > 1e-4


def test_autocast_sees_the_anchor() -> None:
    model = hf_models.make("llama")
    batch = hf_models.batch()
    exact = take_step(model, batch, rho=1.0, anchor="exact")[0].anchor_gaps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = pair_logps(model, batch)[0]
        with pytest.warns(RuntimeWarning, match="computes in 16 bits"):
            half = take_step(model, batch, rho=1.0, anchor="exact")[0].anchor_gaps
        after = pair_logps(model, batch)[0]
    assert after.dtype == torch.float32
    assert torch.equal(before, after)  # of the anchor's low-precision copies none is left
    assert float((exact - half).abs().max()) < 0.05 * float(exact.abs().max())


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = hf_models.make("llama").double()
    checkpointed = copy.deepcopy(plain).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    batch = hf_models.batch()
    for anchor in ("exact", "first_order"):
        (a, grads), (b, others) = (take_step(m, batch, rho=0.3, anchor=anchor) for m in (plain, checkpointed))
        torch.testing.assert_close(a.anchor_gaps, b.anchor_gaps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads, others, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "head"), list(hf_models.HEADS.items()))
def test_the_head_is_found_by_what_it_is(kind: str, head: str) -> None:
    model = hf_models.make(kind)
    names = [name for name, _ in model.named_parameters()]
    head = "embed_out.weight" if "embed_out.weight" in names else head  # Pythia's name in older transformers
    assert head_parameters(model, names) == [head]
    assert head_parameters(nn.parallel.DataParallel(model), [f"module.{n}" for n in names]) == [f"module.{head}"]


def test_the_head_stays_where_it_is() -> None:
    model = hf_models.make("llama")
    seen = {}

    def margin_fn(module: nn.Module, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            seen.update({n: torch.equal(p, before[n]) for n, p in module.named_parameters()})
        return pair_logps(module, batch)

    before = weights_of(model)
    gapo.value_and_grad(margin_fn, gapo.GAPOConfig(rho=0.5), backend="torch")(model, hf_models.batch())
    assert seen.pop("lm_head.weight") is True
    assert not any(seen.values())


def test_frozen_parameters_are_left_out() -> None:
    model = hf_models.make("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    _, grads = take_step(model, hf_models.batch())
    assert grads
    assert all("layers.1" in name for name in grads)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter \(all are frozen\)"):
        take_step(model, hf_models.batch())


def test_lora_that_is_fresh_has_no_adaptive_anchor() -> None:
    model = hf_models.lora("llama")
    for adaptive, radius in ((True, 0.0), (False, 0.1)):
        result, grads = take_step(model, hf_models.batch(), rho=0.1, adaptive=adaptive)
        assert float(result.radius) == pytest.approx(radius, rel=1e-5)
        assert torch.isfinite(result.anchor_gaps).all()
        assert all("lora" in name for name in grads)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    result, _ = take_step(model, hf_models.batch(), rho=0.1)
    assert float(result.radius) == pytest.approx(0.1, rel=1e-5)


def test_tied_embeddings_are_one_parameter() -> None:
    model = hf_models.make("gpt2")  # tied: the head is the input embedding
    result, grads = take_step(model, hf_models.batch(), rho=0.2, perturb="all")
    assert "transformer.wte.weight" in grads
    assert "lm_head.weight" not in grads
    assert float(result.radius) == pytest.approx(0.2, rel=1e-4)


def test_margin_fn_without_a_gradient_is_an_error() -> None:
    def detached(module: nn.Module, batch: Any) -> Any:
        return tuple(x.detach() for x in pair_logps(module, batch))

    with pytest.raises(ValueError, match=r"outputs of margin_fn carry no gradient"):
        gapo.value_and_grad(detached, backend="torch")(hf_models.make("llama"), hf_models.batch())
    with pytest.raises(TypeError, match=r"params must be a torch.nn.Module for backend=\"torch\", got dict"):
        gapo.value_and_grad(detached, backend="torch")({}, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probs_in_chunks_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from gapo.backends.torch import token_logps as kernel

    monkeypatch.setitem(kernel._CHUNK, "cpu", 40)  # several chunks in a row, the last one shorter
    logits = torch.randn(2, 7, 13).to(dtype).requires_grad_()
    targets = torch.randint(0, 13, (2, 7))
    upstream = torch.randn(2, 7)
    found = kernel.token_logps(logits, targets)
    wide = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-2}
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-5)
    ours, expected = (torch.autograd.grad((x * upstream).sum(), logits, retain_graph=True)[0] for x in (found, wide))
    torch.testing.assert_close(ours, expected, **tolerance)
    torch.testing.assert_close(
        torch.func.grad(lambda x: kernel.token_logps(x, targets).sum())(logits.detach()),
        torch.autograd.grad(wide.sum(), logits)[0],
        **tolerance,
    )


def test_logits_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that log-probs of bfloat16 logits make is their gradient, in bfloat16."""
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                sizes.append(out.numel() * out.element_size())
            return out

    from gapo.backends.torch import token_logps as kernel

    monkeypatch.setitem(kernel._CHUNK, "cpu", 1000)
    logits = torch.randn(1, 120, 500, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 500, (1, 120))
    with Sizes():
        gapo.sequence_logps(logits, labels).sum().backward()
    assert max(sizes) == logits.numel() * 2
    monkeypatch.setattr(gapo.logps, "KERNELS", {})
    sizes.clear()
    with Sizes():
        gapo.sequence_logps(logits, labels).sum().backward()
    assert max(sizes) > logits.numel() * 2  # without the kernel there are float32 copies


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 3e30), (torch.float64, 3e300)])
def test_the_norm_neither_overflows_nor_vanishes(dtype: torch.dtype, large: float) -> None:
    for size in (large, 1 / large):
        x = torch.tensor([3.0, 4.0], dtype=dtype) * (size / 3)
        torch.testing.assert_close(TorchBackend().norm(x), torch.tensor(5 / 3 * size, dtype=dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [3e30, 1 / 3e30, 1.0])
def test_the_norm_of_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr("gapo.backends.torch.backend._BLOCK", 4)
    x = torch.randn(11) * size
    x[:5] = 0  # a block without anything
    for y in (x, x + size, x.expand(3, -1), x[::2]):
        expected = math.sqrt(sum(entry**2 for entry in y.double().flatten().tolist()))
        torch.testing.assert_close(TorchBackend().norm(y).item(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_several_blocks_move_as_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, adaptive: bool
) -> None:
    model, backend = nn.Linear(7, 5), TorchBackend()
    with torch.no_grad():
        model.weight[1, :3] = 0
    model, config = model.to(dtype), gapo.GAPOConfig(rho=0.3, adaptive=adaptive)
    theta = {name: p.double() for name, p in model.state_dict().items()}
    g = {name: torch.randn_like(p) for name, p in theta.items()}
    scale = {name: p.abs() if adaptive else torch.ones_like(p) for name, p in theta.items()}
    norm = sum(float(((scale[name] * g[name]) ** 2).sum()) for name in g) ** 0.5
    monkeypatch.setattr("gapo.backends.torch.backend._BLOCK", 4)
    parameters = dict(model.named_parameters())
    perturbation = Perturbation(
        SimpleNamespace(parameters=parameters), {n: x.to(dtype) for n, x in g.items()}, config, backend
    )
    moved = {name: perturbation.move(name, p.detach()) for name, p in parameters.items()}
    applied = {name: x.double() - theta[name] for name, x in moved.items()}
    for name, x in moved.items():
        assert x.dtype == dtype
        expected = theta[name] + 0.3 * scale[name] ** 2 * g[name] / norm
        torch.testing.assert_close(x.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    radius, changed = perturbation.applied()
    unscaled = sum(float(torch.where(x == 0, x, x / scale[name]).square().sum()) for name, x in applied.items()) ** 0.5
    assert float(radius) == pytest.approx(unscaled, rel=1e-4)
    assert float(changed) == pytest.approx(sum(int((x != 0).sum()) for x in applied.values()) / 40)


def test_gaussian_draws_follow_the_global_seed_and_the_dtype() -> None:
    parameters = {str(dtype): torch.zeros(4, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}

    def draw() -> dict[str, torch.Tensor]:
        return TorchBackend().normal(list(parameters), parameters, None)

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    again = draw()
    for name, x in first.items():
        assert x.dtype == (torch.float64 if name == "torch.float64" else torch.float32)
        assert torch.equal(again[name], x)
        assert not torch.equal(second[name], x)


def test_the_core_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(gapo.loss, fullgraph=True, backend="eager")
    logps = [torch.randn(4) for _ in range(4)]
    torch.testing.assert_close(compiled(*logps), gapo.loss(*logps))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu() -> None:
    model = hf_models.make("llama")
    batch = hf_models.batch()
    here = take_step(model, batch, rho=0.3)[0].anchor_gaps
    there = take_step(model.cuda(), {k: v.cuda() for k, v in batch.items()}, rho=0.3)[0].anchor_gaps
    torch.testing.assert_close(here, there.cpu(), rtol=1e-3, atol=1e-4)


class Wrapper(nn.Module):
    """A module around another one, as DDP is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def forwards_through(wrapper: nn.Module, objective: str) -> list[bool]:
    """For each forward of a training step, in order, whether it went through the wrapper."""
    through: list[bool] = []

    def margin_fn(module: nn.Module, batch: Any) -> Any:
        through.append(module is wrapper)
        return pair_logps(module, batch)

    config, backend = gapo.GAPOConfig(anchor="exact", rho=0.3), TorchBackend()
    loss = resolve(objective, config)
    forward = backend.forward(
        margin_fn, wrapper.module, hf_models.batch(), config, anchor=loss.needs_anchor, by_side=True, wrapper=wrapper
    )
    result, cotangents = run(forward, config, backend, loss=loss)
    forward.as_loss(result.loss, cotangents).backward()
    return through


def test_the_updates_forward_alone_goes_through_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP prepares its reduction in it. DeepSpeed's engine would take a probe's backward for the update's."""
    wrapper = Wrapper(hf_models.make("llama"))
    assert forwards_through(wrapper, "simpo") == [True]
    clean, *others = forwards_through(wrapper, "gapo")
    assert clean
    assert others
    assert not any(others)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(DeepSpeedEngine=Wrapper))
    assert forwards_through(wrapper, "simpo") == [True]
    assert not any(forwards_through(wrapper, "gapo"))


def test_zero3_is_chosen_by_the_backend_where_its_engine_is_known() -> None:
    model, backend = nn.Linear(1, 1), TorchBackend()
    model.weight.ds_tensor = torch.empty(1)
    with pytest.raises(ValueError, match=r"DeepSpeed has partitioned the parameters \(ZeRO-3\)"):
        backend.forward(pair_logps, model, {}, gapo.GAPOConfig())
    with pytest.raises(ValueError, match=r'anchor="first_order" is not supported under DeepSpeed ZeRO-3'):
        backend.forward(pair_logps, model, {}, gapo.GAPOConfig(anchor="first_order"), wrapper=Wrapper(model))


@pytest.mark.parametrize(("settings", "forwards"), [({}, 1), ({"anchor": "exact"}, 2), ({"rho": 0.1}, 2)])
def test_rho_zero_takes_no_forward_for_the_anchor(settings: dict[str, Any], forwards: int) -> None:
    """By hand: an anchor that is the policy has the policy's margins."""
    calls = []

    def margin_fn(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))
        return module(batch)[:, 0]

    torch.manual_seed(0)
    step = gapo.value_and_grad(margin_fn, gapo.GAPOConfig(**{"rho": 0.0, **settings}), backend="torch")
    result, _ = step(torch.nn.Linear(3, 1), torch.randn(4, 3))
    assert len(calls) == forwards
    if "rho" not in settings:
        assert torch.equal(result.anchor_margins, result.margins)
        assert [float(x) for x in (result.radius, result.changed_fraction, result.first_order_ratio)] == [0, 0, 1]
