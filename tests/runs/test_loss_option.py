"""`gapo train --loss MODULE:FUNCTION`: a loss of the user's own, on every backend, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
from frameworks import require

from gapo import cli, data, files
from gapo.commands.train import parse
from gapo.config import GAPOConfig
from gapo.runs.errors import ConfigError
from gapo.runs.train import train as train_module
from gapo.runs.train.loss_option import code_digest, objective_of
from gapo.runs.train.train_config import TrainConfig

SQUARES = '''
from pathlib import Path
from gapo.objectives import Objective

Path(__file__).with_name("imported").touch()

def squares(logps, *, target=1.0):
    """(target - M)^2 of each pair."""
    return (target - logps.margins) ** 2

def cautious(logps):
    return -logps.anchor_gaps

cautious.needs_anchor = True
ready = Objective(name="ready", function=squares)
number = 3.0
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module `my_losses`."""
    (tmp_path / "my_losses.py").write_text(SQUARES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_losses", "broken", "needy", "nothing", "nothing.here"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_function_or_an_objective_of_a_module_in_the_current_directory(folder: Path) -> None:
    assert objective_of("my_losses:squares").__name__ == "squares"  # type: ignore[union-attr]
    assert objective_of("my_losses:ready").name == "ready"  # type: ignore[union-attr]
    assert objective_of("simpo") == "simpo"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("nothing:squares", r"there is no module 'nothing' in .* or among the installed packages"),
        ("nothing.here:squares", r"there is no module 'nothing' in"),
        ("my_losses:cubes", r"'my_losses' has no 'cubes'; it has .*squares, cautious"),
        ("my_losses:number", r"loss 'my_losses:number' is of type float: it must be a function of gapo.objectives.Log"),
        ("my_losses:Objective", r"is of type class: it must be a function"),
        ("broken:f", r"importing 'broken' raised SyntaxError: .*broken.py, line 1"),
        ("needy:f", r"importing 'needy' raised ModuleNotFoundError: No module named 'absent_library'"),
    ],
)
def test_what_is_no_loss_is_told_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], loss: str, message: str
) -> None:
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "needy.py").write_text("import absent_library\n")
    with pytest.raises(ConfigError, match=message):
        objective_of(loss)
    assert cli.main(["train", "--loss", loss, "--output_dir", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gapo train: error: loss ")
    assert not (folder / "run").exists()


@pytest.mark.parametrize("loss", ["my_losses", "my_losses:", ":squares", "my losses:f", "my_losses:f()", "a/b.py:f"])
def test_another_form_is_no_loss(loss: str) -> None:
    with pytest.raises(ValueError, match=r"loss must be one of 'gapo', .*; or MODULE:FUNCTION"):
        TrainConfig(loss=loss)


def test_a_file_names_code_only_with_trust_on_the_command_line(folder: Path) -> None:
    (folder / "a.yaml").write_text("loss: my_losses:squares\nloss_settings: {target: 2.0}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: loss 'my_losses:squares' is code.*give --trust_code true"):
        parse(["a.yaml"])
    with pytest.raises(ConfigError, match="is code"):
        parse(["a.yaml", "--trust_code", "false"])
    assert not (folder / "imported").exists()
    (folder / "b.yaml").write_text("loss: my_losses:squares\ntrust_code: true\n")
    for more in ([], ["--trust_code=true"], ["--loss=my_losses:squares"]):
        with pytest.raises(ConfigError, match=r"b\.yaml: trust_code is accepted on the command line alone"):
            parse(["b.yaml", *more])
    with pytest.raises(ConfigError, match=r"unrecognized arguments: --conf a\.yaml"):  # no way around by abbreviation
        parse(["--conf", "a.yaml"])
    assert not (folder / "imported").exists()
    for trusted in (["--trust_code", "true"], ["--trust_code"], ["--loss", "my_losses:squares"]):
        assert parse(["a.yaml", *trusted])[0].loss == "my_losses:squares"
    assert parse(["a.yaml", "--loss", "simpo", "--loss_settings", "{}"])[0].loss == "simpo"
    assert parse(["--loss=my_losses:squares", "--loss_settings.target=2"])[0].loss_settings == {"target": 2.0}
    with pytest.raises(ConfigError, match="objective 'squares' has no setting 'beta'; it takes target"):
        parse(["--loss=my_losses:squares", "--loss_settings.beta=2"])


@pytest.mark.parametrize("backend", ["torch", "jax", "mlx"])
def test_a_run_with_a_loss_of_the_users_own(folder: Path, backend: str) -> None:
    """The weights of its lines are minus the derivative of (1 - M)^2, worked out by hand."""
    require({"torch": "transformers", "jax": "flax", "mlx": "mlx_lm"}[backend])
    hf_models.make("llama").save_pretrained("model")
    hf_models.tokenizer().save_pretrained("model")
    data.write_rows("pairs.jsonl", data.generate_pairs(20))
    options = {"backend": backend, "model": "model", "pairs": "pairs.jsonl", "eval_fraction": 0.2, "max_steps": 2,
               "batch_size": 8, "eval_steps": 2, "logging_steps": 1, "max_length": 64, "output_dir": "run"}  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert cli.main(["train", *arguments, "--loss=my_losses:squares", "--learning_rate=1e-2"]) == 0
    steps = files.read_lines(folder / "run" / "steps.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        np.testing.assert_allclose(row["weights"], 2 * (1 - np.array(row["margins"])), atol=1e-4)
        assert "anchor_gaps" not in row
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["loss"], summary["needs_anchor"]) == ("my_losses:squares", False)
    before, after = summary["before"], summary["after"]
    assert before["eval_loss"] != after["eval_loss"]
    margin = before["eval_rewards/margins"] / GAPOConfig().beta
    assert before["eval_loss"] >= (1 - margin) ** 2 - 1e-5  # Jensen
    assert json.loads((folder / "run" / "config.json").read_text())["loss"] == "my_losses:squares"
    assert "loss my_losses:squares, without an anchor, on" in (folder / "run" / "report.html").read_text()


def test_a_run_is_not_resumed_with_another_loss(folder: Path) -> None:
    data.write_rows("pairs.jsonl", data.generate_pairs(20))
    run = TrainConfig(pairs="pairs.jsonl", output_dir="run", eval_fraction=0.2, loss="my_losses:squares")
    step, loaded = GAPOConfig(), train_module.load_data(run)
    identity = train_module._require_same_pairs(Path("run"), run, loaded)
    assert identity["loss"] == code_digest("my_losses:squares")
    train_module._write_settings(Path("run"), run, step, loaded, identity)
    assert train_module._require_same_pairs(Path("run"), run, loaded) == identity
    (folder / "my_losses.py").write_text(SQUARES.replace("** 2", "** 4"))
    with pytest.raises(ConfigError, match=r"the code of its loss 'my_losses:squares' has changed since it began"):
        train_module._require_same_pairs(Path("run"), run, loaded)
    other: Any = {"pairs": "pairs.jsonl", "output_dir": "run", "eval_fraction": 0.2}
    with pytest.raises(ConfigError, match=r"other settings \(loss: 'my_losses:squares' -> 'simpo'\)"):
        train_module._require_same_settings(Path("run"), TrainConfig(**other, loss="simpo"), step)
