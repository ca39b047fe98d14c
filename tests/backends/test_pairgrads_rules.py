"""Rules for layers of models people tune: each pair's gradient is autograd's, by one backward for each pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from gapo.backends.torch.pairgrads import Tape, tape

VOCAB, PAIRS = 31, 3
SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {
    "hidden_size": 16,
    "intermediate_size": 12,
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
            "intermediate_size": 12,
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
            "ffn_dim": 12,
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
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 20,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "nemotron": ("NemotronConfig", WIDE),
    "mixtral": ("MixtralConfig", {**WIDE, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}),
    "qwen3-moe": ("Qwen3MoeConfig", {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}),
    "gpt-oss": ("GptOssConfig", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
EAGER = ("gemma2", "gpt-oss")  # their attention gives NaN for padding on the left in float64
# Layers that have no rule, and run again.
LOCAL = {
    "mixtral": {"MixtralTopKRouter"},
    "qwen2-moe": {"Qwen2MoeTopKRouter"},
    "qwen3-moe": {"Qwen3MoeTopKRouter"},
    "gpt-oss": {"GptOssTopKRouter", "GptOssAttention"},
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


SIDES = [(kind, side) for kind in MODELS for side in ("left", "right") if side == "right" or kind not in EAGER]


@pytest.mark.parametrize(("kind", "side"), SIDES)
def test_each_pairs_gradient_is_autograds(kind: str, side: str, rerun: set[str]) -> None:
    model = make(kind)
    assert_autograds(model, side, tol=1e-5)
    assert rerun == LOCAL.get(kind, set())


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
    assert not rerun


def test_dora_behind_dropout(rerun: set[str]) -> None:
    model = dora(dropout=0.5).train()
    # The same draw for each forward: the oracle's and the tape's.
    handle = model.register_forward_pre_hook(lambda *_: torch.manual_seed(3) and None)
    assert_autograds(model, "right", tol=1e-5)
    handle.remove()
    assert not rerun
