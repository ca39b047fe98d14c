"""Faults in training: what a step, a Trainer and `gapo train` leave behind where something fails."""

from __future__ import annotations

import ast
import gc
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faults_script
import hf_models
import nets
import numpy as np
import pytest
import torch
import trainers
from interrupts import interrupt_at
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

import gapo
from gapo import cli, files
from gapo.adapters.hf import GAPOCallback, PreferenceCollator
from gapo.adapters.hf.attachment import Attachment
from gapo.adapters.hf.checkpoints import last_whole_checkpoint
from gapo.adapters.hf.margins import pair_logps
from gapo.backends.torch import TorchBackend
from gapo.backends.torch.forward import TorchForward
from gapo.result import StepResult
from gapo.runs.train import loop
from gapo.runs.train.run_data import RunData
from gapo.runs.train.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)
NAN, INF = float("nan"), float("inf")


def take_step(model: nn.Module, batch: Any, one_pass: bool = True, **options: Any) -> Any:
    config = gapo.GAPOConfig(**{"rho": 0.3, **options})
    return gapo.value_and_grad(pair_logps, config, backend="torch", one_pass=one_pass)(model, batch)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@contextmanager
def failing(model: Any, where: str, error: type[BaseException], skip: int = 0) -> Iterator[None]:
    """Let the second layer raise: in the "clean" or "anchor" forward, in the first "backward" or in the "update"'s.

    `skip` clean forwards are let pass first.
    """
    forwards, backwards = [], []

    def fail(_: Any) -> None:
        backwards.append(1)
        if len(backwards) == {"backward": 1, "update": 2}[where]:
            raise error("here")

    def hook(layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        forwards.extend([1] * torch.is_grad_enabled())
        if len(forwards) <= skip:
            return
        if where in ("backward", "update"):
            if output.requires_grad:
                output.register_hook(fail)
        elif torch.is_grad_enabled() == (where == "clean"):
            raise error("here")

    handle = model.model.layers[1].mlp.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


WHERE = [("clean", True), ("anchor", True), ("backward", True)]
WHERE += [("clean", False), ("anchor", False), ("backward", False), ("update", False)]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("where", "one_pass"), WHERE)
def test_a_step_that_fails_leaves_the_model_as_it_was(where: str, one_pass: bool, error: type[BaseException]) -> None:
    model, batch = hf_models.make("llama", dropout=0.1).train(), hf_models.batch()
    take_step(model, batch, one_pass)  # what a model's first step finds out is known
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = weights_of(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with failing(model, where, error), pytest.raises(error, match="here") as kept:
        take_step(model, batch, one_pass)
    assert_same_weights(model, before)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert model.training
    # `kept` holds the traceback, as a notebook does. The next step, on another batch, knows nothing of it.
    other, results = hf_models.batch(4, seed=1), []
    fresh = hf_models.make("llama", dropout=0.1).train()
    take_step(fresh, batch, one_pass)
    for policy in (model, fresh):
        torch.manual_seed(0)
        results.append(take_step(policy, other, one_pass))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)
    assert torch.equal(results[0][0].anchor_gaps, results[1][0].anchor_gaps)
    assert kept.value.__traceback__ is not None
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


def test_a_step_refused_between_its_passes_leaves_no_hook_in_the_next() -> None:
    model, batch = hf_models.make("llama"), hf_models.batch(4, seed=1)
    step = gapo.value_and_grad(pair_logps, gapo.GAPOConfig(rho=0.3), backend="torch")
    with pytest.raises(ValueError, match=r"gamma must be a number or one for each of the 3 pairs") as kept:
        step(model, hf_models.batch(3), gamma=torch.zeros(7))
    (_, grads), (_, others) = step(model, batch), step(hf_models.make("llama"), batch)
    torch.testing.assert_close(grads, others, rtol=0, atol=0)
    assert kept.value.__traceback__ is not None  # as a notebook keeps it, and with it the step


def test_ctrl_c_at_any_line_while_the_weights_are_the_anchors() -> None:
    model, batch = hf_models.make("llama"), hf_models.batch()
    before = weights_of(model)
    codes = {f.__code__ for f in (TorchForward.at, TorchForward._while_moved, TorchForward._put_back)}
    for line in range(1, 200):
        sys.settrace(interrupt_at(line, codes))
        try:
            take_step(model, batch, perturb="norm", rho=5.0)
        except KeyboardInterrupt:
            continue
        finally:
            sys.settrace(None)
            assert_same_weights(model, before)
        break
    assert 30 < line < 199  # every line of the moving, the forward and the putting back was interrupted once


OPTIONS: dict[str, Any] = {
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


def make_trainer(folder: Path, **options: Any) -> Trainer:
    sft_weight = options.pop("sft_weight", 0.0)
    config = gapo.GAPOConfig(rho=0.3, sft_weight=sft_weight)
    trainer = trainers.make_trainer(folder, config=config, **{**OPTIONS, **options})
    if sft_weight:  # the two-pass step, too: the update's backward is then the Trainer's own
        Attachment.of(trainer)._backend = TorchBackend(one_pass=False)  # type: ignore[union-attr]
    return trainer


def logged(trainer: Trainer) -> list[dict[str, float]]:
    timed = re.compile("runtime|per_second|preparation|total_flos|train_loss")
    return [{k: v for k, v in row.items() if not timed.search(k)} for row in trainer.state.log_history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Trainer]:
    """Trainings that nothing happened to, without and with an SFT term."""
    trainers = {w: make_trainer(tmp_path_factory.mktemp("whole"), sft_weight=w) for w in (0.0, 0.1)}
    for trainer in trainers.values():
        trainer.train()
    return trainers


@pytest.mark.parametrize(
    ("where", "error", "sft_weight"),
    [
        ("clean", torch.OutOfMemoryError, 0.0),
        ("anchor", KeyboardInterrupt, 0.0),
        ("backward", RuntimeError, 0.0),
        ("update", KeyboardInterrupt, 0.1),
    ],
)
def test_a_trainer_goes_on_from_its_last_checkpoint(
    tmp_path: Path, whole: Any, where: str, error: type[BaseException], sft_weight: float
) -> None:
    trainer = make_trainer(tmp_path, sft_weight=sft_weight)
    # The second micro-step of the second step fails: one is in `.grad` and in the window of the logs already.
    with failing(trainer.model, where, error, skip=3), pytest.raises(error, match="here"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert_same_weights(trainer.model, load_file(tmp_path / "checkpoint-1" / "model.safetensors"))
    grads = [p.grad for p in trainer.model.parameters()]
    assert all(g is not None for g in grads)  # of the first micro-step; training again clears them
    trainer.train(resume_from_checkpoint=True)
    assert_same_weights(trainer.model, weights_of(whole[sft_weight].model))
    assert logged(trainer) == logged(whole[sft_weight])


def test_a_checkpoint_cut_short_is_passed_over(
    tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Trainer._save_optimizer_and_scheduler

    def fails(self: Trainer, folder: str) -> None:
        if self.state.global_step == 2:
            raise OSError("no space left")
        plain(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", fails)
    with pytest.raises(OSError, match="no space left"):
        make_trainer(tmp_path).train()
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert re.search(r"checkpoint-2 was not written to its end .* passed over", caplog.text)
    assert_same_weights(trainer.model, weights_of(whole[0.0].model))
    assert logged(trainer) == logged(whole[0.0])
    for step in (3, 2, 1):  # and where the state itself was cut
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(state.read_text()[:-10])
    with pytest.raises(ValueError, match=r"there is no whole checkpoint in .* to resume from"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "points", [("backward",), pytest.param(("checkpoint", "line"), marks=pytest.mark.slow)], ids=lambda names: names[0]
)
def test_gapo_train_goes_on_after_kill_9(tmp_path: Path, points: tuple[str, ...]) -> None:
    """Every night at each point; what the others leave, errors leave in the tests above and below."""
    command = [sys.executable, faults_script.__file__, str(tmp_path), *points]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes = json.loads((tmp_path / "codes.json").read_text())
    for point in points:
        assert (codes["whole"], codes[point], codes[f"{point} again"]) == (0, -9, 0)
        found, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in (point, "whole"))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        for name in ("steps.jsonl", "metrics.jsonl"):
            rows = [files.read_lines(tmp_path / folder / name) for folder in (point, "whole")]
            assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
            for key in ("weights", "gapo/weight_mean", "eval_loss"):
                assert [row.get(key) for row in rows[0]] == [row.get(key) for row in rows[1]]


class Toy:
    """A `loop.Trainee` of one weight and one running statistic, which the weight follows."""

    def __init__(self, fault: Callable[[int], None] = lambda step: None, loss: Callable[[int], float] = float) -> None:
        self.w, self._fault, self._loss = np.zeros(2), fault, loss
        self._running = np.float32(0)

    def train_step(self, batch: Any, learning_rate: float) -> Any:
        self._fault(int(self.w[0]) + 1)
        self._running = self._running + np.float32(0.1) * np.float32(batch["index"].sum())
        self.w = self.w + np.array([1, learning_rate * float(self._running)])
        loss, pairs = self._loss(int(self.w[0])), len(batch["index"])
        result = StepResult(loss=loss, margins=np.zeros(pairs), weights=np.ones(pairs), running={"mean": self._running})
        return {"loss": loss}, result

    def measured(self, batch: Any) -> tuple[tuple[np.ndarray, np.ndarray], None]:
        n = len(batch["chosen_labels"])
        return (np.full(n, -self.w[1]), np.full(n, -1.0)), None

    def state(self) -> dict[str, np.ndarray]:
        return {"w": self.w}

    def restore(self, arrays: dict[str, np.ndarray], running: Any) -> None:
        assert set(arrays) == {"w"}
        self.w, self._running = arrays["w"], running["mean"]

    def save(self, folder: Path) -> None:
        files.write_bytes(folder / "w", self.w.tobytes())


def run_loop(folder: Path, toy: Toy) -> None:
    rows = [{**row, "is_flipped": False} for row in hf_models.pairs(9)]
    options = {"batch_size": 2, "max_steps": 4, "eval_steps": 2, "save_steps": 1, "logging_steps": 1}
    config = TrainConfig(backend="jax", learning_rate=0.1, max_length=64, **options)
    loop.train(toy, config, gapo.GAPOConfig(), RunData(rows[:6], rows[6:], ""), hf_models.tokenizer(), folder)


@pytest.mark.parametrize("where", ["step", "checkpoint", "metrics"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_the_loop_of_other_backends_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    import safetensors.numpy

    run_loop(tmp_path / "whole", Toy())

    def raise_at_3(step: int) -> None:
        if step == 3:
            raise error("here")

    plain_save, plain_write = safetensors.numpy.save_file, files.JsonLines.write

    def save(arrays: Any, path: Path, metadata: dict[str, str]) -> None:
        plain_save(arrays, path, metadata=metadata)
        if metadata["step"] == "3":
            path.write_bytes(path.read_bytes()[:20])
        raise_at_3(int(metadata["step"]))

    def write(self: Any, row: dict[str, Any]) -> None:
        if row["step"] == 3:
            self._file.write('{"step": 3, "lo')
        raise_at_3(row["step"])
        plain_write(self, row)

    if where == "checkpoint":
        monkeypatch.setattr(safetensors.numpy, "save_file", save)
    if where == "metrics":
        monkeypatch.setattr(files.JsonLines, "write", write)
    with pytest.raises(error, match="here"):
        run_loop(tmp_path / "cut", Toy(raise_at_3 if where == "step" else lambda step: None))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["state.safetensors"]
    run_loop(tmp_path / "cut", Toy())
    for name in ("model/w", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_loss_that_is_not_finite_ends_the_loop_before_a_checkpoint(tmp_path: Path) -> None:
    toy = Toy(loss=lambda step: INF if step == 3 else 1.0)
    with pytest.raises(
        FloatingPointError, match=r"loss is inf in step 3: .* pairs \[\d, \d\].* goes on from .*state\.sa"
    ):
        run_loop(tmp_path, toy)
    with pytest.raises(FloatingPointError, match=r"loss is nan in step 1: .* No checkpoint was saved yet"):
        run_loop(tmp_path / "other", Toy(loss=lambda step: NAN))
    run_loop(tmp_path, toy := Toy())
    assert toy.w[0] == 4  # two steps before, two after: step 3 was done again


@pytest.mark.parametrize("anchor", ["exact", "first_order"])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(name: str, value: float, anchor: str) -> None:
    model, batch = hf_models.make("llama"), hf_models.batch()
    unused = next(i for i in range(1, hf_models.VOCAB) if all(i not in x for x in batch.values()))
    row = unused if "embed" in name else 5  # that of a token which does not occur: the clean forward is finite
    with torch.no_grad():
        model.get_parameter(name)[row, 3] = value
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match=rf"not finite in the .* forward; weights of '{name}' were not before"):
        take_step(model, batch, anchor=anchor)
    for key, x in model.state_dict().items():
        torch.testing.assert_close(x, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["clean", "anchor"])
def test_logits_that_are_not_finite_name_the_pairs(where: str, value: float) -> None:
    model, batch = hf_models.make("llama"), hf_models.batch()

    def spoil(layer: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return (
            logits.index_fill(0, torch.tensor([4]), value) if torch.is_grad_enabled() == (where == "clean") else logits
        )

    model.lm_head.register_forward_hook(spoil)
    before = weights_of(model)
    hint = "look at these pairs' tokens" if where == "clean" else "rho=0.3 moves the weights too far"
    with pytest.raises(
        FloatingPointError, match=rf"margins of pairs \[1\] are not finite in the {where} forward; {hint}"
    ):
        take_step(model, batch)  # row 4 of the 6 is the rejected answer of pair 1
    assert_same_weights(model, before)


@pytest.mark.parametrize("one_pass", [True, False])
def test_a_probe_gradient_that_is_not_finite(one_pass: bool) -> None:
    model = hf_models.make("llama")
    before = weights_of(model)
    model.model.layers[1].mlp.register_forward_hook(
        lambda layer, args, y: y.register_hook(lambda g: g * NAN) and None if y.requires_grad else None
    )
    with pytest.raises(
        FloatingPointError, match=r"the probe gradient of 'model\.\S+' is not finite; no weight was cha"
    ):
        take_step(model, hf_models.batch(), one_pass)
    assert_same_weights(model, before)


@pytest.mark.parametrize("objective", ["gapo", "simpo"])
@pytest.mark.parametrize(("value", "whose"), [(NAN, r"all parameters \(clipping"), (INF, "'lm_head.weight'")])
def test_a_gradient_that_is_not_finite_reaches_no_optimizer(
    tmp_path: Path, objective: str, value: float, whose: str
) -> None:
    trainer = make_trainer(tmp_path, callback={"objective": objective})
    before = weights_of(trainer.model)
    trainer.model.lm_head.weight.register_hook(lambda g: g + value)  # the head is not perturbed: no probe sees it
    with pytest.raises(FloatingPointError, match=f"the gradient of {whose}.* no weight was changed"):
        trainer.train()
    assert_same_weights(trainer.model, before)
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.filterwarnings("ignore:first_order_ratio")  # which it says of so large a radius
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("rho", [1e20, 3e38])
def test_a_huge_rho_is_named_and_a_large_one_is_finite(rho: float, adaptive: bool) -> None:
    model = hf_models.make("llama")
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match=re.escape(f"anchor forward; rho={rho} moves the weights too far")):
        take_step(model, hf_models.batch(), rho=rho, adaptive=adaptive)
    result, grads = take_step(model, hf_models.batch(), rho=1e6, adaptive=adaptive)
    assert float(result.anchor_gaps.abs().max()) > 100
    assert torch.isfinite(result.loss)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert_same_weights(model, before)


def test_answers_of_one_token() -> None:
    model = hf_models.make("llama")
    rows = [
        {f"{side}_input_ids": [3, 4, token] for side, token in (("chosen", 7 + i), ("rejected", 8 + i))}
        | {f"{side}_labels": [-100, -100, token] for side, token in (("chosen", 7 + i), ("rejected", 8 + i))}
        for i in range(2)
    ]
    batch = PreferenceCollator(hf_models.tokenizer())(rows)
    result, grads = take_step(model, batch)
    logps = model(torch.tensor([[3, 4]])).logits[0, -1].log_softmax(-1).detach()
    torch.testing.assert_close(result.margins, torch.stack([logps[7] - logps[8], logps[8] - logps[9]]))
    assert max(float(g.abs().max()) for g in grads.values()) > 0


def test_a_pair_of_equal_answers_teaches_nothing() -> None:
    model, batch = hf_models.make("llama").double(), hf_models.batch(3)
    alone = {name: x[:2] for name, x in batch.items()}
    for part in ("input_ids", "attention_mask", "labels"):
        batch[f"rejected_{part}"][2] = batch[f"chosen_{part}"][2]
    (result, grads), (two, others) = (take_step(model, b, probe="margin") for b in (batch, alone))
    assert abs(float(result.margins[2])) < 1e-12
    assert abs(float(result.anchor_gaps[2])) < 1e-12
    torch.testing.assert_close(result.anchor_gaps[:2], two.anchor_gaps)
    for name, g in grads.items():  # a third of the mean, and nothing in it
        torch.testing.assert_close(g, others[name] * 2 / 3, rtol=1e-6, atol=1e-9)


def spoilt(key: str, value: int) -> dict[str, torch.Tensor]:
    batch = hf_models.batch()
    batch[key][1] = value
    return batch


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (spoilt("rejected_labels", -100), "row 4 of labels has no token that counts.*empty response"),
        (spoilt("chosen_labels", 500), "row 1 of labels holds a token id outside 0..95"),
        (spoilt("rejected_input_ids", 96), r"row 4 of input_ids .* outside 0..95.*resize_token_embeddings"),
        (spoilt("chosen_input_ids", -1), r"row 1 of input_ids .* outside 0..95"),
    ],
)
@pytest.mark.parametrize("make", [hf_models.make, hf_models.lora, lambda kind: nn.DataParallel(hf_models.make(kind))])
def test_rows_that_no_step_can_take(batch: Any, message: str, make: Any) -> None:
    model = make("llama")
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        take_step(model, batch)
    assert_same_weights(model, before)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_left_alone(training: bool) -> None:
    model = hf_models.make("llama", dropout=0.3).train(training)
    results = [take_step(model, hf_models.batch(), rho=0.0)[0] for _ in range(2)]
    assert model.training == training
    assert torch.equal(results[0].margins, results[1].margins) != training  # dropout draws anew, or is off
    assert all(torch.equal(r.anchor_gaps, torch.zeros(3)) for r in results)  # never noise in the gap


def test_a_trainer_of_frozen_parameters_says_so(tmp_path: Path) -> None:
    model = hf_models.make("llama").requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no trainable parameter \(all are frozen\): unfreeze some|empty parameter list"
    ):
        make_trainer(tmp_path, model=model).train()


class AddLate(TrainerCallback):
    """Adds a GAPOCallback when two steps are done."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.trainer.add_callback(GAPOCallback(gapo.GAPOConfig(rho=0.3)))


def test_a_callback_added_while_training_takes_over_at_the_next_step(tmp_path: Path) -> None:
    late = AddLate()
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="no")
    callback = trainers.callback_of(trainer)
    callback.detach()
    trainer.remove_callback(callback)
    trainer.compute_loss = lambda model, inputs, **_: -sum(pair_logps(model, inputs)).mean()
    trainer.add_callback(late)
    late.trainer = trainer
    trainer.train()
    radii = [row.get("gapo/radius") for row in trainer.state.log_history if "loss" in row]
    assert radii == [None, None, pytest.approx(0.3, rel=1e-4), pytest.approx(0.3, rel=1e-4)]
    assert json.dumps(trainer.state.stateful_callbacks["gapo"]["attributes"]["rho"]) == "0.3"


def test_detached_is_detached(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="no")
    callback = trainers.callback_of(trainer)
    callback.detach()
    trainer.compute_loss = lambda model, inputs, **_: -sum(pair_logps(model, inputs)).mean()
    trainer.train()
    assert not any("gapo/radius" in row for row in trainer.state.log_history)
    del trainer.compute_loss
    callback.attach(trainer)
    trainer.train()
    assert "gapo/radius" in trainer.state.log_history[0]


@pytest.mark.parametrize("first", [0, 1])
def test_two_trainers_of_one_model(tmp_path: Path, whole: Any, first: int) -> None:
    model = hf_models.make("gpt2", dropout=0.1)
    both = [make_trainer(tmp_path, model=model, max_steps=1, save_strategy="no") for _ in range(2)]
    alone = make_trainer(tmp_path, model=hf_models.make("gpt2", dropout=0.1), max_steps=1, save_strategy="no")
    for trainer in (both[1], alone):
        trainer.train()
    assert logged(both[1]) == logged(alone)
    assert_same_weights(model, weights_of(alone.model))
    for index in (first, 1 - first):
        trainers.callback_of(both[index]).detach()
    assert model.transformer.h[0].attn.attn_dropout.p == 0.1


@pytest.mark.filterwarnings("ignore")  # of torch.compile, about itself
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
        (lambda model: nn.DataParallel(nn.DataParallel(model)), "module.module."),
    ],
)
def test_wrapped_models_take_the_same_step(wrap: Any, prefix: str) -> None:
    model, batch = nets.Net(), hf_models.batch()
    result, grads = take_step(model, batch)
    found, others = take_step(wrap(model), batch)
    torch.testing.assert_close(found.anchor_gaps, result.anchor_gaps)
    torch.testing.assert_close(others, {f"{prefix}{name}": g for name, g in grads.items()})


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())  # isinstance asks for more, and may warn


class Counter(TrainerCallback):
    """Counts the live tensors after steps 5 and 15."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (5, 15):
            self.counts.append(live_tensors())


def test_no_tensors_gather_in_a_loop() -> None:
    model, counts = hf_models.make("llama"), []
    for step in range(15):
        for one_pass in (True, False):
            for anchor in ("exact", "first_order"):
                take_step(model, hf_models.batch(2 + step % 3, seed=step), one_pass, anchor=anchor)
        if step in (4, 14):
            counts.append(live_tensors())
    assert counts[1] - counts[0] < 10  # not one a step; other tests' may go meanwhile


def test_no_tensors_gather_in_a_trainer(tmp_path: Path) -> None:
    counter = Counter()
    # Until the next log the window keeps scalars of each step: as many after step 5 as after step 15.
    trainer = make_trainer(tmp_path, max_steps=15, logging_steps=10, save_strategy="no")
    trainer.add_callback(counter)
    trainer.train()
    assert counter.counts[1] - counter.counts[0] < 10


def test_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from gapo.commands import train

    for error in (MemoryError, torch.OutOfMemoryError):

        def fails(*_: Any, error: type[BaseException] = error) -> int:
            raise error("tried to allocate 2 GiB")

        monkeypatch.setattr(train, "main", fails)
        assert cli.main(["train"]) == 1
        assert re.fullmatch(
            r"gapo: error: out of memory \(tried to allocate 2 GiB\): lower batch_size or .* last checkpoint\n",
            capsys.readouterr().err,
        )


def load_long_run() -> Any:
    spec = importlib.util.spec_from_file_location("long_run", ROOT / "benchmarks" / "long_run.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def test_the_long_run_samples_memory_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long_run, output = load_long_run(), tmp_path / "out.csv"
    command = ["long_run.py", "--output", str(output), "--max-growth", "1e4", "--max-slowdown"]
    monkeypatch.setattr(sys, "argv", [*command, "5", "--steps", "40", "--pairs", "40"])
    assert long_run.main() == 0
    header, *rows = output.read_text().splitlines()
    assert header == ",".join(long_run.FIELDS)
    found = np.array([[float(x) for x in row.split(",")] for row in rows])
    assert found[:, 0].tolist() == list(range(1, 41))
    assert (found[:, 1] > 50).all()  # Python and torch alone take more
    assert (found[:, 3] > 0).all()
    assert (found[:, 4] > 0).all()
    assert "growth of resident memory, MiB in 1,000 steps" in capsys.readouterr().out
    assert np.isfinite(found[4::5, 5]).all()
    # Of samples whose growth is known: 3 MiB in 1,000 steps, and steps that take 10 % longer at the end. The machine's
    # own slowing down, which the yardstick shares, is none.
    steps = np.arange(1.0, 1001)
    late = steps > 500
    known = np.stack([steps, 500 + 0.003 * steps, 0 * steps, 0.1 + 0.01 * late, 0.2 + 0 * steps, 0 * steps + 0.02], -1)
    summary = long_run.summarise(known)
    assert summary["growth of resident memory, MiB in 1,000 steps"] == pytest.approx(3)
    assert summary["slowdown of a step against the yardstick"] == pytest.approx(0.1)
    shared = np.where(np.arange(6) == 5, known * np.where(late, 1.1, 1)[:, None], known)
    assert long_run.summarise(shared)["slowdown of a step against the yardstick"] == pytest.approx(0)
    monkeypatch.setattr(long_run, "train", lambda *_: known)
    for bounds, code in ((["4", "0.2"], 0), (["2", "0.2"], 1), (["4", "0.05"], 1)):
        monkeypatch.setattr(sys, "argv", [*command[:3], "--max-growth", bounds[0], "--max-slowdown", bounds[1]])
        assert long_run.main() == code


def test_every_row_of_the_page_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for path in {path for path, _ in named}:
        found = {
            node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert {name for other, name in named if other == path} <= found, path
    rows = [line for line in text.split("## A long run")[0].splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    for row in rows:
        assert "`tests/" in row or row.startswith("| What happens when"), row
