"""The anchor forward from the cut: the same numbers as from the whole forward, without the layers below."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from torch import nn

import gapo
from gapo.adapters.hf.margins import pair_logps
from gapo.backends.torch import TorchBackend
from gapo.backends.torch import cut as cut_module
from gapo.backends.torch import forward as forward_module
from gapo.backends.torch.cut import cut_below
from gapo.backends.torch.pairgrads import Verdicts

LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "pythia": "gpt_neox.layers", "lora": "model.layers"}
BOTH = ("chosen", "rejected")


def step_of(model: nn.Module, fn: Any = pair_logps, seed: int = 0, **options: Any) -> gapo.StepResult:
    config = gapo.GAPOConfig(**{"rho": 0.5, "last_layers": 1, **options})
    torch.manual_seed(seed)
    forward = BACKENDS[-1].forward(fn, model, hf_models.batch(), config)
    return gapo.step.run(forward, config, BACKENDS[-1])[0]


BACKENDS: list[TorchBackend] = []


@pytest.fixture(autouse=True)
def _a_backend_for_each_test() -> None:
    BACKENDS[:] = [TorchBackend()]


def whole(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> gapo.StepResult:
    with monkeypatch.context() as patch:
        patch.setattr(forward_module, "cut_below", lambda *_: None)
        return step_of(*args, **options)


def anchor_calls(model: nn.Module, **options: Any) -> Counter[str]:
    """How often each layer computes in the anchor forward of one step: by its first submodule with weights."""
    calls: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(
            lambda *_, name=name: None if torch.is_grad_enabled() else calls.update([name.split(".mlp")[0]])
        )
        for name, module in model.named_modules()
        if name.endswith(".mlp")
    ]
    step_of(model, **options)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("kind", LAYERS)
def test_anchor_starts_at_the_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_models.lora("llama") if kind == "lora" else hf_models.make(kind)
    expected = whole(monkeypatch, model, adaptive=kind != "lora")
    first = anchor_calls(model, adaptive=kind != "lora")  # runs both, and compares
    again = anchor_calls(model, adaptive=kind != "lora")
    assert [sum(n for name, n in first.items() if name.endswith(f"{LAYERS[kind]}.{i}")) for i in (0, 1)] == [1, 2]
    assert [sum(n for name, n in again.items() if name.endswith(f"{LAYERS[kind]}.{i}")) for i in (0, 1)] == [0, 1]
    result = step_of(model, adaptive=kind != "lora")
    assert float(result.anchor_gaps.abs().max()) > 1e-4
    assert torch.equal(result.anchor_gaps, expected.anchor_gaps)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_dropout_above_the_cut_draws_the_same_masks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_models.make(kind, dropout=0.3, layers=3).train()
    step_of(model)
    assert torch.equal(step_of(model, seed=1).anchor_gaps, whole(monkeypatch, model, seed=1).anchor_gaps)
    calls = anchor_calls(model)
    assert calls[f"{LAYERS[kind]}.0"] == calls[f"{LAYERS[kind]}.1"] == 0


def test_a_layers_own_forward_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as accelerate's, which stands at the instance."""
    model = hf_models.make("llama")
    expected = whole(monkeypatch, model)
    layer, plain = model.model.layers[0], model.model.layers[0].forward
    layer.forward = own = lambda *args, **kwargs: plain(*args, **kwargs)
    for _ in range(2):
        assert torch.equal(step_of(model).anchor_gaps, expected.anchor_gaps)
        assert layer.forward is own


class Tuples(nn.Module):
    """Layers that return more than a hidden state, as those of older models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(hf_models.VOCAB, 8)
        self.layers = nn.ModuleList(Tuple(8, 8) for _ in range(3))
        self.lm_head = nn.Linear(8, hf_models.VOCAB)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            x, rest = layer(x)
            assert rest[1] is None
        return SimpleNamespace(logits=self.lm_head(x))


class Tuple(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        y = x + torch.tanh(super().forward(x))
        return y, [2 * y, None]


def test_layers_that_return_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Tuples()
    kept: list[Any] = []
    plain = cut_module._detached
    monkeypatch.setattr(cut_module, "_detached", lambda output: kept.append(plain(output)) or kept[-1])
    step_of(model)
    kept.clear()
    assert torch.equal(step_of(model).anchor_gaps, whole(monkeypatch, model).anchor_gaps)
    (x, (doubled, none)) = next(output for output in kept if isinstance(output, tuple))
    assert none is None
    assert not x.requires_grad  # else the whole graph of the clean forward would live on
    assert not doubled.requires_grad


def test_checkpointed_layers_and_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(module: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        """Chosen and rejected answers in a forward each."""
        answers = (
            {
                f"{other}_{name.partition('_')[2]}": x
                for name, x in batch.items()
                if name.startswith(answer)
                for other in BOTH
            }
            for answer in BOTH
        )
        return tuple(pair_logps(module, rows)[0] for rows in answers)

    model = hf_models.make("llama", dropout=0.3).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step_of(model, one_by_one)
    expected = whole(monkeypatch, model, one_by_one)
    assert torch.equal(step_of(model, one_by_one).anchor_gaps, expected.anchor_gaps)
    assert anchor_calls(model, fn=one_by_one)["model.layers.0"] == 0


def test_a_way_around_the_cut_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, skip = hf_models.make("llama"), {}
    model.model.layers[0].self_attn.register_forward_hook(lambda m, args, output: skip.update(x=output[0]))
    model.model.norm.register_forward_hook(lambda m, args, output: output + skip.pop("x", torch.zeros(())))
    expected = whole(monkeypatch, model)
    with caplog.at_level(logging.WARNING, logger="gapo"):
        assert torch.equal(step_of(model).anchor_gaps, expected.anchor_gaps)
        assert torch.equal(step_of(model).anchor_gaps, expected.anchor_gaps)
    assert caplog.text.count("something besides model.layers.0 passes the cut") == 1


def test_layers_return_after_an_exception() -> None:
    model = hf_models.make("llama")
    step_of(model)

    def fails(module: nn.Module, batch: Any) -> Any:
        outputs = pair_logps(module, batch)
        if not torch.is_grad_enabled():
            raise KeyboardInterrupt
        return outputs

    with pytest.raises(KeyboardInterrupt):
        step_of(model, fails)
    assert all("forward" not in vars(module) for module in model.modules())


def test_no_cut_where_the_first_layer_moves() -> None:
    model = hf_models.make("llama")
    names = [name for name, _ in model.named_parameters()]
    assert cut_below(model, names, Verdicts()) is None
    assert cut_below(model, [name for name in names if ".layers." in name], Verdicts()) is None
    assert cut_below(model, ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"], Verdicts()) is None
    assert cut_below(model, ["model.layers.1.mlp.up_proj.weight"], Verdicts()) is not None
