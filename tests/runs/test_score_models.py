"""Which models `gapo score` measures with, and that an adapter's weights alone are perturbed."""

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch

import gapo
from gapo import cli, data
from gapo.adapters.hf import PreferenceCollator
from gapo.adapters.hf.margins import pair_logps
from gapo.runs.errors import ConfigError
from gapo.runs.output import tables
from gapo.runs.score import sources as score_models
from gapo.runs.score.score_config import ScoreConfig
from gapo.runs.score.sources import Source, find_sources, fingerprint

PAIRS = data.generate_pairs(6)


def trained_adapter(seed: int = 1) -> Any:
    """LoRA adapters on the model of `hf_models`, with B not 0."""
    model = hf_models.lora("llama")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(0.2 * torch.randn_like(p)) if "lora" in name else None
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and its adapter, and trainings that left whole models and adapters as checkpoints."""
    made = tmp_path_factory.mktemp("models")
    hf_models.make("llama").save_pretrained(made / "base")
    hf_models.tokenizer().save_pretrained(made / "base")
    adapter = trained_adapter()
    adapter.peft_config["default"].base_model_name_or_path = str(made / "base")
    adapter.save_pretrained(made / "adapter")
    for step in (10, 2):
        for training, model in (("whole", hf_models.make("llama", seed=step)), ("lora", adapter)):
            saved = made / training / "checkpoints" / f"checkpoint-{step}"
            model.save_pretrained(saved)
            hf_models.tokenizer().save_pretrained(saved)
            torch.save({}, saved / "optimizer.pt")
    (made / "whole" / "checkpoints" / "checkpoint-last").mkdir()
    data.write_rows(made / "pairs.jsonl", PAIRS)
    return made


def config(folder: Path, *models: str, **options: Any) -> ScoreConfig:
    """A scoring with models in `folder`."""
    given = {name: str(folder / value) if name != "limit" else value for name, value in options.items()}
    named = tuple(str(folder / model) for model in models)
    return ScoreConfig(pairs=str(folder / "pairs.jsonl"), output="s.jsonl", model=named, **given)


def test_a_model_that_sees_the_answer_is_not_scored_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    shared = {"vocab_size": hf_models.VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    transformers.BertLMHeadModel(transformers.BertConfig(**shared, num_attention_heads=2)).save_pretrained(
        tmp_path / "m"
    )
    hf_models.tokenizer().save_pretrained(tmp_path / "m")
    data.write_rows(tmp_path / "pairs.jsonl", PAIRS)
    output = tmp_path / "s.jsonl"
    arguments = [str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "m"), "--output", str(output)]
    assert cli.main(["score", *arguments]) == 1
    assert "BertLMHeadModel sees the answer that it should predict" in capsys.readouterr().err
    assert not output.exists()


def test_checkpoints_come_in_the_order_of_their_steps(folder: Path) -> None:
    for given in ("whole", "whole/checkpoints"):
        found = find_sources(config(folder, checkpoints=given))
        assert found == [
            Source(f"checkpoint-{step}", str(folder / "whole" / "checkpoints" / f"checkpoint-{step}"))
            for step in (2, 10)
        ]
    for models, base in (((), "base"), (("other",), "other")):
        last = find_sources(config(folder, *models, checkpoints="lora"))[-1]
        assert last == Source(
            "checkpoint-10", str(folder / base), str(folder / "lora" / "checkpoints" / "checkpoint-10")
        )


def test_an_adapter_finds_its_base(folder: Path) -> None:
    base, adapter = str(folder / "base"), str(folder / "adapter")
    assert find_sources(config(folder, "adapter")) == [Source(adapter, base, adapter)]
    assert find_sources(config(folder, "base", adapter="adapter")) == [Source(base, base, adapter)]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ((), {}, "nothing to score with"),
        (("base", "base"), {}, "a model is named twice"),
        (("adapter",), {"adapter": "adapter"}, "is itself an adapter: give its base as model"),
        (("base",), {"checkpoints": "whole"}, "is a whole model and needs no base"),
        ((), {"checkpoints": "base"}, r"no checkpoint-\* folder in"),
        ((), {"checkpoints": "gone"}, r"no checkpoint-\* folder in"),
    ],
)
def test_what_is_not_clear_is_refused(
    folder: Path, models: tuple[str, ...], options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_sources(config(folder, *models, **options))


def test_an_adapter_that_names_no_base(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not name its base model: give it as model"):
        find_sources(config(folder, str(tmp_path)))


def test_adapter_weights_alone_are_perturbed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    arguments = ["score", str(folder / "pairs.jsonl"), "--output", str(out), "--rho", "0.3", "--max_length", "64"]
    assert cli.main([*arguments, "--model", str(folder / "base"), "--adapter", str(folder / "adapter")]) == 0
    scores = tables.read_table(out)
    batch = PreferenceCollator(hf_models.tokenizer(), max_length=64)(PAIRS)
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=0.3), backend="torch")
    result, grads = step(trained_adapter(), batch)
    assert all("lora" in name for name in grads)
    near = 5e-6  # ten units in the last place of a float32 log-prob
    assert [row["gap"] for row in scores] == pytest.approx(result.anchor_gaps.tolist(), abs=near)
    assert [row["margin"] for row in scores] == pytest.approx(result.margins.tolist(), abs=near)
    alone = step(hf_models.make("llama"), batch)[0]
    assert [row["margin"] for row in scores] != pytest.approx(alone.margins.tolist(), abs=1e-4)


@pytest.mark.parametrize("training", ["whole", "lora"])
def test_each_checkpoint_is_scored(folder: Path, tmp_path: Path, training: str) -> None:
    out = tmp_path / "s.jsonl"
    arguments = ["score", str(folder / "pairs.jsonl"), "--epochs-of-checkpoints", str(folder / training)]
    assert cli.main([*arguments, "--output", str(out), "--max_length", "64", "--rho", "0.2"]) == 0
    scores = tables.read_table(out)
    assert [row["checkpoint"] for row in scores] == ["checkpoint-2"] * 6 + ["checkpoint-10"] * 6
    first, last = ([row["gap"] for row in scores[i : i + 6]] for i in (0, 6))
    assert (first == last) == (training == "lora")  # both of its checkpoints hold the same adapter


def test_no_dropout_and_what_is_trainable(folder: Path) -> None:
    base, adapter = str(folder / "base"), str(folder / "adapter")
    for source, trained in ((Source("a", base), {"model", "lm_head"}), (Source("a", base, adapter), {"base_model"})):
        model, tokenizer = score_models.load(source, config(folder))
        assert not any(module.training for module in model.modules())
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert {name.split(".")[0] for name in names} == trained
        assert all("lora" in name for name in names) == (source.adapter is not None)
        assert tokenizer.eos_token == "<|end|>"


def test_the_fingerprint_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder / "whole" / "checkpoints" / "checkpoint-2", copy)
    sources = [Source("a", str(copy)), Source("b", str(copy), str(folder / "adapter"))]
    before = [fingerprint(sources[:1]), fingerprint(sources)]
    assert before[0] != before[1]
    (copy / "optimizer.pt").write_bytes(b"other")
    assert [fingerprint(sources[:1]), fingerprint(sources)] == before
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert fingerprint(sources[:1]) != before[0]
    assert fingerprint([Source("a", "org/one")]) != fingerprint([Source("a", "org/two")])


def test_loading_what_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tokenizer 'org/gone' is not what save_pretrained leaves"):
        score_models.load(Source("a", "org/gone"), config(folder))
    with pytest.raises(ConfigError, match="with adapter 'org/gone' is not what save_pretrained leaves"):
        score_models.load(Source("a", str(folder / "base"), "org/gone"), config(folder))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="PyTorch finds no CUDA device: give cpu or auto"):
        score_models.find_device("cuda:0")
    assert score_models.find_device("auto").type == "cpu"
