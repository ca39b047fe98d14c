"""The recipes of the package: their numbers, and two steps of each on a tiny model of its class."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hf_models
import pytest
import transformers

from gapo import GAPOConfig, cli, data, files
from gapo.commands.train import parse
from gapo.runs.launch import CONFIGS, config_file
from gapo.runs.train import train as train_module
from gapo.runs.train.train_config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = {path.stem: path for path in sorted(CONFIGS.parent.glob("*.yaml"))}
# The class of each model, and the pairs that share an anchor on 8 devices.
MODELS = {
    "mistral-7b-instruct": ("Mistral", 32),
    "mistral-7b-base": ("Mistral", 16),
    "llama-3-8b-base": ("Llama", 16),
    "llama-3-8b-instruct": ("Llama", 16),
    "gemma-2-9b-it": ("Gemma2", 16),
}


def settings(name: str) -> tuple[TrainConfig, GAPOConfig]:
    return parse([str(RECIPES[name])])


def test_each_recipe_has_the_numbers_of_the_documentation() -> None:
    text = (ROOT / "docs" / "choosing.md").read_text()
    rows = re.findall(
        r"^\| ((?:Mistral|Llama|Gemma)[^|]*?)(?: \(.*?\))? \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.M
    )
    table = {row[0].split(",")[0].lower(): tuple(map(float, row[1:])) for row in rows}
    assert set(table) == set(RECIPES) == set(MODELS)
    beta, gamma, rate = re.findall(r"`beta` (\S+), `gamma` (\S+) and learning rate (\S+)\.", text.replace("\n", " "))[0]
    *_, rho = table["llama-3-8b-base"]
    table["llama-3-8b-instruct"] = (float(beta), float(gamma), float(rate), rho)  # "-v2", for the plain instruct model
    for name, numbers in table.items():
        config, step = settings(name)
        assert (step.beta, step.gamma, config.learning_rate, step.rho) == numbers, name
        assert (step.adaptive, step.probe, config.scheduler, config.warmup_ratio) == (True, "loss", "cosine", 0.1)
        assert (8 * config.batch_size, 8 * config.batch_size * config.accumulation) == (MODELS[name][1], 128)
        assert config.bf16 is False  # with the exact anchor, on shards
        assert config_file(str(config.accelerate_config)).parent == CONFIGS


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    files.write_rows(folder / "train.jsonl", data.generate_pairs(32))
    files.write_rows(folder / "test.jsonl", data.generate_pairs(4, seed=1))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_two_steps_of_each_on_a_tiny_model_of_its_class(
    name: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # launched already
    monkeypatch.setattr(train_module, "write_report", lambda *_: None)
    kind, _ = MODELS[name]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": hf_models.VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tiny = getattr(transformers, f"{kind}Config")(**sizes, **ids, num_key_value_heads=1, head_dim=8)
    getattr(transformers, f"{kind}ForCausalLM")(tiny).save_pretrained(tmp_path / "model")
    hf_models.tokenizer().save_pretrained(tmp_path / "model")
    instead = {
        "model": tmp_path / "model", "pairs": pairs / "train.jsonl", "split": "train", "max_steps": 2, "max_length": 64,
        "eval_pairs": pairs / "test.jsonl", "eval_split": "null", "output_dir": tmp_path / "run", "logging_steps": 1,
    }  # fmt: skip
    assert cli.main(["train", str(RECIPES[name]), *(f"--{key}={value}" for key, value in instead.items())]) == 0
    steps = files.read_lines(tmp_path / "run" / "steps.jsonl")
    config, step = settings(name)
    assert [len(row["pair"]) for row in steps[: config.accumulation]] == [config.batch_size] * config.accumulation
    assert {row["step"] for row in steps} == {1, 2}
    assert all(0 < weight < step.beta for row in steps for weight in row["weights"])
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == kind.lower()
