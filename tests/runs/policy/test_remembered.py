"""Rows pass the frozen layers once in a training loop that is not ours, which ends with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from frameworks import require
from safetensors.torch import load_file

from gapo.adapters.hf.margins import pair_logps
from gapo.cli import main
from gapo.data import generate_pairs, write_rows
from gapo.runs.errors import ConfigError
from gapo.runs.policy.frozen import train_last
from gapo.runs.policy.remembered import remembered_states
from gapo.runs.train import train_torch


def counted(model: Any) -> list[int]:
    """A list that grows by the rows that the first layer computes."""
    rows: list[int] = []
    first = model.model.layers[0]
    forward = first.forward

    def count(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return forward(hidden, *args, **kwargs)

    first.forward = count
    return rows


def test_a_row_passes_the_frozen_layers_once_and_gets_the_same_gradients(tmp_path: Path) -> None:
    model = hf_models.make("llama", layers=3)
    train_last(model, 1)
    batches = [hf_models.batch(seed=seed, side=side) for seed, side in ((0, "right"), (1, "left"))]

    def grads() -> list[torch.Tensor]:
        out = []
        for batch in batches:
            model.zero_grad()
            chosen, rejected = pair_logps(model, batch)
            (chosen - rejected).sum().backward()
            out += [chosen.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return out

    plain = grads()
    rows = counted(model)
    with remembered_states(model, tmp_path):
        first, computed = grads(), sum(rows)
        later = grads()
        # The one comparison with a whole forward computes the rows of a batch again.
        assert sum(rows) - computed == 2 * len(batches[0]["chosen_input_ids"])
        again = sum(rows)
        grads()
        assert sum(rows) == again
    for x, y, z in zip(plain, first, later, strict=True):
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(z, x)
    grads()
    assert sum(rows) == again + computed  # afterwards the model is as it was
    assert not list(tmp_path.iterdir())


def test_layers_that_share_more_than_their_states_are_refused(tmp_path: Path) -> None:
    model = hf_models.make("llama", layers=3)
    train_last(model, 1)
    first, *_, last = model.model.layers
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda layer, args, output: seen.append(output))
    last.register_forward_hook(lambda layer, args, output: output + 5 * seen[-1])
    batch = hf_models.batch()
    with remembered_states(model, tmp_path), torch.no_grad():
        pair_logps(model, batch)
        with pytest.raises(ConfigError, match=r"the model computes other values from the states .*: its layers share"):
            pair_logps(model, batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("remembered")
    hf_models.make("llama", layers=3).save_pretrained(made / "model")
    hf_models.tokenizer().save_pretrained(made / "model")
    write_rows(made / "pairs.jsonl", generate_pairs(16, seed=0))
    return made


def trained(folder: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """The weights that two epochs of `gapo train` on the last layer leave."""
    command = ["train", "--pairs", str(folder / "pairs.jsonl"), "--model", str(folder / "model"), "--epochs", "2"]
    settings = ["--batch_size", "4", "--learning_rate", "1e-2", "--rho", "0.2", "--max_length", "64"]
    assert main([*command, *settings, "--train_layers", "1", "--output_dir", str(out), *more]) == 0
    return load_file(out / "model" / ("adapter_model.safetensors" if more else "model.safetensors"))


def test_gapo_train_trains_the_last_layers_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = trained(folder, tmp_path / "remembered")
    monkeypatch.setattr(train_torch, "remembered_states", lambda *call: train_torch.nullcontext())
    plain, first = trained(folder, tmp_path / "plain"), load_file(folder / "model" / "model.safetensors")
    for name, x in remembered.items():
        # Adam's steps are a learning rate long, whatever the gradient: where it is nearly 0, rounding decides.
        assert float((x - plain[name]).abs().mean()) < 1e-4, name
        assert torch.equal(x, first[name]) != ("layers.2." in name), name


def test_gapo_train_puts_adapters_on_the_last_layers_alone(folder: Path, tmp_path: Path) -> None:
    names = trained(folder, tmp_path, "--lora_r", "2")
    assert names
    assert all("layers.2." in name for name in names)


def test_other_backends_train_all_layers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("flax")
    command = ["train", "--pairs", str(folder / "pairs.jsonl"), "--backend", "jax", "--train_layers", "1"]
    assert main([*command, "--output_dir", str(tmp_path)]) == 1
    assert "train_layers=1 needs backend torch" in capsys.readouterr().err
