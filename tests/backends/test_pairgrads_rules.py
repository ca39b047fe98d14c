"""Rules for layers of models people tune: each pair's gradient is autograd's, by one backward for each pair."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from gapo.backends.torch.pairgrads import Refused, Tape, Verdicts, tape
from gapo.backends.torch.pairgrads.rules import rule_for

VOCAB, PAIRS = 31, 3
SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
# Class of the configuration, and what is its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaConfig", WIDE),
    "gemma2": ("Gemma2Config", WIDE),
    "gemma3": ("Gemma3TextConfig", WIDE),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    "falcon": ("FalconConfig", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "bias": True}),
    "falcon-new": (
        "FalconConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "new_decoder_architecture": True,
        },
    ),
    "cohere": ("CohereConfig", {**WIDE, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", WIDE),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 8,
            "max_position_embeddings": 20,
            "dropout": 0.0,
        },
    ),
    "biogpt": (
        "BioGptConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 20,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "nemotron": ("NemotronConfig", WIDE),
    "mixtral": ("MixtralConfig", {**WIDE, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "qwen3-moe": ("Qwen3MoeConfig", {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **WIDE,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        {
            **WIDE,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "gpt-oss": ("GptOssConfig", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
EAGER = ("gemma2", "gpt-oss")  # their attention gives NaN for padding on the left in float64
# Layers that have no rule, and run again.
LOCAL = {
    "mixtral": {"MixtralTopKRouter"},
    "qwen2-moe": {"Qwen2MoeTopKRouter"},
    "qwen3-moe": {"Qwen3MoeTopKRouter"},
    "gpt-oss": {"GptOssTopKRouter", "GptOssAttention"},
    "deepseek-v3": {"DeepseekV3TopkRouter"},
    "qwen3.5": {"Qwen3_5GatedDeltaNet", "Qwen3_5RMSNormGated"},
}


def make(kind: str, **further: Any) -> Any:
    torch.manual_seed(0)
    name, own = MODELS[kind]
    config = getattr(transformers, name)(**SIZES, **own, **further)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config._experts_implementation = "eager"  # the others do not take float64
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double().eval()


def batch(side: str) -> tuple[Tensor, Tensor]:
    """Ids (2N, seq), chosen rows first, and their mask; token 0 is padding, and some rows hold it as a token too."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (2 * PAIRS, 7), generator=random)
    mask = torch.ones_like(ids)
    for row, padded in enumerate((0, 2, 1, 3, 0, 1)):
        columns = slice(0, padded) if side == "left" else slice(7 - padded, 7)
        ids[row, columns], mask[row, columns] = 0, 0
    return ids, mask


def margins(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logps = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, ids[:, 1:, None])[..., 0]
    rows = (logps * mask[:, 1:]).sum(1)
    return rows[:PAIRS] - rows[PAIRS:]


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Types of the layers that were run again for want of a rule."""
    kinds: set[str] = set()
    run = tape.local_vjp

    def noted(call: Any, *args: Any) -> Any:
        kinds.add(call.snapshot.kind)
        return run(call, *args)

    monkeypatch.setattr(tape, "local_vjp", noted)
    return kinds


def assert_autograds(model: Any, side: str, tol: float) -> None:
    ids, mask = batch(side)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outputs = margins(model, ids, mask)
    expected = [
        torch.autograd.grad(outputs[i], list(parameters.values()), retain_graph=True, materialize_grads=True)
        for i in range(PAIRS)
    ]
    with Tape(model, PAIRS, blocks=2) as recorder:
        outputs = margins(model, ids, mask)
    grads = recorder.backward(outputs)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    for j, name in enumerate(parameters):
        size = 1e-3 + max(float(row[j].norm()) for row in expected)
        for i in range(PAIRS):
            weights = torch.eye(PAIRS, dtype=torch.float64)[i]
            error = float((grads.weighted(weights, [name])[name] - expected[i][j]).norm())
            assert error <= tol * size, (name, i, error, size)
        along = grads.along(lambda n, _: direction[n], [name])
        by_hand = torch.stack([(row[j] * direction[name]).sum() for row in expected])
        assert float((along - by_hand).norm()) <= tol * size * float(direction[name].norm()), name


# Rules for experts, and for DoRA, fit these versions. Before them such a layer runs again, and gives the same gradient.
HAVE_RULES = Version(transformers.__version__) >= Version("5.19") and Version(version("peft")) >= Version("0.19")
needs_rules = pytest.mark.skipif(not HAVE_RULES, reason="before transformers 5.19 and PEFT 0.19 these layers run again")


def assert_rerun(rerun: set[str], local: set[str]) -> None:
    """The layers without a rule, as far as the libraries' versions have the layers that the rules are for."""
    assert rerun == local or (not HAVE_RULES and rerun >= local)


SIDES = [(kind, side) for kind in MODELS for side in ("left", "right") if side == "right" or kind not in EAGER]


@pytest.mark.parametrize(("kind", "side"), SIDES)
def test_each_pairs_gradient_is_autograds(kind: str, side: str, rerun: set[str]) -> None:
    model = make(kind)
    assert_autograds(model, side, tol=1e-5)
    assert_rerun(rerun, LOCAL.get(kind, set()))


@pytest.mark.parametrize("kind", ["gemma3", "mixtral"])
def test_under_checkpointing(kind: str, rerun: set[str]) -> None:
    model = make(kind).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_autograds(model, "right", tol=1e-5)
    assert_rerun(rerun, LOCAL.get(kind, set()))


def test_a_layer_that_stands_twice_in_the_model(rerun: set[str]) -> None:
    model = make("mixtral")
    model.model.layers[1] = model.model.layers[0]
    assert_autograds(model, "right", tol=1e-5)
    assert_rerun(rerun, LOCAL["mixtral"])


PARTS = {
    "mixtral": ("down_proj", "model.norm.weight"),
    "gpt-oss": ("gate_up_proj_bias", "model.norm.weight"),
    "nemotron": ("norm.bias",),
    "cohere": ("q_norm.weight",),
}


@pytest.mark.parametrize("kind", list(PARTS))
def test_some_parameters_alone(kind: str, rerun: set[str]) -> None:
    model = make(kind)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(PARTS[kind]))
    assert_autograds(model, "right", tol=1e-5)
    assert_rerun(rerun, set())


@pytest.mark.parametrize("kind", ["gemma3", "cohere", "nemotron", "opt", "mixtral"])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits_keep_the_rules(kind: str, autocast: bool, rerun: set[str]) -> None:
    model = make(kind).to(torch.float32 if autocast else torch.bfloat16)
    model.config._experts_implementation = "grouped_mm"
    with Tape(model, PAIRS, blocks=2) as recorder, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = margins(model, *batch("right"))
    recorder.backward(outputs)  # compares with autograd's
    assert_rerun(rerun, LOCAL.get(kind, set()))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_way_to_compute_experts(implementation: str, rerun: set[str]) -> None:
    model = make("qwen3-moe").float()
    model.config._experts_implementation = implementation
    assert_autograds(model, "right", tol=1e-4)
    assert_rerun(rerun, LOCAL["qwen3-moe"])


def dora(dropout: float = 0.0, bias: bool = False) -> Any:
    peft = pytest.importorskip("peft")
    own = {**SIZES, **WIDE, "attention_bias": bias}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**own))
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data *= 1 + 0.3 * torch.randn_like(p)
            p.data[1] = 0  # no factor of what the layer gave
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_magnitudes_of_dora(bias: bool, rerun: set[str]) -> None:
    assert_autograds(dora(bias=bias), "right", tol=1e-5)
    assert_rerun(rerun, set())


def test_dora_behind_dropout(rerun: set[str]) -> None:
    model = dora(dropout=0.5).train()
    # The same draw for each forward: the oracle's and the tape's.
    handle = model.register_forward_pre_hook(lambda *_: torch.manual_seed(3) and None)
    assert_autograds(model, "right", tol=1e-5)
    handle.remove()
    assert_rerun(rerun, set())


def experts(index: Tensor, kind: str = "mixtral") -> tuple[Any, tuple[Tensor, ...], Tensor]:
    """Experts, what they are called with, and what they give."""
    layer = make(kind).model.layers[0].mlp.experts
    inputs = (torch.randn(len(index), 16).double(), index, torch.rand(index.shape).double())
    return layer, inputs, layer(*inputs)


@needs_rules
def test_a_slot_for_no_expert_and_an_expert_for_no_slot() -> None:
    index = torch.tensor([[0, 4], [4, 4], [2, 0], [0, 2], [4, 2], [0, 4]])  # 4 stands for none; 1 and 3 get nothing
    layer, inputs, output = experts(index)
    rule = rule_for(layer)
    assert rule is not None
    assert rule.confirms is not None
    assert rule.confirms(layer, inputs, output.detach())
    g, weights = torch.randn(output.shape).double(), torch.tensor([0.3, -2.0, 5.0]).double()
    parts = dict(rule.grads(layer, inputs, g.reshape(2, 3, 1, 16)))
    for name, p in layer.named_parameters():
        (expected,) = torch.autograd.grad(output, p, g * weights.repeat(2)[:, None], retain_graph=True)
        torch.testing.assert_close(parts[name].weighted(weights), expected)


def _expert_parallel(layer: Any) -> None:
    layer._is_expert_parallel = True


def _own_forward(layer: Any) -> None:
    layer.forward = type(layer).forward.__get__(layer)


def _subclass(layer: Any) -> None:
    layer.__class__ = type(type(layer).__name__, (type(layer),), {})


def _further_parameter(layer: Any) -> None:
    layer.extra = nn.Parameter(torch.ones(1))


def _without_scale(layer: Any) -> None:
    del layer.embed_scale


def _max_norm(layer: Any) -> None:
    layer.max_norm = 1.0


LAYERS: dict[str, tuple[str, Any]] = {
    "experts": ("mixtral", lambda model: model.model.layers[0].mlp.experts),
    "embedding": ("gemma3", lambda model: model.model.embed_tokens),
    "positions": ("opt", lambda model: model.model.decoder.embed_positions),
    "linear": ("falcon", lambda model: model.transformer.h[0].mlp.dense_h_to_4h),
}


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name in LAYERS for change in (_own_forward, _subclass, _further_parameter)]
    + [
        ("experts", _expert_parallel),
        ("embedding", _without_scale),
        ("embedding", _max_norm),
        ("positions", _max_norm),
    ],
)
def test_no_rule_stands_for_what_it_does_not_fit(name: str, change: Any) -> None:
    kind, pick = LAYERS[name]
    layer = pick(make(kind))
    if name == "experts" and not HAVE_RULES:
        pytest.skip("these experts have no rule")
    assert rule_for(layer) is not None
    change(layer)
    assert rule_for(layer) is None


@pytest.mark.parametrize("name", list(LAYERS))
def test_no_rule_stands_for_a_patched_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, pick = LAYERS[name]
    layer = pick(make(kind))
    monkeypatch.setattr(type(layer), "forward", lambda self, *args, **kwargs: None)
    assert rule_for(layer) is None


def test_numbers_tell_a_layer_that_only_has_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gemma3")
    layer, ids = model.model.embed_tokens, batch("right")[0]
    rule = rule_for(layer)
    assert rule is not None
    assert rule.confirms is not None
    right = layer(ids).detach()
    assert rule.confirms(layer, ids, right)
    assert not rule.confirms(layer, ids, 2 * right)
    layer.padding_idx = None  # the gradient of the padding's entry is another one then
    assert rule.confirms(layer, ids, right)
    plain = lambda self, ids: self.weight[ids] * self.embed_scale  # noqa: E731  (as the class, but for padding)
    monkeypatch.setattr(type(layer), "forward", plain)
    assert rule.confirms(layer, ids, right)
    layer.padding_idx = 0
    assert not rule.confirms(layer, ids, right)


@needs_rules
def test_numbers_tell_experts_that_gate_otherwise() -> None:
    layer, inputs, output = experts(torch.tensor([[0, 1], [2, 3]]))
    rule = rule_for(layer)
    assert rule is not None
    assert rule.confirms is not None
    assert rule.confirms(layer, inputs, output.detach())
    assert not rule.confirms(layer, inputs, output.detach() * 1.01)
    assert not rule.confirms(layer, inputs[:2], output.detach())
    assert not rule.confirms(layer, (inputs[0], inputs[2], inputs[1]), output.detach())


class Unpadded(nn.Module):
    """Leaves padding out around a norm of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        heads = self.norm(x[mask].reshape(-1, 4))
        return torch.zeros_like(x).masked_scatter(mask[..., None], heads).tanh().sum((1, 2))


def test_a_multiple_of_the_tokens_is_compared_again_where_it_is_another_one() -> None:
    model, verdicts = Unpadded(), Verdicts()
    ids, full = torch.randint(0, VOCAB, (4, 4)), torch.ones(4, 4, dtype=torch.bool)
    some = full.clone()
    some[0], some[1, :] = False, False
    for _ in range(2):
        with Tape(model, 2, blocks=2, verdicts=verdicts) as recorder:
            y = model(ids, full)
        recorder.backward(y[:2] - 2 * y[2:])
    # Half of the tokens, two heads each: as many as rows times tokens.
    with Tape(model, 2, blocks=2, verdicts=verdicts) as recorder:
        y = model(ids, some)
    with pytest.raises(Refused, match="differ"):
        recorder.backward(y[:2] - 2 * y[2:])
