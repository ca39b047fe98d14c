"""Which names are perturbed."""

import pytest

from gapo import GAPOConfig
from gapo.selection import HEAD_NAME, layer_index, select

NAMES = [
    "embed.weight",
    "layers.0.up.weight",
    "layers.1.up.weight",
    "layers.10.up.bias",
    "norm.weight",
    "lm_head.weight",
]


def test_backbone_leaves_out_the_head_whatever_its_name() -> None:
    assert select(NAMES, ["embed.weight"], GAPOConfig()) == NAMES[1:]
    assert select(NAMES, ["lm_head.weight"], GAPOConfig()) == NAMES[:-1]
    assert select(NAMES, ["lm_head.weight"], GAPOConfig(perturb="all")) == NAMES


def test_patterns_search_in_the_name() -> None:
    assert select(NAMES, [], GAPOConfig(perturb=r"up\.weight$")) == NAMES[1:3]
    assert select(NAMES, ["lm_head.weight"], GAPOConfig(perturb="head")) == ["lm_head.weight"]


def test_last_layers_counts_numbered_layers() -> None:
    assert select(NAMES, [], GAPOConfig(last_layers=1)) == ["layers.10.up.bias"]
    assert select(NAMES, [], GAPOConfig(last_layers=2)) == ["layers.1.up.weight", "layers.10.up.bias"]
    assert select(NAMES, [], GAPOConfig(last_layers=2, perturb="weight")) == ["layers.1.up.weight"]
    with pytest.raises(ValueError, match=r"last_layers=4 was asked, but the trainable parameters lie in 3 numbered"):
        select(NAMES, [], GAPOConfig(last_layers=4))
    stacked = ["embed.weight", "layers.up.weight"]
    with pytest.raises(ValueError, match=r"lie in 0 numbered layers \(such as embed.weight, .* perturb=\.\.\."):
        select(stacked, [], GAPOConfig(last_layers=1))


def test_nothing_to_select_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"perturb='nothing' with last_layers=None selects none of the 6 .* embed.weight"
    ):
        select(NAMES, [], GAPOConfig(perturb="nothing"))
    with pytest.raises(ValueError, match=r"the model has no trainable parameter"):
        select([], [], GAPOConfig())


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.11.mlp.weight", 11),
        ("transformer.h.3.attn.c_attn.bias", 3),
        ("params/layers_2/kernel", 2),
        ("['layers'][4]['w']", 4),
        ("embed.weight", None),
        ("fc1.weight", None),
    ],
)
def test_layer_index(name: str, index: int | None) -> None:
    assert layer_index(name) == index


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.lm_head.kernel",
        "['params']['lm_head']",
        "embed_out.weight",
        "lm_head.lora_a",
        "lm_head.bias",
        "output.weight",  # internlm2, torchtune
        "language_model.output.weight",
        "['params']['output']['kernel']",
        "model.transformer.ff_out.weight",  # olmo
        "params.decoder.logits_dense.kernel",  # MaxText, T5X
        "transformer.output_layer.weight",  # ChatGLM
        "head.weight",
        "base_model.model.output.lora_A.default.weight",
        "decoder/final_proj/kernel",
    ],
)
def test_names_of_heads(name: str) -> None:
    assert HEAD_NAME.search(name)


@pytest.mark.parametrize(
    "name",
    [
        "lm_headless.weight",
        "embed.weight",
        "embeddings.weight",
        "encoder.layer.0.attention.output.dense.weight",
        "encoder.layer.0.output.dense.weight",
        "model.layers.3.attention.head.weight",
        "model.transformer.blocks.0.ff_out.weight",
        "model.layers.0.mlp.output.weight",
        "decoder.layers.output_layer.weight",
        "output_norm.weight",
        "model.head_norm.weight",
    ],
)
def test_names_that_are_no_heads(name: str) -> None:
    assert not HEAD_NAME.search(name)
