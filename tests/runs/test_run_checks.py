"""`gapo train`, `study` and `score`: what can be known early is refused before anything is read or written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import ranks_script
from frameworks import require
from transformers import TrainingArguments

from gapo import GAPOConfig, cli, data, files
from gapo.metrics import combine
from gapo.runs import ranks
from gapo.runs.errors import ConfigError
from gapo.runs.models.pretrained import require_fit, require_model
from gapo.runs.train import train as train_module
from gapo.runs.train import train_torch
from gapo.runs.train.recorder import joined
from gapo.runs.train.schedule import total_steps
from gapo.runs.train.train_config import TrainConfig
from gapo.study.study_config import StudyConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    hf_models.make("llama").save_pretrained(folder)
    hf_models.tokenizer().save_pretrained(folder)
    return folder


def refused(message: str, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """`gapo train` with these options says `message`, reads no pair and writes nothing."""
    monkeypatch.setattr(train_module, "load_data", lambda run: pytest.fail("pairs were read before"))
    with pytest.raises((ValueError, OSError, ModuleNotFoundError), match=message):
        train_module.train(TrainConfig(output_dir=str(output), **options), GAPOConfig())
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_to": "wandby"}, "report_to='wandby' is no tracker of transformers that is installed"),
        ({"scheduler": "cosin"}, "cosin is not a valid SchedulerType, please select"),
        ({"model": "gone/model"}, "gone/model"),
        ({"tokenizer": "gone/tokenizer", "model": "MODEL"}, "tokenizer: 'gone/tokenizer' is no folder"),
        ({"backend": "jax", "model": "gone/model", "tokenizer": "MODEL"}, "model: 'gone/model' is no folder"),
    ],
)
def test_settings_are_refused_before_pairs_are_read(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    if options.get("backend") == "jax":
        require("flax")
    options = {name: str(model) if value == "MODEL" else value for name, value in options.items()}
    refused(message, tmp_path / "run", monkeypatch, **options)


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    message = "2 GPUs are visible to one process, .* torchrun --nproc_per_node 2 -m gapo train"
    refused(message, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_precision_of_accelerate_s_that_is_not_the_run_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    message = f"accelerate's configuration has mixed_precision '{precision}', and the run's own is 'no': let them agree"
    refused(message, tmp_path / "run", monkeypatch)


def test_adapters_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(r'needs peft, which is not installed: pip install "gapo\[hf\]"', tmp_path / "run", monkeypatch, lora_r=2)


def test_a_quantised_model_without_adapters(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_models.tokenizer().save_pretrained(tmp_path / "four-bit")
    settings = json.loads((model / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "four-bit" / "config.json").write_text(json.dumps(settings))
    given = {"model": str(tmp_path / "four-bit")}
    refused("is quantised, and such weights cannot be trained: train ad", tmp_path / "run", monkeypatch, **given)


@pytest.mark.parametrize("command", ["train", "study", "score"])
def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    if command == "study":
        require("scipy")
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "below"
    lines = {
        "train": ["--pairs=gone.jsonl", f"--output_dir={where}"],
        "study": ["--pairs=gone.jsonl", f"--output_dir={where}"],
        "score": ["gone.jsonl", "--model=gone", f"--output={where}/scores.jsonl"],
    }
    assert cli.main([command, *lines[command]]) == 1  # and not that gone.jsonl is not there
    assert f"{where} could not be written: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"flip_seed": -3}, r"flip_seed must be in"),
        ({"seed": 2**32}, "seed must be in"),
        ({"max_length": 1}, "max_length must be >= 2"),
        ({"max_steps": 0}, "max_steps must be >= 1, or -1 for all epochs; got 0"),
        ({"max_steps": -7}, "max_steps must be >= 1"),
        ({"limit": 0}, "limit must be >= 1, or none for all pairs, got 0"),
        ({"save_steps": -1}, "save_steps must be >= 0"),
        ({"lora_r": -1}, "lora_r must be >= 0"),
        ({"drift_prompts": -1}, "drift_prompts must be >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"tiny_heads": 3}, "tiny_hidden_size must be an even multiple of tiny_heads=3, got 128"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip_rates": (0.2, 0.2)}, "flip_rates must not name a value twice"),
        ({"curve_rhos": (1.0, 1.0)}, "curve_rhos must not name a value twice"),
        ({"control_flip_rates": (0.25,)}, r"control_flip_rates must be among flip_rates=.*, got \[0.25\]"),
        ({"arms": "simpo,dpo", "curve_rhos": (1.0,)}, "curve_rhos needs gapo among arms"),
        ({"arms": "gapo,dpo", "valuation_rates": (0.2,)}, "valuation_rates needs simpo among arms"),
        ({"valuation_rates": (0.2,), "valuation_share": 0.01, "train_pairs": 20}, "is no pair: raise it"),
        ({"seeds": 1001}, "seeds must be <= 1000"),
        ({"seed": -1}, "seed must be in"),
        ({"limit": 0}, "limit must be >= 1"),
    ],
)
def test_studies_that_would_leave_out_or_count_twice(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyConfig(**options)
    assert StudyConfig(arms="gapo,gapo, dpo").arm_names == ["gapo", "dpo"]


# Models and tokenizers


def test_a_tokenizer_of_other_ids_is_refused(model: Path, tmp_path: Path) -> None:
    tokenizer = hf_models.tokenizer()
    vocabulary = tokenizer.get_vocab()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    first, second = sorted(vocabulary)[:2]
    table = content["model"]["vocab"]
    table[first], table[second] = table[second], table[first]
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"numbers the token .* give a tokenizer that the model was trained with"):
        require_model(str(model), tokenizer=str(tmp_path))
    assert require_model(str(model), tokenizer=str(model)).model_type == "llama"


def test_ids_and_lengths_beyond_the_model(model: Path) -> None:
    settings = hf_models.make("llama").config
    settings.vocab_size, settings.max_position_embeddings = 50, 20
    require_fit(settings, "m", highest=49, longest=20)
    with pytest.raises(ConfigError, match="gives the id 50, and model 'm' has embeddings of 50 tokens"):
        require_fit(settings, "m", highest=50, longest=2)
    with pytest.raises(ConfigError, match="a pair has 21 tokens, and model 'm' has 20 positions: --max_length 20"):
        require_fit(settings, "m", highest=0, longest=21)


def test_jax_refuses_a_llama_that_it_would_not_compute(model: Path, tmp_path: Path) -> None:
    require("flax")
    from safetensors.numpy import load_file, save_file

    from gapo.runs.models import llama

    settings = json.loads((model / "config.json").read_text())
    weights = load_file(model / "model.safetensors")

    def saved(weights: dict[str, Any], **more: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**settings, **more}))
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path

    assert llama.load(saved(weights))[1].keys() == weights.keys()
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(4, dtype=np.float32)}
    with pytest.raises(
        ConfigError, match=r"weights that it would leave out, such as 'model.layers.0.self_attn.q_proj.b"
    ):
        llama.load(saved(weights | bias))
    for more, message in (
        ({"hidden_act": "gelu"}, "got hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "with rope .*linear"),
        ({"quantization_config": {"bits": 4}}, "got quantization_config"),
    ):
        with pytest.raises(ConfigError, match=message):
            llama.load(saved(weights, **more))


# Going on


def test_a_run_does_not_go_on_with_other_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TrainConfig(pairs=str(tmp_path / "pairs.jsonl"), output_dir=str(tmp_path / "run"), eval_fraction=0.2)
    folder, step = Path(run.output_dir), GAPOConfig()
    data.write_rows(tmp_path / "pairs.jsonl", data.generate_pairs(20))
    found = train_module.load_data(run)
    known = train_module._require_same_pairs(folder, run, found)
    train_module._write_settings(folder, run, step, found, known)
    assert train_module._require_same_pairs(folder, run, found) == known
    data.write_rows(tmp_path / "pairs.jsonl", data.flip_pairs(data.generate_pairs(20), rate=0.1))
    with pytest.raises(ConfigError, match=r"holds an unfinished run of other train.* pairs: the data have changed"):
        train_module._require_same_pairs(folder, run, train_module.load_data(run))
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "count", lambda: 2)
        with pytest.raises(ConfigError, match="unfinished run in 1 processes, and here are 2, whose steps would be of"):
            train_module._require_same_pairs(folder, run, found)
    (folder / "pairs.json").unlink()  # as earlier versions left it
    with pytest.raises(ConfigError, match="which drew held-out pairs and batches otherwise: give another output_dir"):
        train_module._require_same_pairs(folder, run, found)


# Several processes


@pytest.mark.slow
def test_two_processes_write_once_and_count_each_pair_once(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ranks_script.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["codes"] == second["codes"] == [130, 0, 0]  # interrupted, gone on with, and another objective
    assert second["wrote"] == []
    assert {"metrics.jsonl", "steps.jsonl", "summary.json", "reference.safetensors"} <= set(first["wrote"])
    assert done.stdout.count("reward accuracy on held-out pairs") == 3  # the first process, and the run alone

    steps = files.read_lines(tmp_path / "run" / "steps.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    truth = data.read_pairs(tmp_path / "pairs.jsonl").rows
    held_out = json.loads((tmp_path / "run" / "summary.json").read_text())["held_out_pairs"]
    assert held_out == len(truth) - ranks_script.PAIRS
    for epoch in (steps[:3], steps[3:]):  # the last micro-batch was filled up with a pair of the first
        assert Counter(pair for row in epoch for pair in row["pair"]) == Counter(range(ranks_script.PAIRS))
    columns = [{pair: flip for row in epoch for pair, flip in zip(row["pair"], row["is_flipped"], strict=True)}
               for epoch in (steps[:3], steps[3:])]  # fmt: skip
    assert columns[0] == columns[1]
    assert sum(columns[0].values()) == round(0.4 * ranks_script.PAIRS)
    step = GAPOConfig()
    for row in steps:
        expected = step.beta / (1 + np.exp(step.beta * np.array(row["anchor_gaps"]) - step.gamma))
        np.testing.assert_allclose(row["weights"], expected, rtol=1e-3)
    norms = [[row["grad_norm"] for row in files.read_lines(tmp_path / name / "metrics.jsonl") if "grad_norm" in row]
             for name in ("dpo", "one")]  # fmt: skip
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # the ranks' gradients are averaged: those of one process
    metrics = [row["step"] for row in files.read_lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    assert metrics == [0, 3, 6]


def test_lines_of_processes_are_joined_without_pairs_seen_before() -> None:
    rows = ({"step": 3, "weights": [0.1, 0.2], "pair": [4, 0]}, {"step": 3, "weights": [0.3, 0.4], "pair": [5, 1]})
    seen = {0, 1}
    assert joined(rows, seen) == {"step": 3, "weights": [0.1, 0.3], "pair": [4, 5]}
    assert seen == {0, 1, 4, 5}


@pytest.mark.parametrize(
    "command", ["train --backend jax", "study --seeds 1", "score a.jsonl --model m --output b.jsonl --shard 0/1"]
)
def test_what_runs_in_one_process_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for word, module in (("jax", "flax"), ("study", "scipy")):
        if word in command:
            require(module)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(command.split()) == 1
    assert "runs in one process: start it without torchrun" in capsys.readouterr().err


def test_processes_that_would_share_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ranks.count() == 2
    train_torch._require_pairs(TrainConfig(batch_size=4), [None] * 8)
    with pytest.raises(ConfigError, match="needs 10 pairs at a time, and 9 are left to train on: lower batch_size"):
        train_torch._require_pairs(TrainConfig(batch_size=5), [None] * 9)


# Means and counts


def test_steps_are_counted_as_transformers_does() -> None:
    options = {"batch_size": 4, "accumulation": 2}
    assert total_steps(TrainConfig(**options, epochs=1.5), 20) == 5  # 3 in an epoch, the last one smaller
    assert total_steps(TrainConfig(**options), 20, processes=2) == 2
    assert total_steps(TrainConfig(**options, max_steps=7), 20) == 7


def test_a_mean_over_micro_batches_is_one_over_pairs() -> None:
    batches = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0])]
    means, counts = [b.mean() for b in batches], [len(b) for b in batches]
    assert combine("loss", means, counts) == np.concatenate(batches).mean() == 4.0
    assert combine("loss", means) == 6.25
    assert combine("gapo/weight_min", means, counts) == 2.5


def test_ids_without_an_embedding_reach_no_backend(tmp_path: Path) -> None:
    """JAX clamps an index, MLX reads whatever is there."""
    from gapo.runs.train import loop
    from gapo.runs.train.run_data import RunData

    class Small:
        vocabulary = 30

    rows = [{**row, "is_flipped": False} for row in hf_models.pairs(4)]
    config = TrainConfig(backend="jax", max_length=64)
    with pytest.raises(ConfigError, match=r"gives the id \d+, and the model has embeddings of 30 tokens"):
        loop.train(Small(), config, GAPOConfig(), RunData(rows, rows, ""), hf_models.tokenizer(), tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
