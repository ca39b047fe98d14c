"""The command lines in the field's words: TRL's names, fields of TrainingArguments, defaults that fit, quick errors."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import quick_runs
from huggingface_hub import constants
from transformers import TrainingArguments

from gapo import GAPOConfig, cli, data
from gapo.commands import score as score_command
from gapo.commands import train as train_command
from gapo.runs.errors import ConfigError
from gapo.runs.paths import require_model, require_there
from gapo.runs.score.run_settings import settings_of_runs
from gapo.runs.train import torch_arguments, train_torch
from gapo.runs.train.model_options import lora_config
from gapo.runs.train.other_names import OTHER_NAMES, other_fields
from gapo.runs.train.schedule import steps_per_epoch
from gapo.runs.train.train_config import TrainConfig, as_dict
from gapo.runs.train.trainer_fields import declared_fields, typed_values
from gapo.runs.train.unmoved import unmoved

# As a user of TRL has them.
TRL = """
model_name_or_path: org/model
dataset_name: org/pairs
dataset_config: default
dataset_streaming: true
num_train_epochs: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1.0e-8}
optim: adafactor
use_peft: true
lora_target_modules: [q_proj, v_proj]
report_to: [tensorboard]
gradient_checkpointing: true
attn_implementation: sdpa
dtype: bfloat16
warmup_steps: 0.2
"""


def parse_once(parser: Any = train_command.make_parser()) -> Any:  # noqa: B008  # making one takes longest
    return parser


@pytest.fixture(autouse=True)
def one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_command, "make_parser", parse_once)


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        train_command.parse(arguments)
    return str(error.value)


def test_the_names_of_trl(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text(TRL)
    config, step = train_command.parse([str(tmp_path / "trl.yaml"), "--no_remove_unused_columns", "--push_to_hub"])
    assert (config.model, config.pairs, config.epochs, config.batch_size, config.accumulation) == (
        *("org/model", "org/pairs", 2, 4, 8),
    )
    assert (config.lora_r, config.lora_alpha, config.learning_rate, step.rho) == (16, 32, 5e-6, 0.025)
    assert config.gradient_checkpointing is True
    assert (config.bf16, config.streaming, config.dataset_config) == (None, True, "default")
    assert config.training_arguments == {
        "lr_scheduler_kwargs": {"min_lr": 1e-8},
        "optim": "adafactor",
        "warmup_steps": 0.2,
        "remove_unused_columns": False,
        "push_to_hub": True,
    }
    arguments = torch_arguments.arguments_of(config, step, tmp_path / "run" / "checkpoints", 100)
    assert arguments.optim == "adafactor"
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-8}
    assert arguments.warmup_steps == 0.2
    assert arguments.num_train_epochs == 2
    assert arguments.gradient_checkpointing is True
    assert arguments.report_to == ["tensorboard"]
    assert arguments.hub_model_id == "gapo"  # the run's name, not "checkpoints"
    lora = lora_config(config)
    assert (lora.r, lora.lora_alpha, set(lora.target_modules)) == (16, 32, {"q_proj", "v_proj"})
    words = train_command.parse(["--lora_target_modules", "all-linear", "--use_peft", "--report_to", "a", "b"])[0]
    assert lora_config(words).target_modules == "all-linear"
    assert words.report_to == "a,b"


def test_every_field_of_training_arguments_is_an_option() -> None:
    names = {f.name for f in fields(TrainingArguments) if f.init}
    assert set(declared_fields()) == names
    own = {f.name for f in fields(TrainConfig)}
    refused = {"auto_find_batch_size", "hub_token", "label_smoothing_factor", "resume_from_checkpoint"}
    assert set(other_fields()) | own | set(OTHER_NAMES) | refused >= names
    assert not refused & set(other_fields())
    for name in ("optim", "fsdp", "deepspeed", "push_to_hub", "torch_compile", "ddp_timeout"):
        assert name in other_fields()
    text = " ".join(parse_once().format_help().split())
    hints = get_type_hints(TrainingArguments)
    for name in other_fields():
        enums = [part for part in get_args(hints[name]) if isinstance(part, type) and issubclass(part, Enum)]
        values = ", ".join(member.value for enum in enums for member in enum)
        assert f"--{name} {{{values}}}" if values else f"--{name} " in text
    for line in (
        "--adam_beta1 float",
        "--ddp_backend {nccl, gloo, mpi, ",
        "--run_name str",
        "--save_strategy {no, steps, epoch, best}",
    ):
        assert line in text
    assert "Also --num_train_epochs" in text
    assert "{float32,bfloat16,float16,auto}" in text
    assert "{exact,first_order" in text.replace("auto,", "")


def test_both_names_at_once() -> None:
    message = "epochs=1.0 and num_train_epochs=2.0 are two names of one setting: give one of them"
    assert refusal("--epochs", "1", "--num_train_epochs", "2") == message
    assert train_command.parse(["--epochs", "2", "--num_train_epochs", "2"])[0].epochs == 2
    assert "two forms of one setting" in refusal("--warmup_steps", "5", "--warmup_ratio", "0.1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["pairs.jsonl"], "'pairs.jsonl' is a file of pairs and no configuration: give pairs with --pairs pairs.jsonl"),
        (["--epochs", "1", "a.csv"], "unrecognized arguments: a.csv. Give pairs with --pairs a.csv"),
        (["--optm", "sgd"], "unrecognized arguments: --optm sgd. Did you mean 'optim'?"),
        (["--lerning_rate", "1"], "Did you mean 'learning_rate'?"),
        (["--hub_token", "secret"], "hub_token is not accepted: it would stand in the run's files"),
        (["--trust_remote_code"], "trust_remote_code is not accepted"),
        (["--resume_from_checkpoint", "x"], "--resume false starts anew"),
        (["--use_peft", "false", "--lora_r", "8"], "use_peft is false and lora_r is 8"),
        (["--load_in_4bit", "--model", "x"], "quantised weights cannot be trained: train adapters on them"),
        (["--load_in_4bit", "--load_in_8bit", "--lora_r=2"], "exclude each other"),
        (["--attn_implementation", "org/kernel"], "would run code from the Hub"),
        (["--model_revision", "main"], "is of a name on the Hub, and model is tiny"),
        (["--eval_delay", ".nan"], "eval_delay cannot be nan"),
        (["--lora_dropout", "1.0"], "lora_dropout must be in [0, 1)"),
        (["--rho", "abc"], "rho must be a number, got 'abc'"),
        (["--max_steps", "1.5"], "max_steps must be a whole number, got '1.5'"),
        (["--train_layers", "two"], "train_layers must be a whole number or null, got 'two'"),
        (["--strict", "maybe"], "strict must be true or false, got 'maybe'"),
        (["--objective_settings", "3"], "objective_settings must be a mapping, such as {name: value}, got '3'"),
    ],
)
def test_what_is_refused_says_what_to_do(line: list[str], message: str) -> None:
    assert message in refusal(*line)


def test_a_file_of_pairs_in_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(' [{"prompt": "a"}]')
    assert "give pairs with --pairs" in refusal(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text('{"epochs": 3}')
    assert train_command.parse([str(tmp_path / "b.json")])[0].epochs == 3


def test_values_of_another_type_and_of_another_backend() -> None:
    with pytest.raises(ConfigError, match="save_total_limit must be a whole number or null, got 'few'"):
        typed_values({"save_total_limit": "few"})
    assert typed_values({"adam_epsilon": "1e-9", "fsdp": True}) == {"adam_epsilon": 1e-9, "fsdp": True}
    words = train_command.parse(["--save_strategy", "no", "--run_name", "2.10", "--fsdp", "true"])[0]
    assert typed_values(words.training_arguments) == {"save_strategy": "no", "run_name": "2.10", "fsdp": True}
    assert typed_values({"push_to_hub": False}) == {"push_to_hub": False}
    from gapo.runs.train.loop import require_supported

    for line in (["--optim", "sgd"], ["--use_dora"], ["--dtype", "float16"], ["--bf16"], ["--lora_r=2"]):
        config, step = train_command.parse([*line, "--backend", "jax"])
        with pytest.raises(ConfigError, match=f"{line[0][2:].split('=')[0]}=.* needs backend torch: leave it out"):
            require_supported(config, step)
    config, step = train_command.parse(["--backend", "jax", "--bf16", "false", "--gradient_checkpointing", "false"])
    assert require_supported(config, step).bf16 is False


def test_defaults_fit_the_kind_of_run(tmp_path: Path) -> None:
    def defaults(*line: str) -> tuple[float, float, str]:
        config, step, text = train_command._parsed(line)
        return config.learning_rate, step.rho, text

    assert defaults() == (1e-3, 0.3, "defaults for a tiny model: learning_rate 0.001, rho 0.3")
    assert defaults("--model", "m") == (5e-7, 0.025, "defaults for all weights: learning_rate 5e-07")
    assert defaults("--model", "m", "--lora_r", "4")[0] == 5e-6
    assert defaults("--learning_rate", "1", "--rho", "0.025") == (1, 0.025, "")
    for line in (["--target_gap", "0.3"], ["--loss", "simpo"], ["--loss", "dpo"]):  # none reads rho
        assert defaults(*line)[1] == 0.025
    assert defaults("--loss", "gapo+dpo")[1] == 0.3


def test_settings_are_saved_flat_and_read_again(tmp_path: Path) -> None:
    config, step = train_command.parse(["--optim", "sgd", "--lr_scheduler_kwargs", '{"a": [1]}', "--model", "x"])
    saved = as_dict(config, step)
    assert saved["optim"] == "sgd"
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert train_command.parse([str(tmp_path / "config.json")]) == (config, step)


def test_steps_when_the_last_batch_is_dropped() -> None:
    config: dict[str, Any] = {"batch_size": 8, "accumulation": 2}
    assert steps_per_epoch(TrainConfig(**config), 36) == 3  # 5 batches
    dropped = TrainConfig(**config, training_arguments={"dataloader_drop_last": True})
    assert steps_per_epoch(dropped, 36) == 2  # 4 batches


def test_a_training_that_had_ended_gives_its_best_checkpoint_where_that_is_asked(tmp_path: Path) -> None:
    last, loaded = tmp_path / "checkpoint-4", []
    last.mkdir()
    state = {"global_step": 4, "max_steps": 4, "best_model_checkpoint": str(tmp_path / "checkpoint-2")}
    (last / "trainer_state.json").write_text(json.dumps(state))
    trainer: Any = SimpleNamespace(state=SimpleNamespace(), _load_from_checkpoint=loaded.append)
    for best in (True, False):
        trainer.args = SimpleNamespace(load_best_model_at_end=best)
        assert train_torch._load_if_finished(trainer, str(last))
    assert loaded == [str(tmp_path / "checkpoint-2"), str(last)]


ACCURACY, MARGIN = "eval_rewards/accuracies", "eval_rewards/margins"


def test_a_run_that_learnt_nothing_says_what_to_try() -> None:
    steps: list[dict[str, Any]] = [{"margins": [-0.5, 0.5], "anchor_gaps": [0.0, 0.1]}]  # spread 0.5 nats per token

    def line(after: dict[str, float], **settings: Any) -> str | None:
        config = TrainConfig(learning_rate=1e-6)
        return unmoved({ACCURACY: 0.5, MARGIN: 0.0}, after, steps, config, GAPOConfig(beta=2.0, **settings))

    text = line({ACCURACY: 0.51, MARGIN: 0.04})  # 0.02 nats per token, 4 % of the spread
    assert text is not None
    assert "0.500 -> 0.510" in text
    assert "4.0% of the spread" in text
    assert "learning_rate (1e-05), more steps, target_gap in place of rho" in text
    assert "target_gap" not in str(line({ACCURACY: 0.51, MARGIN: 0.04}, target_gap=0.2))
    assert line({ACCURACY: 0.51, MARGIN: 0.06}) is None
    assert line({ACCURACY: 0.53, MARGIN: 0.0}) is None
    assert line({ACCURACY: 0.45, MARGIN: -0.1}) is None  # it has moved, if the wrong way
    assert line({ACCURACY: 0.51, MARGIN: float("nan")}) is None


@pytest.mark.parametrize(
    "name", ["/gone/model", "./gone", "../gone", "~/gone", "a/b/c", "gone/", "there/gone", "gone.jsonl", "x/gone.csv"]
)
def test_a_local_name_that_is_not_there_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model: \S+ does not exist, neither as a file nor as a folder"):
        require_there("model", name)
    for other in ("org/model", "model", "there/mine", None):
        require_there("model", other)


@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (404, "RepoNotFound", "the Hub has no model of that name that you may read"),
        (None, "", r"the Hub cannot be asked for a model of that name \(ConnectError\)"),
        (200, "", None),
        (429, "", None),  # loading tells
    ],
)
def test_a_name_that_is_no_folder_is_asked_of_the_hub_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int | None, code: str, why: str | None
) -> None:
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "models" in self.path:  # the library also asks for names of agents
                asked.append(self.path)
            self.send_response(status or 500)
            self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(b'{"id": "mine"}')

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        if status is not None:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
        else:
            server.server_close()
        try:
            if why is None:
                require_model("model", "mine")
            else:
                with pytest.raises(ConfigError, match=f"model: 'mine' is no folder here, and {why}: give the path of"):
                    require_model("model", "mine")
        finally:
            if status is not None:
                server.shutdown()
                thread.join()
    assert asked == ([] if status is None else ["/api/models/mine"])
    folder = tmp_path / "models--mine"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    require_model("model", "mine")  # of the cache, where nobody is asked
    assert len(asked) <= 1


def test_offline_a_name_that_is_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    output = ["--output", str(tmp_path / "o.jsonl")]
    for line in (
        ["train", "--model", "mine", "--output_dir", str(tmp_path / "run")],
        ["train", "--tokenizer", "mine", "--output_dir", str(tmp_path / "run")],
        ["score", str(tmp_path / "p.jsonl"), "--model", "mine", *output],
        ["generate", str(tmp_path / "p.jsonl"), "--model", "mine", *output],
    ):
        assert cli.main(line) == 1
        assert "'mine' is no folder here, and the Hub cannot be asked" in capsys.readouterr().err


def test_errors_need_no_framework_and_no_usage(tmp_path: Path) -> None:
    code = """
import sys
from gapo import cli
lines = [
    ["train", "--optm", "sgd"], ["train", "--pairs", "gone.jsonl"], ["train", "--model", "./gone"],
    ["score", "gone.jsonl", "--model", "x", "--output", "s.jsonl"],
    ["score", "CODE", "--model", "./gone", "--output", "s.jsonl"], ["score", "--rho", "0.1"], ["score", "--rh", "1"],
    ["flip", "gone.jsonl", "--output", "a.jsonl"], ["flip"], ["tune"],
    ["generate", "gone.json", "--model", "x", "--output", "a.jsonl"], ["generate", "--modl", "x"],
]
for line in lines:
    try:
        status = cli.main([__file__ if word == "CODE" else word for word in line])
    except SystemExit as end:
        status = end.code
    print("status", status)
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
    (tmp_path / "a.py").write_text(code)
    done = subprocess.run([sys.executable, "a.py"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert re.findall(r"status (.)", done.stdout) == list("211112212212")
    lines = done.stderr.splitlines()
    assert len(lines) == 12
    assert all("error: " in line and "usage" not in line for line in lines)


def run_folder(path: Path, processes: int = 1, **settings: Any) -> Path:
    path.mkdir()
    (path / "pairs.json").write_text(json.dumps({"processes": processes}))
    saved = as_dict(TrainConfig(batch_size=4, max_length=77), GAPOConfig(rho=0.4, beta=3.0)) | settings
    (path / "config.json").write_text(json.dumps(saved))
    return path


def test_a_score_takes_the_settings_of_the_run(tmp_path: Path) -> None:
    run, other = run_folder(tmp_path / "a", processes=2), run_folder(tmp_path / "b", rho=0.5)
    (run / "model").mkdir()
    (run / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    line = ["p.jsonl", "--output", "s.jsonl"]
    for name in ("model", "checkpoints", "checkpoints/checkpoint-2", "."):
        config, step, text = score_command._parsed([*line, "--model", str(run / name), "--beta", "2"])
        assert (step.rho, step.beta, config.max_length, config.batch_size) == (0.4, 2, 77, 8)
        assert f"settings of {run}: rho 0.4, max_length 77, batch_size 8" in text
    config, step, _ = score_command._parsed([*line, "--checkpoints", str(run), "--target_gap", "0.2"])
    assert (step.rho, step.target_gap, config.batch_size) == (0.025, 0.2, 8)
    assert score_command._parsed([*line, "--model", "org/model"])[2] == ""
    two = [*line, "--batch_size", "4", "--model", str(run / "model"), str(other)]
    with pytest.raises(ConfigError, match=r"different settings, rho 0\.4 and 0\.5 in b: give --rho"):
        score_command.parse(two)
    assert score_command.parse([*two, "--rho", "0.1"])[1].rho == 0.1


def test_columns_are_those_of_the_same_pairs(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "a", pairs=str(tmp_path / "p.jsonl"), columns={"prompt": "q"})
    (run / "model").mkdir()
    line = [str(tmp_path / "." / "p.jsonl"), "--output", "s.jsonl", "--model", str(run / "model")]
    assert score_command.parse(line)[0].columns == {"prompt": "q"}
    assert "columns" not in settings_of_runs([str(run)], "other.jsonl", ())[0]


def test_a_run_by_trls_names_and_again_from_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {n: v for n, v in quick_runs.QUICK.items() if n != "max_steps"}
    line = ["--num_train_epochs=0.3", "--optim", "sgd", "--learning_rate", "1e-9", "--use_peft", "--lora_r", "2"]
    line += ["--save_total_limit", "1"]
    settings = {**quick, "cache_dir": str(tmp_path / "cache")}
    del settings["learning_rate"]
    (tmp_path / "a.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(["train", str(tmp_path / "a.yaml"), *line, "--output_dir", str(first)]) == 0
    out = capsys.readouterr().out
    assert "nothing was learnt: held-out accuracy" in out
    assert "nothing was learnt" in (first / "report.html").read_text()
    assert len(list((first / "checkpoints").glob("checkpoint-*"))) == 1
    assert cli.main(["score", str(tmp_path / "gone.jsonl"), "--model", str(first), "--output", "s.jsonl"]) == 1
    assert cli.main(["train", str(first / "config.json"), "--output_dir", str(second)]) == 0
    assert "defaults for" not in capsys.readouterr().out
    assert (first / "steps.jsonl").read_bytes() == (second / "steps.jsonl").read_bytes()
    a, b = (json.loads((folder / "config.json").read_text()) for folder in (first, second))
    assert {name for name in a if a[name] != b[name]} == {"output_dir"}
    assert (a["optim"], a["lora_r"], a["save_total_limit"]) == ("sgd", 2, 1)
    # The run's folder stands for its model, with the settings of the run.
    from gapo.data import generate_pairs, write_rows

    write_rows(tmp_path / "p.jsonl", generate_pairs(4))
    assert (
        cli.main(["score", str(tmp_path / "p.jsonl"), "--model", str(first), "--output", str(tmp_path / "s.jsonl")])
        == 0
    )
    assert f"settings of {first}: rho 0.2" in capsys.readouterr().out
    sidecar = json.loads((tmp_path / "s.jsonl.json").read_text())
    assert (sidecar["rho"], sidecar["batch_size"], sidecar["models"]) == (0.2, 8, [str(first)])
    (first / "model").rename(first / "other")
    assert (
        cli.main(["score", str(tmp_path / "p.jsonl"), "--model", str(first), "--output", str(tmp_path / "t.jsonl")])
        == 1
    )
    assert "has not ended, and has no model yet" in capsys.readouterr().err
