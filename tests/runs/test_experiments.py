"""`gapo train` and `gapo flip`, as a user runs them."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import drifting
import numpy as np
import pytest
from frameworks import require
from quick_runs import Page, interrupt_at_step_3, train

from gapo import cli, data, files
from gapo.commands.train import make_parser, parse
from gapo.config import GAPOConfig
from gapo.data import collate
from gapo.runs.errors import ConfigError
from gapo.runs.options import known_keys
from gapo.runs.output import noise, plots
from gapo.runs.reference_cache import with_kept_reference
from gapo.runs.train import train_page as report
from gapo.runs.train.train_config import TrainConfig

SHARED = {"accumulation": 2, "weight_decay": 0.1}
_LIBRARY = {"jax": "flax", "mlx": "mlx_lm"}  # what `gapo train` needs for these backends


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that the tests only read."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="module")
def finished_on(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of a backend on the model of `finished`, by `SHARED` settings; tests only read it."""

    @cache
    def run(backend: str) -> Path:
        folder = tmp_path_factory.mktemp(backend)
        assert train(folder, backend=backend, model=str(finished / "run" / "model"), **SHARED) == 0
        return folder

    return run


def test_a_run_leaves_model_metrics_and_report(finished: Path) -> None:
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train_pairs"] == 60
    assert summary["flipped"] == 12
    assert summary["held_out_pairs"] == 200
    assert 0 <= summary["after"]["eval_rewards/accuracies"] <= 1
    assert summary["versions"]["torch"]
    metrics = files.read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics if "gapo/weight_mean" in row] == [1, 2, 3, 4]
    evaluations = [row for row in metrics if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    for row, name in ((evaluations[0], "before"), (evaluations[-1], "after")):
        assert {key: row[key] for key in summary[name]} == summary[name]
    steps = files.read_lines(run / "steps.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(len(row["weights"]) == len(row["is_flipped"]) == 8 for row in steps)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(run / "model").config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(run / "model").eos_token == "<|end|>"


def test_the_report_is_self_contained_and_follows_the_theme(finished: Path) -> None:
    text = (finished / "run" / "report.html").read_text()
    page = Page(text)
    assert page.counts["svg"] == 7
    assert page.links == []
    assert "script" not in page.counts
    assert "@import" not in text
    assert "url(http" not in text
    assert plots._INK not in text
    assert "currentColor" in text
    assert "prefers-color-scheme: dark" in text
    for heading in ("Reward accuracy", "Anchor gaps of the pairs", "Weight of flipped and of clean pairs"):
        assert heading in text
    ids = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(ids) == len(set(ids))  # pictures on one page must not share ids


def test_the_report_escapes_what_came_from_users(finished: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "steps.jsonl"):
        (run / name).write_text((finished / "run" / name).read_text())
    (run / "config.json").write_text(json.dumps({"pairs": evil}))
    (run / "data.txt").write_text(evil)
    text = report.render(run, json.loads((finished / "run" / "summary.json").read_text()))
    assert evil not in text
    assert text.count("&lt;script&gt;") == 2


def test_a_finished_run_is_not_overwritten_unasked(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "run" / "summary.json").read_bytes()
    assert train(finished) == 1
    error = capsys.readouterr().err
    assert "holds a finished run: give another output_dir, or --overwrite true" in error
    assert error.count("\n") == 1
    assert (finished / "run" / "summary.json").read_bytes() == before


def test_an_interrupted_run_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at_step_3(monkeypatch)
    options = {"cache_dir": str(finished / "cache")}
    assert train(tmp_path, **options) == 130
    monkeypatch.undo()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train(tmp_path, **options) == 0
    for name in ("steps.jsonl", "metrics.jsonl"):
        again, whole = (files.read_lines(folder / "run" / name) for folder in (tmp_path, finished))
        timed = re.compile("runtime|per_second|preparation|total_flos")
        for rows in (again, whole):
            for row in rows:
                for key in [key for key in row if timed.search(key)]:
                    del row[key]
        strip = [row for row in whole if "train_loss" not in row]
        assert [row for row in again if "train_loss" not in row] == strip


def test_an_unfinished_run_with_other_settings_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    config = json.loads((finished / "run" / "config.json").read_text())
    config |= {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert train(tmp_path, rho=0.7) == 1
    assert "holds an unfinished run with other settings (rho: 0.2 -> 0.7)" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["gapo", pytest.param("dpo", marks=pytest.mark.slow)])
def test_the_same_yaml_on_every_backend(
    finished: Path, finished_on: Callable[[str], Path], tmp_path: Path, loss: str
) -> None:
    """The same pairs, tokenizer and tiny model: all agree before; JAX and MLX share the order and stay near."""
    require("flax")
    require("mlx_lm")
    model = str(finished / "run" / "model")
    folders, summaries = {}, {}
    for backend in ("torch", "jax", "mlx"):
        if loss == "gapo":
            folder = finished_on(backend)
        else:
            folder = tmp_path / backend
            folder.mkdir()
            assert train(folder, backend=backend, model=model, loss=loss, loss_settings={"beta": 0.5}, **SHARED) == 0
        folders[backend] = folder
        summaries[backend] = json.loads((folder / "run" / "summary.json").read_text())
        assert "Reward accuracy" in (folder / "run" / "report.html").read_text()
    if loss == "dpo":  # the policy is the reference yet
        assert summaries["torch"]["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
        rows = [files.read_lines(folders[backend] / "run" / "metrics.jsonl") for backend in ("jax", "mlx")]
        for line in zip(*rows, strict=True):  # in the same order, the same numbers
            for name in ("eval_loss", "eval_reference/margins", "reference/margins"):
                assert line[0].get(name, 0) == pytest.approx(line[1].get(name, 0), rel=1e-2, abs=2e-4), name
    for backend in ("jax", "mlx"):
        for name, value in summaries["torch"]["before"].items():
            if name == "eval_reference/accuracies":  # before the first step the log-ratios are rounding
                continue
            near = 1.5 / 200 if "accuracies" in name else 1e-4  # a pair whose margin is rounding counts either way
            assert summaries[backend]["before"][name] == pytest.approx(value, rel=1e-3, abs=near), (backend, name)
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        after = [summaries[backend]["after"][name] for backend in ("jax", "mlx")]
        assert after[0] == pytest.approx(after[1], rel=1e-3, abs=2e-4), name
        assert after[0] != pytest.approx(summaries["jax"]["before"][name], rel=1e-5), name
    # What JAX and MLX saved loads in PyTorch, and says the same there.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gapo.adapters.hf import PreferenceCollator
    from gapo.adapters.hf.margins import pair_logps

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = data.generate_pairs(200, seed=0, split="test")
    for backend in ("jax", "mlx"):
        loaded = AutoModelForCausalLM.from_pretrained(folders[backend] / "run" / "model", dtype=torch.float32)
        with torch.no_grad():
            chosen, _ = pair_logps(loaded, PreferenceCollator(tokenizer, max_length=64)(rows))
        assert float(chosen.mean()) == pytest.approx(summaries[backend]["after"]["eval_logps/chosen"], rel=1e-3)


@pytest.mark.parametrize("loss", ["gapo", pytest.param("drifting:drifting", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_other_backends_resume_too(
    finished: Path,
    finished_on: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    loss: str,
) -> None:
    from gapo.runs.train import loop

    require(_LIBRARY[backend])
    options = {"model": str(finished / "run" / "model"), "backend": backend, **SHARED}
    trusted = () if loss == "gapo" else ("--trust_code=true",)
    if loss == "gapo":
        whole = finished_on(backend)
    else:  # whose running statistic goes on from micro-batch to micro-batch
        whole = tmp_path / "whole"
        whole.mkdir()
        monkeypatch.chdir(Path(drifting.__file__).parent)
        options |= {"loss": loss, "max_steps": 4}
        assert train(whole, *trusted, **options) == 0
    plain = loop.step_line

    def interrupted(step: int, *args: Any) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return plain(step, *args)

    monkeypatch.setattr(loop, "step_line", interrupted)
    assert train(tmp_path, *trusted, **options) == 130
    monkeypatch.undo()
    assert train(tmp_path, *trusted, **options) == 0
    for name in ("steps.jsonl", "metrics.jsonl"):
        rows = [files.read_lines(folder / "run" / name) for folder in (whole, tmp_path)]
        assert rows[0] == rows[1], name


def test_reference_log_probs_are_those_of_the_start_also_after_resuming(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gapo.runs.train import train_torch
    from gapo.runs.train.recorder import Recorder

    options = {"model": str(finished / "run" / "model"), "loss": "dpo", "learning_rate": 0.05, "flip_rate": 0.0}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert train(tmp_path / "whole", **options) == 0
    metrics = files.read_lines(tmp_path / "whole" / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference at the first step
    assert abs(losses[-1] - math.log(2)) > 1e-3
    text = (tmp_path / "whole" / "run" / "report.html").read_text()
    assert re.search(r'class="lead">.*: loss dpo, without an anchor, on\s+60 pairs', text)
    assert "margin minus the reference&#39;s, nats" in text
    assert "compares the policy with its own anchor" not in text
    right = [row["eval_reference/accuracies"] for row in metrics if "eval_loss" in row]
    assert right[-1] > 0.6

    plain = Recorder.on_step

    def interrupted(self: Any, result: Any, batch: Any) -> None:
        plain(self, result, batch)
        if self._step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "on_step", interrupted)
    assert train(tmp_path / "cut", **options) == 130
    monkeypatch.undo()
    kept = tmp_path / "cut" / "run" / "reference.safetensors"
    before = kept.read_bytes()

    def measured_anew(*args: Any) -> Any:
        raise AssertionError("a resumed run measured its reference anew")

    monkeypatch.setattr(train_torch, "summed_logps", measured_anew)
    assert train(tmp_path / "cut", **options) == 0
    assert kept.read_bytes() == before == (tmp_path / "whole" / "run" / "reference.safetensors").read_bytes()
    again = files.read_lines(tmp_path / "cut" / "run" / "metrics.jsonl")
    assert [row["loss"] for row in again if "loss" in row] == losses

    with pytest.raises(ConfigError, match="holds the reference log-probabilities of other pairs"):
        with_kept_reference([{name: [1] for name in collate.TOKENIZED}], [], None, kept, pad_token_id=0, batch_size=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "dpo", "loss_settings": {"gamma": 1}}, r"objective 'dpo' has no setting 'gamma'; it takes beta"),
        ({"loss": "ipo", "loss_settings": {"tau": -1}}, "tau must be a finite number > 0, got -1.0"),
        (
            {"loss": "simpo", "loss_settings": {"beta": 1}},
            "objective 'simpo' takes beta and gamma from gapo.GAPOConfig",
        ),
        ({"loss": "dpo", "beta": 0.5}, r"beta=0.5 is a setting of gapo and simpo.*--loss_settings.beta 0.1"),
    ],
)
def test_settings_of_a_loss_are_checked(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=message):
        parse([str(tmp_path / "a.yaml")])


def test_settings_of_a_loss_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("loss: rdpo\nloss_settings: {beta: 0.3}\nbeta: 2.0\n")
    run, step = parse([str(tmp_path / "a.yaml"), "--loss_settings.label_smoothing", "0.2"])
    assert (run.loss_settings, step.beta) == ({"beta": 0.3, "label_smoothing": 0.2}, 2.0)
    run, _ = parse(["--loss", "dpo", "--loss_settings.beta=0.01"])
    assert run.loss_settings == {"beta": 0.01}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax", "lora_r": 2}, "lora_r=2 needs backend torch: leave it out with backend jax"),
        ({"backend": "jax", "drift": True}, "drift=True needs backend torch: leave it out"),
        ({"backend": "mlx", "bf16": True}, "bf16=True needs backend torch"),
        ({"backend": "jax", "scheduler": "polynomial"}, "scheduler must be one of 'cosine', 'linear', 'constant'"),
    ],
)
def test_what_other_backends_cannot(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    require(_LIBRARY[options["backend"]])
    assert train(tmp_path, model=str(finished / "run" / "model"), **options) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "library"),
    [
        ("train x.yaml", "jsonargparse"),
        pytest.param("train --output_dir=new", "matplotlib", marks=pytest.mark.slow),
        ("train --output_dir=new", "jinja2"),
        pytest.param("study --pairs=new.jsonl --output_dir=new", "scipy", marks=pytest.mark.slow),
        pytest.param("score pairs.jsonl --model=model --output=scores.jsonl", "jinja2", marks=pytest.mark.slow),
    ],
)
def test_a_library_of_the_command_line_that_is_not_installed_is_named_before_any_work(
    tmp_path: Path, command: str, library: str
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    code = f"import sys; sys.modules[{library!r}] = None; from gapo.cli import main; sys.exit(main({command.split()}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    name = command.split()[0]
    extra = "study" if name == "study" else "cli"
    expected = f'gapo: error: gapo {name} needs {library}, which is not installed: pip install "gapo[{extra}]"\n'
    assert done.stderr.endswith(expected)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "model"}


@pytest.mark.parametrize(("backend", "extra"), [("jax", "flax"), ("mlx", "mlx-lm")])
def test_a_backend_that_is_not_installed_is_named_before_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str, extra: str
) -> None:
    monkeypatch.delitem(sys.modules, f"gapo.runs.train.train_{backend}", raising=False)
    monkeypatch.setitem(sys.modules, {"jax": "jax", "mlx": "mlx.core"}[backend], None)
    assert train(tmp_path, backend=backend) == 1
    assert f'which is not installed: pip install "gapo[{extra}]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_simpo_and_lora_and_files(finished: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}? ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    data.write_rows(tmp_path / "pairs.jsonl", [*rows, {"prompt": "x", "chosen": "", "rejected": "y"}])
    model = str(finished / "run" / "model")
    options = {"pairs": str(tmp_path / "pairs.jsonl"), "eval_fraction": 0.2, "model": model, "lora_r": 2}
    options["lora_targets"] = "q_proj, v_proj"
    assert train(tmp_path, loss="simpo", **options) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "loss simpo, without an anchor, on" in text
    assert "1 x column &#39;chosen&#39; is empty (line 41)" in text
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    steps = files.read_lines(tmp_path / "run" / "steps.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:  # SimPO's weight by hand, and no anchor
        pulls = 2.5 / (1 + np.exp(2.5 * np.array(row["margins"]) - 0.25))
        np.testing.assert_allclose(row["weights"], pulls, atol=1e-4)
        assert "anchor_gaps" not in row


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"pairs": "gone.jsonl"}, 1, "gone.jsonl does not exist"),
        ({"rho": -1.0}, 2, "rho must be a finite number >= 0, got -1.0"),
        ({"batch_size": 0}, 2, "batch_size must be > 0, got 0"),
        ({"flip_rate": 2.0}, 2, r"flip_rate must be in \[0, 1\], got 2.0"),
        ({"learning_rat": 1.0}, 2, "Did you mean 'learning_rate'"),
        ({"loss": "orpo"}, 2, "loss must be one of 'gapo', 'simpo', .*'unhinged', got 'orpo'"),
        ({"epochs": "many"}, 2, "epochs"),
        ({"tiny_text": "gone.txt"}, 1, "tiny_text: gone.txt does not exist"),
        ({"model": "no/such-model"}, 1, "no/such-model"),
    ],
)
def test_errors_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], status: int, message: str
) -> None:
    assert train(tmp_path, **options) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "run" / "summary.json").exists()


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--debug", pairs="gone.jsonl") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("rho: 0.1\nbatch_size: 3\n")
    run, step = parse([str(path), "--rho", "0.2", "--flip_mode=length"])
    assert (run.batch_size, run.flip_mode, step.rho) == (3, "length", 0.2)
    run, step = parse([str(path), "--strict", "--bf16", "false", "--adaptive=false", "--overwrite"])
    assert (run.strict, run.bf16, step.adaptive, run.overwrite) == (True, False, False, True)
    with pytest.raises(ConfigError, match=r"there is no configuration file 'gone\.yaml'"):
        parse(["gone.yaml"])


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"rho: !!python/object/apply:pathlib.Path.touch [{tmp_path}/ran]\n")
    with pytest.raises(ConfigError):
        parse([str(tmp_path / "a.yaml")])
    assert not (tmp_path / "ran").exists()


def test_help_names_every_key_and_is_quick() -> None:
    text = make_parser().format_help()
    options = text[text.index("options:") :]
    for key in known_keys((TrainConfig, GAPOConfig)):
        last = f"--{key}+ " if f"--{key}+ " in options else f"--{key} "  # a list has two forms
        described = options.split(last)[1].split("--")[0]
        assert len(described.split("(type")[0].split()) >= 3, key
    done = subprocess.run([sys.executable, "-m", "gapo", "--help"], capture_output=True, text=True, check=True)
    assert "train" in done.stdout
    assert "flip" in done.stdout


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["tune"])
    assert exit_.value.code == 2
    assert "invalid choice: 'tune'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0


def test_flip_writes_marked_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.write_rows(tmp_path / "a.jsonl", data.generate_pairs(50))
    out = tmp_path / "b.jsonl.gz"
    assert cli.main(["flip", str(tmp_path / "a.jsonl"), "--rate", "0.3", "--seed", "4", "--output", str(out)]) == 0
    rows = data.read_pairs(out).rows
    assert sum(row["is_flipped"] for row in rows) == 15
    assert "15 of 50 labels are flipped" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["flip", str(tmp_path / "a.jsonl"), "--output", "b.txt"])
    assert cli.main(["flip", str(tmp_path / "gone.jsonl"), "--output", str(out)]) == 1


def test_the_tiny_model_does_not_know_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    from gapo.runs.models import tiny

    rows = data.generate_pairs(30)
    texts = tiny.answer_texts(rows)
    assert texts == tiny.answer_texts(data.flip_pairs(rows, rate=1.0))
    assert "".join(texts).count(rows[0]["prompt"]) >= 2
    monkeypatch.setattr(tiny, "_MOST_PAIRS", 10)  # of many pairs some are drawn
    drawn = tiny.answer_texts(rows)
    assert drawn == tiny.answer_texts(data.flip_pairs(rows, rate=1.0))
    assert len(drawn) == 20
    assert set(drawn) < set(texts)
    assert drawn != texts[:20]


def test_weight_diagnostics() -> None:
    weights = np.arange(10.0) + 1
    flipped = np.array([1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    found = noise.weight_diagnostics(weights, flipped)
    assert found["flipped_weight"] == 1.5
    assert found["clean_weight"] == 6.5
    assert found["flipped_weight_change"] == pytest.approx(1.5 / 6.5 - 1)
    assert found["flipped_share"] == 0.2
    assert found["flipped_share_in_lowest_fifth"] == 1
    assert found["flipped_share_in_highest_fifth"] == 0
    assert noise.weight_diagnostics(weights, np.zeros(10)) == {}


def test_files_are_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "second \ud800")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = files.JsonLines(tmp_path / "log.jsonl", until_step=2)
    log.write({"step": 3, "again": True})
    log.close()
    assert files.read_lines(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
