"""The one-pass step against the two-pass one: the same numbers on every layer, the slower way where it does not fit."""

from __future__ import annotations

import gc
import logging
import re
from typing import Any

import hf_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, OneMoreRMSNorm, Output
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gapo
from gapo.adapters.hf.margins import pair_logps
from gapo.backends import get_backend
from gapo.backends.base import by_pairs
from gapo.backends.torch import OnePassForward, TorchBackend
from gapo.backends.torch.pairgrads.parts import Explicit, Outer
from gapo.backends.torch.pairgrads.rules import rule_for
from gapo.step import run


def both(model: nn.Module, batch: Any, fn: Any = pair_logps, **options: Any) -> tuple[Any, Any]:
    """(result, gradients) of the one-pass and of the two-pass step; the one-pass one at its second step."""
    steps = [
        gapo.value_and_grad(fn, gapo.GAPOConfig(**{"rho": 0.3, **options}), backend="torch", one_pass=one_pass)
        for one_pass in (True, False)
    ]
    steps[0](model, batch)
    return steps[0](model, batch), steps[1](model, batch)


def assert_same(found: Any, expected: Any, tol: float = 1e-9) -> None:
    (result, grads), (other, others) = found, expected
    for name in ("loss", "margins", "anchor_gaps", "weights", "grad_norm", "radius"):
        torch.testing.assert_close(getattr(result, name), getattr(other, name), rtol=tol, atol=tol)
    assert set(grads) == set(others)
    for name, g in others.items():
        assert float((grads[name].double() - g.double()).norm()) <= tol * (1 + float(g.double().norm())), name


def backwards_of(model: Any, batch: Any, fn: Any = pair_logps, **options: Any) -> float:
    """How often the backward comes through a layer for each clean forward of it: 1 in one pass."""
    step = gapo.value_and_grad(fn, gapo.GAPOConfig(**options), backend="torch")
    step(model, batch)
    layer, forwards, backwards = model.downs[0], [], []
    handles = [
        layer.register_forward_hook(lambda *_: forwards.append(1) if torch.is_grad_enabled() else None),
        layer.register_full_backward_hook(lambda *_: backwards.append(1)),
    ]
    step(model, batch)
    for handle in handles:
        handle.remove()
    return len(backwards) / len(forwards)


@settings(max_examples=25)
@given(
    depth=st.integers(0, 3),
    width=st.sampled_from([4, 8, 12]),
    tied=st.booleans(),
    bias=st.booleans(),
    norm=st.sampled_from(["rms", "layer", "layer-plain", "gemma"]),
    pairs=st.integers(1, 4),
    seed=st.integers(0, 99),
    side=st.sampled_from(["left", "right"]),
    anchor=st.sampled_from(["exact", "first_order"]),
    perturb=st.sampled_from(["backbone", "all"]),
    frozen=st.booleans(),
)
def test_equals_the_two_pass_step(depth, width, tied, bias, norm, pairs, seed, side, anchor, perturb, frozen):
    torch.manual_seed(seed)
    model = Net(depth=depth, width=width, tied=tied, bias=bias, norm=norm).double()
    perturb = "all" if tied and depth == 0 else perturb  # else nothing is left to perturb
    if frozen and depth > 1:
        model.norms.requires_grad_(False)
        model.ups[0].requires_grad_(False)
    batch = hf_models.batch(pairs, seed=seed, side=side)
    assert_same(*both(model, batch, anchor=anchor, perturb=perturb))


@pytest.mark.parametrize("kind", [*hf_models.KINDS, "lora"])
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_models_people_tune(kind: str, anchor: str) -> None:
    model = (hf_models.lora("llama") if kind == "lora" else hf_models.make(kind)).double()
    # Llama's norm computes in float32 whatever the weights are.
    tol = 1e-6 if kind in ("llama", "lora") else 1e-9
    assert_same(*both(model, hf_models.batch(), anchor=anchor, adaptive=kind != "lora"), tol)


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_bfloat16_is_the_same_within_rounding(anchor: str) -> None:
    model = Net(depth=2).to(torch.bfloat16)
    (result, grads), (other, others) = both(model, hf_models.batch(), anchor=anchor, rho=2.0)
    torch.testing.assert_close(result.anchor_gaps, other.anchor_gaps, rtol=0.1, atol=0.05)
    flat = [torch.cat([g[n].float().ravel() for n in others]) for g in (grads, others)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 0.05
    assert all(g.dtype == torch.bfloat16 for g in grads.values())


def test_first_order_propagates_once_and_forwards_once() -> None:
    model = Net(depth=2)
    assert backwards_of(model, hf_models.batch()) == 1


def test_both_forms_of_a_matrix_gradient() -> None:
    for tokens, form in ((1, Outer), (50, Explicit)):
        for layer in (nn.Linear(5, 7).double(), Conv1D(7, 5).double()):
            a = torch.randn(2, 3, tokens, 5, dtype=torch.float64)
            g = torch.randn(2, 3, tokens, 7, dtype=torch.float64)
            part = dict(rule_for(layer).grads(layer, a, g))["weight"]
            assert isinstance(part, Outer)
            assert isinstance(part.smaller(), form)
            weights, delta = torch.randn(3).double(), torch.randn_like(layer.weight)
            out = layer(a)
            by_pair = [torch.autograd.grad(out[:, i], layer.weight, g[:, i], retain_graph=True)[0] for i in range(3)]
            total = sum(w * d for w, d in zip(weights, by_pair, strict=True))
            along = torch.stack([(d * delta).sum() for d in by_pair])
            for kept in (part, part.smaller()):
                torch.testing.assert_close(kept.weighted(weights), total)
                torch.testing.assert_close(kept.along(delta), along)


def kept_of_head(perturb: str) -> Any:
    """The form in which a step keeps the gradients by the head's matrix, before the update."""
    config = gapo.GAPOConfig(anchor="first_order", perturb=perturb)
    long = {name: x.repeat(1, 8) for name, x in hf_models.batch().items()}  # N gradients are fewer numbers
    backend: Any = get_backend("torch")
    forward = backend.forward(pair_logps, hf_models.make("llama"), long, config)
    run(forward, config, backend)
    return forward._grads.parts["lm_head.weight"][0][1]


def test_no_gradients_by_pair_of_a_head_that_no_probe_asks_for() -> None:
    assert isinstance(kept_of_head("backbone"), Outer)
    assert isinstance(kept_of_head("all"), Explicit)


def with_bias(layer: nn.Module) -> nn.Module:
    layer.bias = nn.Parameter(torch.zeros(2))
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        type("Odd", (nn.Linear,), {})(2, 2),  # a subclass may compute something else
        type("Odd", (nn.LayerNorm,), {})(2),
        type("Conv1D", (nn.Linear,), {})(2, 2, bias=False),
        nn.Conv1d(2, 2, 1),
        nn.Embedding(2, 2, max_norm=1.0),
        nn.Embedding(2, 2, scale_grad_by_freq=True),
        nn.Embedding(2, 2, sparse=True),
        nn.LayerNorm((2, 2)),
        nn.RMSNorm((2, 2)),
        with_bias(nn.RMSNorm(2)),
    ],
    ids=repr,
)
def test_no_rule_stands_for_what_it_does_not_fit(layer: nn.Module) -> None:
    assert rule_for(layer) is None


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(2, 2),
        nn.Embedding(2, 2, padding_idx=0),
        Conv1D(2, 2),
        nn.LayerNorm(2),
        nn.LayerNorm(2, bias=False),
        nn.RMSNorm(2),
        OneMoreRMSNorm(2),
    ],
    ids=repr,
)
def test_a_rule_stands_for_what_it_fits(layer: nn.Module) -> None:
    assert rule_for(layer) is not None


def test_padding_of_zeros_hides_no_offset_of_a_norm() -> None:
    model, batch = Net(norm="gemma").double(), hf_models.batch(side="left")
    assert batch["chosen_input_ids"][0, 0] == 0
    with torch.no_grad():
        model.embed.weight[0] = 0
    assert_same(*both(model, batch))


def test_a_norms_bias_that_was_zero_at_first_is_no_offset() -> None:
    model, batch = Net(norm="layer").double(), hf_models.batch()
    with torch.no_grad():
        model.norms[0].bias.zero_()
    gapo.value_and_grad(pair_logps, backend="torch")(model, batch)
    with torch.no_grad():
        model.norms[0].bias.normal_()
    assert_same(*both(model, batch))


def test_attention_projects_by_the_rule_of_linear_layers() -> None:
    assert rule_for(nn.MultiheadAttention(2, 1).out_proj) == rule_for(nn.Linear(2, 2))


class Scale(nn.Module):
    """A layer of a type that no rule knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Untold(Net):
    """Uses the embedding's weight without its layer: a layer's hook does not see that."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return Output(nn.functional.linear(self.hidden(input_ids), self.embed.weight) + 0 * self.lm_head.weight.sum())


class Mixing(Net):
    """Normalises over the batch: pairs interact."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.BatchNorm1d(8)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.mix(super().hidden(ids).mT).mT


class Flat(Net):
    """Flattens tokens in front of a layer, as experts do."""

    def hidden(self, ids: Tensor) -> Tensor:
        x = super().hidden(ids)
        return self.norms[0](x.flatten(0, 1)).unflatten(0, ids.shape)


class Packed(Net):
    """Flattens some tokens only, as code that leaves padding out does: whose they are cannot be told."""

    def hidden(self, ids: Tensor) -> Tensor:
        x = super().hidden(ids)
        return torch.cat([self.norms[0](x[:, :5].flatten(0, 1)).unflatten(0, (len(ids), 5)), x[:, 5:]], 1)


class TimeFirst(Net):
    """Puts tokens before rows, as recurrent layers do."""

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(0, 1)
        return (x + self.downs[0](torch.tanh(self.ups[0](x)))).transpose(0, 1)


class ByKeyword(Net):
    """Calls a layer by keyword, which rules do not know."""

    def hidden(self, ids: Tensor) -> Tensor:
        return self.norms[0](x=super().hidden(ids))


class GatedRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class Gated(Net):
    """Calls a norm with a second input, which its rule knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = GatedRMSNorm(8)

    def hidden(self, ids: Tensor) -> Tensor:
        x = super().hidden(ids)
        return self.gated(x, torch.sigmoid(x))


def unknown() -> nn.Module:
    model = Net()
    model.norms[0] = Scale(8)
    return model


@pytest.mark.parametrize("make", [unknown, ByKeyword, Gated, Flat])
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_layers_that_no_rule_stands_for_run_again(make: Any, anchor: str) -> None:
    model, batch = make().double(), hf_models.batch()
    assert_same(*both(model, batch, anchor=anchor))
    assert_same(*both(model, batch, anchor=anchor, sft_weight=0.5))
    assert backwards_of(model, batch) == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Untold, "lm_head.weight is used outside of its layer too"),
        (Mixing, "BatchNorm1d mixes the rows of a batch"),
        (Packed, "RMSNorm receives (30, 8): its first axis is not the rows of 3 groups"),
        (TimeFirst, "Linear receives (11, 6, 8): its first axis is not the rows of 3 groups"),
    ],
)
def test_the_slower_way_where_it_does_not_fit(make: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = make().double(), hf_models.batch()
    for anchor in ("exact", "first_order"):
        with caplog.at_level(logging.WARNING, logger="gapo"):
            assert_same(*both(model, batch, anchor=anchor))
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 2, warnings  # one for each step function
    assert all(reason in warning for warning in warnings)
    assert backwards_of(model, batch) == 2


class InPlace(Net):
    """Writes to what its layers gave, where autograd allows it."""

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x += 0.5
        x[:, 0] = 0
        y = self.downs[0](nn.functional.relu(self.ups[0](self.norms[0](x)), inplace=True))
        y += x
        return y


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_a_model_that_writes_to_what_its_layers_gave(anchor: str) -> None:
    model, batch = InPlace().double(), hf_models.batch()
    assert_same(*both(model, batch, anchor=anchor))
    assert TorchBackend().forward(pair_logps, model, batch, gapo.GAPOConfig()).one_pass


def side_logps(model: Any, batch: Any, side: str) -> Tensor:
    logits = model(batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]).logits
    logps: Tensor = gapo.sequence_logps(logits, batch[f"{side}_labels"])
    return logps


def separate(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Chosen and rejected answers in a forward each."""
    return side_logps(model, batch, "chosen"), side_logps(model, batch, "rejected")


def interleaved(model: Any, batch: Any) -> Tensor:
    """Rows chosen 0, rejected 0, chosen 1, ...: not the order that is assumed."""
    ids, mask, labels = (
        torch.stack([batch[f"{side}_{part}"] for side in ("chosen", "rejected")], 1).flatten(0, 1)
        for part in ("input_ids", "attention_mask", "labels")
    )
    logps = gapo.sequence_logps(model(ids, mask).logits, labels)
    return logps[::2] - logps[1::2]


@pytest.mark.parametrize(("fn", "backwards"), [(separate, 1), (interleaved, 2)])
@pytest.mark.parametrize("probe", ["loss", "margin"])
def test_margin_functions_of_ones_own(fn: Any, backwards: int, probe: str) -> None:
    model, batch = Net().double(), hf_models.batch()
    assert_same(*both(model, batch, fn, anchor="first_order", probe=probe))
    assert backwards_of(model, batch, fn) == backwards


@pytest.mark.parametrize(("fn", "backwards"), [(separate, 1), (interleaved, 5)])  # 5: probe, three pairs, update
def test_bfloat16_may_differ_by_its_rounding_alone(fn: Any, backwards: int) -> None:
    model = Net(depth=2).to(torch.bfloat16)
    assert backwards_of(model, hf_models.batch(), fn, anchor="first_order") == backwards


def test_small_margins_are_compared_once() -> None:
    assert backwards_of(Net(), hf_models.batch(), lambda model, b: [1e-3 * x for x in separate(model, b)]) == 1


@pytest.mark.parametrize("fn", [separate, interleaved])
def test_what_is_spent_is_let_go(fn: Any) -> None:
    model = Net()
    forward = TorchBackend().forward(fn, model, hf_models.batch(), gapo.GAPOConfig())
    assert isinstance(forward, OnePassForward)
    cotangents = [torch.ones_like(output) for output in forward.outputs]
    forward.pullback(cotangents, ["lm_head.weight"])
    assert (forward._grads is not None) == (fn is separate)
    forward.pullback(cotangents)
    assert forward._grads is None or not forward._grads.parts


def test_a_hundredth_in_a_wrong_order_is_found(caplog: pytest.LogCaptureFixture) -> None:
    def fn(model: Any, batch: Any) -> Tensor:  # small, so that a threshold must be relative
        chosen, rejected = separate(model, batch)
        return 1e-3 * (chosen - rejected + 0.01 * interleaved(model, batch))

    with caplog.at_level(logging.WARNING, logger="gapo"):
        assert_same(*both(Net().double(), hf_models.batch(), fn), tol=1e-12)
    assert re.search(r"its gradients differ from autograd's by 0\.[1-9]%", caplog.text)


def test_a_first_step_without_a_gradient_proves_nothing() -> None:
    model, batch = Net().double(), hf_models.batch()

    def fn(model: Any, batch: Any) -> Tensor:
        return scale * interleaved(model, batch)

    one, two = (gapo.value_and_grad(fn, backend="torch", one_pass=one_pass) for one_pass in (True, False))
    scale = 0.0
    one(model, batch)
    scale = 1.0
    assert_same(one(model, batch), two(model, batch))


def test_a_declaration_is_asked_like_everything_else() -> None:
    batch = hf_models.batch()
    wrong = by_pairs(lambda model, b: interleaved(model, b))
    assert_same(*both(Net().double(), batch, wrong, anchor="first_order"))
    assert_same(*both(Untold().double(), batch, pair_logps))


def test_nothing_stays_behind() -> None:
    def forwards() -> list[OnePassForward]:
        gc.collect()
        return [x for x in gc.get_objects() if type(x) is OnePassForward]

    before = forwards()  # of tests before this one, kept by the tracebacks of errors they expected
    model, batch = Net(depth=2), hf_models.batch()
    gapo.value_and_grad(pair_logps, backend="torch")(model, batch)
    fails = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(perturb="nowhere"), backend="torch")
    with pytest.raises(ValueError, match="selects none"):
        fails(model, batch)
    gc.collect()
    assert all(not m._forward_hooks for m in model.modules())
    gapo.value_and_grad(interleaved, backend="torch")(model, batch)  # which gives up
    with pytest.raises(KeyError):
        gapo.value_and_grad(pair_logps, backend="torch")(model, {})
    assert len(forwards()) == len(before)
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("one_pass", [True, False])
def test_the_loss_of_training_loops_has_the_pullbacks_gradient(one_pass: bool) -> None:
    model, batch, config = Net().double(), hf_models.batch(), gapo.GAPOConfig()
    forwards = [TorchBackend(one_pass).forward(pair_logps, model, batch, config) for _ in range(2)]
    cotangents = [torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64) * sign for sign in (1, -1)]
    for forward in forwards:
        forward.pullback(cotangents, ["lm_head.weight"])  # the probe
    loss = forwards[0].as_loss(torch.tensor(7.0, dtype=torch.float64), cotangents)
    (3 * loss).backward()
    assert float(loss.detach()) == 7
    for name, g in forwards[1].pullback(cotangents).items():
        torch.testing.assert_close(model.get_parameter(name).grad, 3 * g)


@pytest.mark.parametrize("one_pass", [True, False])
def test_a_parameter_that_is_not_used_gets_zeros(one_pass: bool) -> None:
    model = Net()
    model.spare = nn.Linear(2, 2)
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(perturb="all"), backend="torch", one_pass=one_pass)
    result, grads = step(model, hf_models.batch())
    assert torch.equal(grads["spare.weight"], torch.zeros(2, 2))
    assert bool(result.anchor_gaps.isfinite().all())


def rejected_first(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """A forward for each side, in an order that is not assumed."""
    rejected = side_logps(model, batch, "rejected")
    return side_logps(model, batch, "chosen"), rejected


@pytest.mark.parametrize("fn", [pair_logps, separate, rejected_first])
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_sft_weighs_the_rows_of_a_pair_apart(fn: Any, anchor: str) -> None:
    model, batch = Net(depth=2).double(), hf_models.batch()
    assert_same(*both(model, batch, fn, sft_weight=0.5, anchor=anchor))
    assert (backwards_of(model, batch, fn, sft_weight=0.5) == 1) == (fn is not rejected_first)


def test_float16_takes_the_two_pass_step() -> None:
    backend, batch = TorchBackend(), hf_models.batch()
    with torch.autocast("cpu", dtype=torch.float16):
        forward = backend.forward(pair_logps, Net(), batch, gapo.GAPOConfig())
    assert not isinstance(forward, OnePassForward)


@pytest.mark.parametrize("name", ["embed", "norms.0", "ups.0", "downs.0"])
def test_hooks_of_others_on_a_layer(name: str) -> None:
    model, calls = Net().double(), []

    def double(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return 2 * output.tanh()

    model.get_submodule(name).register_forward_hook(double)
    assert_same(*both(model, hf_models.batch()))
    assert len(calls) == 6  # of three steps, a clean and an anchor forward each
