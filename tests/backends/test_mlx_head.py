"""The output head of an MLX module is what makes its logits, whatever its name; tied, the embedding is the head."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx_models
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

import gapo
from gapo.adapters.mlx_lm import pair_logps
from gapo.backends.mlx import MlxForward


def head_of(model: nn.Module) -> set[str]:
    return set(MlxForward(pair_logps, model, mlx_models.batch()).head)


@pytest.mark.parametrize(
    ("kind", "tied", "head"),
    [
        ("llama", False, "lm_head.weight"),
        ("llama", True, "model.embed_tokens.weight"),
        ("internlm2", False, "output.weight"),
        ("internlm2", True, "model.tok_embeddings.weight"),
        ("llama4_text", False, "output.weight"),
        ("llama4_text", True, "model.embed_tokens.weight"),  # h @ weight.T, no as_linear
        ("minicpm", True, "model.embed_tokens.weight"),  # likewise
        ("talkie", False, "lm_head"),  # an array in the model, a gain behind it
        ("mamba", True, "backbone.embeddings.weight"),
    ],
)
def test_heads_of_mlx_lms_models(kind: str, tied: bool, head: str) -> None:
    model = mlx_models.make(kind, tied)
    classes = [type(m) for m in model.modules()]
    assert head_of(model) == {head}
    assert [type(m) for m in model.modules()] == classes
    # What is left out is what the perturbation does not move: a step that names all others is the same.
    others = [name for name, _ in tree_flatten(model.trainable_parameters()) if name != head]
    pattern = "^(" + "|".join(name.replace(".", r"\.") for name in others) + ")$"
    gaps = [
        gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=0.3, perturb=perturb), backend="mlx")(
            model, mlx_models.batch()
        )[0].anchor_gaps.tolist()
        for perturb in ("backbone", pattern, "all")
    ]
    assert gaps[0] == gaps[1] != gaps[2]


def test_adapters_on_the_head_are_head() -> None:
    model = mlx_models.make("llama")
    model.freeze()
    model.lm_head = LoRALinear.from_base(model.lm_head, r=2)
    model.model.layers[0].mlp.up_proj = LoRALinear.from_base(model.model.layers[0].mlp.up_proj, r=2)
    assert head_of(model) == {"lm_head.lora_a", "lm_head.lora_b"}
    tied = mlx_models.make("llama", tied=True)
    tied.model.embed_tokens = LoRAEmbedding.from_base(tied.model.embed_tokens, r=2)
    assert head_of(tied) == {f"model.embed_tokens.{name}" for name in ("embedding.weight", "lora_a", "lora_b")}


def test_a_frozen_or_quantised_head_leaves_the_rest_to_be_perturbed() -> None:
    model = mlx_models.make("internlm2")
    model.output.freeze()
    assert head_of(model) == set()
    model = mlx_models.make("llama", tied=True, hidden_size=32, head_dim=16, intermediate_size=32)
    nn.quantize(model, group_size=32, bits=4)
    assert head_of(model) == set()


class Custom(nn.Module):
    """An embedding, a mixing layer, and whatever `logits` makes of them."""

    def __init__(self, width: int, logits: Any, **parts: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(mlx_models.VOCAB, width)
        self.mix = nn.Linear(width, width)
        for name, part in parts.items():
            setattr(self, name, part)
        self.logits = logits

    def __call__(self, ids: mx.array) -> mx.array:
        return self.logits(self, mx.tanh(self.mix(mx.cumsum(self.embed(ids), axis=1))))


@pytest.mark.parametrize(
    ("width", "logits", "parts", "head"),
    [
        (8, lambda m, x: m.words(x), lambda: {"words": nn.Linear(8, 40)}, {"words.weight", "words.bias"}),
        # A width that is the vocabulary's by chance.
        (40, lambda m, x: m.words(x), lambda: {"words": nn.Linear(40, 40)}, {"words.weight", "words.bias"}),
        # More logits than the embedding has rows.
        (8, lambda m, x: m.words(x), lambda: {"words": nn.Linear(8, 48)}, {"words.weight", "words.bias"}),
        (8, lambda m, x: x @ m.words, lambda: {"words": mx.random.normal((8, 40))}, {"words"}),
        (8, lambda m, x: x @ m.embed.weight.T, dict, {"embed.weight"}),
        (8, lambda m, x: m.embed.as_linear(x), lambda: {"lm_head": nn.Linear(8, 40)}, {"embed.weight"}),
    ],
)
def test_heads_of_modules_of_ones_own(width: int, logits: Any, parts: Any, head: set[str]) -> None:
    assert head_of(Custom(width, logits, **parts())) == head


@pytest.mark.parametrize("vocabulary", [40, 48])
def test_a_margin_fn_that_calls_the_parts(vocabulary: int) -> None:
    model = Custom(8, lambda m, x: x, words=nn.Linear(8, vocabulary))

    def margins(m: Custom, batch: Any) -> Any:
        logits = m.words(mx.tanh(m.mix(m.embed(batch[0]))))
        return mx.split(gapo.sequence_logps(logits, batch[1]), 2)

    assert set(MlxForward(margins, model, mlx_models.batch()).head) == {"words.weight", "words.bias"}


def test_a_model_without_logits_has_no_head() -> None:
    model = Custom(8, lambda m, x: m.score(mx.mean(x, axis=1)), score=nn.Linear(8, 1))

    def scores(module: nn.Module, batch: Any) -> Any:
        chosen, rejected = mx.split(module(batch[0])[:, 0], 2)
        return chosen, rejected

    assert set(MlxForward(scores, model, mlx_models.batch()).head) == set()


def test_what_cannot_be_told_apart_is_refused_for_the_backbone_alone() -> None:
    mx.random.seed(0)
    parts = {"one": mx.random.normal((8, 40)), "other": [nn.Linear(8, 40)]}
    model = Custom(8, lambda m, x: m.other[0](x) * 0 + x @ m.one + mx.zeros((40,)), gain=nn.LayerNorm(40), **parts)
    plain = model.logits
    object.__setattr__(model, "logits", lambda m, x: m.gain(plain(m, x)))
    with pytest.raises(ValueError, match=r"leaves the output head out, which could be any of one, other\.0\.weight"):
        gapo.value_and_grad(pair_logps, backend="mlx")(model, mlx_models.batch())
    gapo.value_and_grad(pair_logps, gapo.GAPOConfig(perturb="all"), backend="mlx")(model, mlx_models.batch())


def test_classes_come_back_after_an_exception() -> None:
    model = mlx_models.make("llama")

    def fails(module: nn.Module, batch: Any) -> Any:
        module(batch[0])
        raise RuntimeError("in the forward")

    with pytest.raises(RuntimeError, match="in the forward"):
        MlxForward(fails, model, mlx_models.batch())
    assert type(model) is type(mlx_models.make("llama"))
    assert type(model.lm_head) is nn.Linear
