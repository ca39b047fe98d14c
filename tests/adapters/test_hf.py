"""GAPO in a plain `transformers.Trainer`: exact gradients, and every trap that findings on Trainer name."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from drifting import by_hand, drifting
from trainers import CONFIG, arguments, callback_of, make_trainer
from transformers import Trainer, TrainerCallback

import gapo
from gapo import GAPOConfig
from gapo.adapters.hf import GAPOCallback, PreferenceCollator, with_reference_logps
from gapo.adapters.hf.attachment import Attachment
from gapo.adapters.hf.batches import to_the_right
from gapo.adapters.hf.margins import pair_logps, stack_pairs
from gapo.objectives import OBJECTIVES, LogProbs

TRL_KEYS = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")} | {
    "logps/chosen",
    "logps/rejected",
}
GAPO_KEYS = {
    f"gapo/{name}"
    for name in (
        "anchor_gap_mean",
        "anchor_gap_std",
        "weight_mean",
        "weight_min",
        "weight_max",
        "radius",
        "changed_fraction",
    )
}


def oracle_gradient(model: Any, batch: dict[str, torch.Tensor], config: GAPOConfig) -> dict[str, torch.Tensor]:
    """Gradient of -mean log sigmoid(beta * (M - M_anchor) - gamma) by autograd, on copies: log-probs by log_softmax."""

    def margins(policy: Any) -> torch.Tensor:
        sides = []
        for side in ("chosen", "rejected"):
            ids, mask, labels = (batch[f"{side}_{part}"] for part in ("input_ids", "attention_mask", "labels"))
            logits = policy(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
            kept = labels[:, 1:] != -100
            picked = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
            sides.append((picked * kept).sum(-1) / kept.sum(-1))
        return sides[0] - sides[1]

    policy, anchor = copy.deepcopy(model), copy.deepcopy(model)
    policy.zero_grad()
    m = margins(policy)
    (-torch.nn.functional.logsigmoid(config.beta * m - config.gamma)).mean().backward(retain_graph=True)
    moved = {n: p for n, p in anchor.named_parameters() if "lm_head" not in n and p.requires_grad}
    g = {n: p.grad for n, p in policy.named_parameters() if n in moved}
    norm = torch.sqrt(sum(((p.detach() * g[n]) ** 2).sum() for n, p in moved.items()))
    with torch.no_grad():
        for n, p in moved.items():
            p += config.rho * p**2 * g[n] / norm
        anchored = margins(anchor)
    policy.zero_grad()
    (-torch.nn.functional.logsigmoid(config.beta * (m - anchored) - config.gamma)).mean().backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimiser step, before clipping."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.first:
            self.first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.first


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("steps", [1, 4])
def test_gradient_is_the_oracles_also_under_accumulation(tmp_path: Path, side: str, steps: int) -> None:
    model = hf_models.make("llama").double()
    before = copy.deepcopy(model)
    rows = hf_models.pairs(2 * steps)
    trainer = make_trainer(
        tmp_path,
        model,
        rows=rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=steps,
        max_grad_norm=0.0,
        max_steps=1,
    )
    collator = PreferenceCollator(hf_models.tokenizer(), max_length=64, padding_side=side)
    # "labels" in a batch makes a Trainer divide by their number instead of by the steps.
    trainer.data_collator = lambda rows: (lambda batch: {**batch, "labels": batch["chosen_labels"]})(collator(rows))
    order: list[Any] = []
    callback_of(trainer).on_step = lambda result, batch: order.append(batch)
    found = first_gradient(trainer)
    expected = [oracle_gradient(before, batch, CONFIG) for batch in order]
    assert len(order) == steps
    for name, gradient in found.items():
        mean = sum(e[name] for e in expected) / steps
        assert float((gradient - mean).norm() / mean.norm()) < 1e-6, name  # Llama's norm is float32 in a float64 model


def test_bfloat16_autocast_is_near_float32(tmp_path: Path) -> None:
    gradients = []
    for bf16 in (False, True):
        model = hf_models.make("llama")
        gradients.append(first_gradient(make_trainer(tmp_path, model, bf16=bf16, max_grad_norm=0.0)))
        assert model.dtype == torch.float32
    flat = [torch.cat([g.ravel() for g in found.values()]) for found in gradients]
    assert float((flat[0] - flat[1]).norm() / flat[0].norm()) < 0.1
    assert not torch.equal(*flat)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_gaps_under_bf16_of_weights_as_checkpoints_have_them(
    tmp_path: Path, adapters: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights on bfloat16's grid, which its autocast would round a small perturbation away from; against float64."""
    model = hf_models.lora("llama") if adapters else hf_models.make("llama")
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        p.data = (0.1 * torch.randn_like(p) if "lora_B" in name else p.data).bfloat16().float()
    exact = gapo.value_and_grad(pair_logps, GAPOConfig(rho=0.025), backend="torch")
    reference, found = copy.deepcopy(model).double(), []
    trainer = make_trainer(
        tmp_path,
        model,
        config=GAPOConfig(rho=0.025),
        bf16=True,
        max_steps=1,
        callback={"on_step": lambda result, batch: found.append((result, batch))},
    )
    with caplog.at_level(logging.INFO, "gapo"):
        trainer.train()
    ((result, batch),) = found
    expected = exact(reference, batch)[0].anchor_gaps
    torch.testing.assert_close(
        result.anchor_gaps.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max())
    )
    assert [r.getMessage() for r in caplog.records if "takes anchor=" in r.getMessage()] == [
        'anchor="auto" takes anchor="first_order": the forward computes with less than float32\'s precision'
    ]


def test_float16_takes_the_two_pass_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate puts float16's autocast within `forward`, where the backend does not see it; the adapter knows."""
    trainer = make_trainer(tmp_path)
    callback = callback_of(trainer)
    assert Attachment.of(trainer)._backend._one_pass
    callback.detach()
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    callback.attach(trainer)
    assert not Attachment.of(trainer)._backend._one_pass


def test_the_adapters_config_and_the_cores_for_one_another(tmp_path: Path) -> None:
    own = gapo.adapters.hf.GAPOConfig(output_dir=str(tmp_path), rho=0.07, report_to="none", use_cpu=True)
    assert GAPOCallback(own).config == GAPOConfig(rho=0.07)
    assert GAPOCallback(own, objective="gapo").config.rho == 0.07
    own.objective = "dpo"
    with pytest.raises(ValueError, match="config has objective='dpo'"):
        GAPOCallback(own)
    assert GAPOCallback(own, objective="dpo").objective == "dpo"
    with pytest.raises(TypeError, match=r"got gapo\.config\.GAPOConfig\. .*dataclasses\.asdict\(config\)"):
        gapo.adapters.hf.GAPOTrainer(hf_models.make("llama"), CONFIG)
    with pytest.raises(TypeError, match=r"must be a gapo\.GAPOConfig, got transformers\..*TrainingArguments"):
        GAPOCallback(arguments(tmp_path))


def test_a_target_gap_finds_a_radius_and_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for target, said in ((0.05, False), (1e-4, True)):
        caplog.clear()
        config = GAPOConfig(target_gap=target)
        trainer = make_trainer(tmp_path / str(target), config=config, logging_steps=1, max_steps=1)
        trainer.train()
        row = trainer.state.log_history[0]
        assert row["gapo/rho"] == pytest.approx(row["gapo/radius"], rel=1e-3)
        assert row["gapo/rho"] > 0
        assert ("nothing is reweighted" in caplog.text) == said


def test_logs_hold_trls_keys_and_gapos(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    train = next(row for row in trainer.state.log_history if "loss" in row)
    assert set(train) >= TRL_KEYS | GAPO_KEYS
    assert train["gapo/radius"] == pytest.approx(CONFIG.rho, rel=1e-4)
    assert train["gapo/weight_min"] <= train["gapo/weight_mean"] <= train["gapo/weight_max"]
    evaluation = next(row for row in trainer.state.log_history if "eval_loss" in row)
    assert set(evaluation) >= {f"eval_{name}" for name in TRL_KEYS}


def test_logs_reach_trackers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert "train/gapo/weight_mean" in tags
    assert "train/rewards/margins" in tags


def test_evaluation_is_the_probe_loss_over_every_pair(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate()
    rows = hf_models.pairs(7, seed=5)  # three batches of 3, 3 and 1
    with torch.no_grad():
        chosen, rejected = pair_logps(trainer.model, trainer.data_collator(rows))
    m = chosen - rejected
    losses = torch.log1p(torch.exp(-(CONFIG.beta * m - CONFIG.gamma)))
    assert metrics["eval_rewards/accuracies"] == pytest.approx(float((m > 0).float().mean()))
    assert metrics["eval_rewards/margins"] == pytest.approx(CONFIG.beta * float(m.mean()), abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert trainer.evaluate(metric_key_prefix="test")["test_rewards/accuracies"] == metrics["eval_rewards/accuracies"]
    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (7, 2)


def test_compute_metrics_gets_log_probs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.compute_metrics = lambda p: {"accuracy": float((p.predictions[:, 0] > p.predictions[:, 1]).mean())}
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_rewards/accuracies"])


def test_unused_columns_stay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, remove_unused_columns=True)
    import datasets

    columns = ("prompt", "chosen", "rejected")
    rows = [{name: row[name] for name in columns} for row in hf_models.pairs(8)]
    trainer.train_dataset = datasets.Dataset.from_list(rows)
    assert trainer.args.remove_unused_columns is False
    assert trainer.train().global_step == 2


def test_rows_without_their_columns_say_what_to_set() -> None:
    collator = PreferenceCollator(hf_models.tokenizer())
    with pytest.raises(
        ValueError, match=r"column 'chosen' is missing\. .* set TrainingArguments\(remove_unused_columns=False\)"
    ):
        collator([{"id": 1}])
    with pytest.raises(ValueError, match=r"column 'is_flipped' was to be kept, but a row lacks it"):
        PreferenceCollator(hf_models.tokenizer(), keep=("is_flipped",))(hf_models.pairs(1))


def test_resuming_gives_the_same_trajectory(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    whole = make_trainer(tmp_path / "whole", config=GAPOConfig(rho=0.3, direction="gaussian"), **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", config=GAPOConfig(rho=0.3, direction="gaussian"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    histories = [
        [(row["loss"], row["gapo/weight_min"]) for row in trainer.state.log_history if "loss" in row]
        for trainer in (whole, resumed)
    ]
    assert histories[0] == histories[1]


RUNNING: dict[str, Any] = {
    "callback": {"objective": drifting},
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 1,
    "learning_rate": 0.1,
}


def test_running_statistics_go_on_from_batch_to_batch(tmp_path: Path) -> None:
    trainer, results = make_trainer(tmp_path, **RUNNING, max_steps=2), []
    callback_of(trainer).on_step = lambda result, batch: results.append(result)
    for _ in range(2):  # a second training begins anew
        results.clear()
        trainer.train()
        expected = by_hand([result.margins for result in results])
        assert len(results) == 4
        for result, row in zip(results, expected, strict=True):
            assert float(result.loss) == pytest.approx(row["loss"], rel=1e-5)
            assert result.weights.tolist() == pytest.approx(row["weights"].tolist(), rel=1e-5)
        logged = [row["gapo/running/mean"] for row in trainer.state.log_history if "gapo/running/mean" in row]
        assert logged == pytest.approx([expected[1]["mean"], expected[3]["mean"]], rel=1e-5)
        assert abs(expected[1]["mean"] - expected[3]["mean"]) > 1e-3


def test_running_statistics_are_resumed_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, resumed = (make_trainer(tmp_path / name, **RUNNING, max_steps=3) for name in ("whole", "resumed"))
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "begin anew" not in caplog.text
    rows = [
        [(row["loss"], row["gapo/running/mean"]) for row in trainer.state.log_history if "loss" in row]
        for trainer in (whole, resumed)
    ]
    assert rows[0] == rows[1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"]["gapo"].pop("running") == {"mean": rows[0][0][1]}
    path.write_text(json.dumps(state))
    make_trainer(tmp_path / "lost", **RUNNING, max_steps=3).train(resume_from_checkpoint=str(checkpoint))
    assert "after step 1, from where nothing is known of the running statistics 'mean': they begin anew" in caplog.text


def test_running_statistics_of_another_objective_are_left(tmp_path: Path) -> None:
    def other(logps: LogProbs) -> torch.Tensor:
        return drifting(logps)

    make_trainer(tmp_path, **RUNNING, max_steps=1).train()
    resumed, results = make_trainer(tmp_path, **{**RUNNING, "callback": {"objective": other}}, max_steps=2), []
    callback_of(resumed).on_step = lambda result, batch: results.append(result)
    resumed.train(resume_from_checkpoint=True)
    assert float(results[0].loss) == pytest.approx(by_hand([results[0].margins])[0]["loss"], rel=1e-5)


def test_running_statistics_outlive_a_detachment(tmp_path: Path) -> None:
    """Detached and attached again between two steps, a training goes on as if nothing had happened."""

    class Interrupted(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            callback_of(cut).detach()
            callback_of(cut).attach(cut)

    whole, cut = (make_trainer(tmp_path / name, **RUNNING, max_steps=2) for name in ("whole", "cut"))
    cut.add_callback(Interrupted())
    results: dict[int, list[float]] = {}
    for trainer in (whole, cut):
        losses = results[id(trainer)] = []
        callback_of(trainer).on_step = lambda result, batch, losses=losses: losses.append(float(result.loss))
        trainer.train()
    assert results[id(whole)] == results[id(cut)]
    states = [json.loads((tmp_path / n / "checkpoint-2" / "trainer_state.json").read_text()) for n in ("whole", "cut")]
    assert states[0]["stateful_callbacks"]["gapo"] == states[1]["stateful_callbacks"]["gapo"]


def test_resuming_with_other_settings_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "first", config=GAPOConfig(rho=0.3), **options).train()
    checkpoint = str(tmp_path / "first" / "checkpoint-1")
    make_trainer(tmp_path / "same", config=GAPOConfig(rho=0.3), **options).train(resume_from_checkpoint=checkpoint)
    assert "other settings" not in caplog.text
    other = make_trainer(tmp_path / "other", config=GAPOConfig(rho=0.1, gamma=0.5), **options)
    other.train(resume_from_checkpoint=checkpoint)
    assert "other settings of GAPO: gamma: 0.25 -> 0.5, rho: 0.3 -> 0.1" in caplog.text


def test_the_model_and_the_trainer_are_themselves_again(tmp_path: Path) -> None:
    model = hf_models.make("gpt2", dropout=0.1)
    forward = model.forward
    trainer = make_trainer(tmp_path, model)
    callback = callback_of(trainer)
    assert model.transformer.h[0].attn.attn_dropout.p == 0
    trainer.train()
    assert model.forward == forward
    pickle.dumps(model)
    callback.detach()
    assert model.transformer.h[0].attn.attn_dropout.p == 0.1
    for name in ("compute_loss", "prediction_step", "evaluation_loop", "log"):
        assert name not in vars(trainer)
    assert not hasattr(trainer, "_gapo_attachment")
    callback.detach()  # twice does no harm


def test_after_a_crash_in_the_anchor_forward(tmp_path: Path) -> None:
    model = hf_models.make("llama")
    trainer = make_trainer(tmp_path, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def fails(module: Any, inputs: Any, kwargs: Any) -> None:
        calls.append(torch.is_grad_enabled())
        if not torch.is_grad_enabled():
            raise RuntimeError("crash in the anchor forward")

    hook = model.register_forward_pre_hook(fails, with_kwargs=True)
    with pytest.raises(RuntimeError, match="crash in the anchor forward"):
        trainer.train()
    assert calls == [True, False]
    hook.remove()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert "forward" not in vars(model)
    assert trainer.train().global_step == 2  # and it trains


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="another GAPOCallback is attached to this trainer already"):
        GAPOCallback().attach(trainer)
    trainer.add_callback(GAPOCallback())
    with pytest.raises(ValueError, match="another GAPOCallback is attached to this trainer already"):
        trainer.train()
    other = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="this GAPOCallback is attached to another trainer"):
        callback_of(trainer).attach(other)


def test_attach_and_late_add_callback_are_the_same(tmp_path: Path) -> None:
    gradients = []
    for way in ("constructor", "attach", "add_callback"):
        trainer = make_trainer(tmp_path)
        if way != "constructor":
            callback_of(trainer).detach()
            trainer.remove_callback(GAPOCallback)
            if way == "attach":
                callback = GAPOCallback(CONFIG).attach(trainer)
                assert callback.attach(trainer) is callback
            else:
                trainer.add_callback(GAPOCallback(CONFIG))
        gradients.append(first_gradient(trainer))
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=0, atol=0)


def test_simpo_is_the_control_without_an_anchor(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callback={"objective": "simpo"})
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert set(row) >= TRL_KEYS | {f"gapo/weight_{name}" for name in ("mean", "min", "max")}
    assert not any(name.startswith(("gapo/anchor", "gapo/radius", "gapo/grad_norm")) for name in row)
    with pytest.raises(ValueError, match=r"objective must be one of 'gapo', 'simpo', .*, got 'orpo'"):
        GAPOCallback(objective="orpo")
    with pytest.raises(TypeError, match=r"config must be a gapo.GAPOConfig, got dict"):
        GAPOCallback({})  # type: ignore[arg-type]


def test_dpo_compares_with_where_it_started(tmp_path: Path) -> None:
    model = hf_models.make("llama")
    rows = with_reference_logps(model, hf_models.pairs(8), batch_size=3, progress=None)
    options = {"objective": "dpo", "objective_settings": {"beta": 0.5}}
    trainer = make_trainer(tmp_path, model, rows=rows, callback=options, max_steps=4)
    trainer.eval_dataset = rows
    start = trainer.evaluate()
    assert start["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert start["eval_reference/margins"] == pytest.approx(0, abs=1e-4)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert logged[-1]["loss"] < logged[0]["loss"]
    after = trainer.evaluate()
    assert after["eval_reference/accuracies"] > 0.9
    assert set(after) >= {f"eval_{name}" for name in TRL_KEYS}


def hinge_of_z(logps: LogProbs, *, tau: float = 2.0) -> torch.Tensor:
    """A user's own objective, of sums and a reference, that pulls the two sides of a pair by other amounts."""
    return torch.relu(tau - logps.z) ** 2 + 0.1 * logps.chosen**2


hinge_of_z.needs_reference = True  # type: ignore[attr-defined]


def hinge_of_arrays(chosen_logps: Any, rejected_logps: Any, ref_chosen_logps: Any, ref_rejected_logps: Any) -> Any:
    """The same with tau = 3."""
    z = chosen_logps - rejected_logps - ref_chosen_logps + ref_rejected_logps
    return (torch.relu(3 - z) ** 2 + 0.1 * chosen_logps**2).mean()


def objective_gradient(model: Any, batch: dict[str, torch.Tensor], function: Any, *, average: bool) -> tuple[Any, Any]:
    """Mean loss and gradient of a function of arrays, by autograd through log_softmax: no step, no `LogProbs`."""
    policy = copy.deepcopy(model)
    arrays = {}
    for side in ("chosen", "rejected"):
        ids, mask, labels = (batch[f"{side}_{part}"] for part in ("input_ids", "attention_mask", "labels"))
        logits = policy(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        kept = labels[:, 1:] != -100
        picked = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        counts = kept.sum(-1) if average else 1
        arrays[f"{side}_logps"] = (picked * kept).sum(-1) / counts
        arrays[f"ref_{side}_logps"] = batch[f"ref_{side}_logps"] / counts
        arrays[f"{side}_lengths"] = kept.sum(-1)
    loss = function(*(arrays[name] for name in inspect.signature(function).parameters if name in arrays))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*(name for name, entry in OBJECTIVES.items() if not entry.needs_anchor), "own"])
def test_every_objectives_gradient_and_evaluation_are_its_functions(tmp_path: Path, name: str) -> None:
    model = hf_models.make("pythia").double()
    before = copy.deepcopy(model)
    rows = with_reference_logps(model, hf_models.pairs(8), progress=None)
    for i, row in enumerate(rows):  # a reference that the policy departs from, by another amount in each response
        row["ref_chosen_logps"] += 0.25 * (i % 3 - 1) + 0.02 * i
        row["ref_rejected_logps"] += 0.03 * i**2
    steps = 1 if name in ("alpha_dpo", "re_po", "beta_dpo") else 2  # the second batch would look back at the first
    if name == "own":
        objective, function, average, settings = hinge_of_z, hinge_of_arrays, False, {"tau": 3.0}
    else:
        own = {"beta": CONFIG.beta, "gamma": CONFIG.gamma} if name == "simpo" else {}
        function, average = functools.partial(getattr(gapo.objectives, name), **own), OBJECTIVES[name].average
        objective, settings = name, None
    results: list[Any] = []
    trainer = make_trainer(
        tmp_path, model, rows=rows, max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=steps,
        callback={
            "objective": objective, "objective_settings": settings, "on_step": lambda *seen: results.append(seen),
        },
    )  # fmt: skip
    plain = trainer.data_collator
    exact = ("ref_chosen_logps", "ref_rejected_logps")  # which a batch otherwise holds in float32
    trainer.data_collator = lambda rows: {
        **plain(rows), **{key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in exact}
    }  # fmt: skip
    trainer.eval_dataset = rows[:3]
    evaluation = trainer.evaluate()["eval_loss"]
    gradient = first_gradient(trainer)
    losses, expected = zip(*(objective_gradient(before, batch, function, average=average) for _, batch in results),
                           strict=True)  # fmt: skip
    assert len(losses) == steps
    for key, value in gradient.items():
        mean = sum(e[key] for e in expected) / steps
        assert float((value - mean).norm()) <= 1e-9 * float(mean.norm()), key
    assert evaluation == pytest.approx(
        float(objective_gradient(before, trainer.data_collator(rows[:3]), function, average=average)[0]), rel=1e-6
    )
    for loss, (result, _) in zip(losses, results, strict=True):
        assert float(result.loss) == pytest.approx(float(loss), rel=1e-9)
        assert (result.anchor_gaps, result.radius, result.first_order_ratio) == (None, None, None)
    log = trainer.state.log_history[-2]
    weights = torch.cat([result.weights for result, _ in results])
    for key, value in (("mean", weights.mean()), ("min", weights.min()), ("max", weights.max())):
        assert log[f"gapo/weight_{key}"] == pytest.approx(float(value), rel=1e-5)
    assert not any(key.startswith("gapo/anchor") for key in log)


def test_an_objective_without_an_anchor_costs_one_forward_and_one_backward(tmp_path: Path) -> None:
    model = hf_models.make("llama")
    trainer = make_trainer(tmp_path, model, callback={"objective": "simpo"}, max_steps=3)
    forwards: list[bool] = []
    backwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    model.model.layers[0].register_full_backward_hook(lambda *_: backwards.append(1))
    trainer.train()
    assert (forwards.count(True), len(backwards)) == (3, 3)
    assert forwards.count(False) == 2  # the model is asked once whether it is causal


def anchored(logps: LogProbs) -> torch.Tensor:
    """A user's own objective of the anchor's gaps."""
    return torch.exp(-2 * logps.anchor_gaps)


anchored.needs_anchor = True  # type: ignore[attr-defined]


def test_an_own_objective_gets_the_anchor(tmp_path: Path) -> None:
    results: list[Any] = []
    trainer = make_trainer(
        tmp_path, callback={"objective": anchored, "on_step": lambda result, batch: results.append(result)}
    )
    trainer.train()
    gaps = results[0].anchor_gaps
    assert float(gaps.abs().max()) > 0
    torch.testing.assert_close(results[0].weights, 2 * torch.exp(-2 * gaps))
    assert trainer.state.log_history[0]["gapo/radius"] == pytest.approx(CONFIG.rho, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] > 0  # SimPO's


def test_what_an_objective_needs_is_told(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callback={"objective": "dpo"})
    with pytest.raises(ValueError, match=r"objective 'dpo' needs ref_chosen_logps and .*with_reference_logps"):
        trainer.train()
    with pytest.raises(ValueError, match=r"objective 'dpo' has no setting 'gamma'; it takes beta \(0.1\)"):
        GAPOCallback(objective="dpo", objective_settings={"gamma": 1})
    with pytest.raises(ValueError, match=r"objective 'gapo' takes beta and gamma from gapo.GAPOConfig"):
        GAPOCallback(objective_settings={"beta": 1})


def test_reference_log_probs_are_sums_without_dropout() -> None:
    model = hf_models.make("gpt2", dropout=0.5).train()
    rows = hf_models.pairs(5)
    found = with_reference_logps(model, rows, batch_size=2, progress=None)
    assert model.training
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    batch = PreferenceCollator(hf_models.tokenizer())(rows)
    with torch.no_grad():
        chosen, rejected = pair_logps(model.eval(), batch)
    for side, averages in (("chosen", chosen), ("rejected", rejected)):
        lengths = torch.tensor([sum(label != -100 for label in row[f"{side}_labels"]) for row in rows])
        sums = torch.tensor([row[f"ref_{side}_logps"] for row in found])
        torch.testing.assert_close(sums, averages * lengths, rtol=1e-5, atol=1e-4)


def test_rho_zero_is_not_simpo_but_a_linear_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config=GAPOConfig(rho=0.0), max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["gapo/weight_min"] == row["gapo/weight_max"]
    assert row["gapo/anchor_gap_mean"] == 0


def test_lora_trains_and_says_that_its_first_step_has_no_anchor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = hf_models.lora("llama")
    trainer = make_trainer(tmp_path, model, max_steps=3)
    with caplog.at_level(logging.WARNING, logger="gapo"):
        trainer.train()
    radii = [row["gapo/radius"] for row in trainer.state.log_history if "gapo/radius" in row]
    assert radii[0] == 0
    assert radii[1:] == pytest.approx([CONFIG.rho] * 2, rel=1e-3)
    assert sum("A fresh LoRA starts so" in record.message for record in caplog.records) == 1


def test_one_pair_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gapo"):
        make_trainer(tmp_path, per_device_train_batch_size=1).train()
    assert sum("one pair shares each anchor" in record.message for record in caplog.records) == 1


def test_gradient_checkpointing(tmp_path: Path) -> None:
    gradients = [
        first_gradient(
            make_trainer(
                tmp_path,
                gradient_checkpointing=on,
                gradient_checkpointing_kwargs={"use_reentrant": False} if on else None,
            )
        )
        for on in (False, True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match=r're-entrant gradient checkpointing .* set gradient_checkpointing_kwargs=\{"use_re'
    ):
        make_trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


def test_conversational_pairs_train(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(hf_models.tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in hf_models.pairs(4)
    ]
    trainer = make_trainer(tmp_path, rows=rows)
    trainer.data_collator = PreferenceCollator(tokenizer, max_length=64)
    assert trainer.train().global_step == 2


def test_models_that_save_and_load(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    batch = hf_models.batch()
    torch.testing.assert_close(pair_logps(loaded.eval(), batch), pair_logps(trainer.model.eval(), batch))


def test_batches_of_trls_dpo_collator() -> None:
    model, batch = hf_models.make("llama"), hf_models.batch()
    ids, mask, labels = (
        torch.cat([batch[f"{side}_{part}"] for side in ("chosen", "rejected")])
        for part in ("input_ids", "attention_mask", "labels")
    )
    trl = {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long()}
    torch.testing.assert_close(pair_logps(model, trl), pair_logps(model, batch))
    with pytest.raises(KeyError, match=r"a batch of pairs needs the keys chosen_input_ids, .* got input_ids"):
        pair_logps(model, {"input_ids": ids})
    model.register_forward_hook(lambda module, args, output: type(output)(loss=output.logits.mean()))
    with pytest.raises(ValueError, match=r"returns no logits \(CausalLMOutputWithPast\).*switch a fused linear"):
        pair_logps(model, batch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_asks_for_labelled_columns_and_reads_the_device_twice(
    monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """Once before it and once after it, whatever is checked: each reading of a GPU waits for the work before it."""
    kept: list[torch.Tensor] = []
    read: list[str] = []

    class Embedding(torch.nn.Embedding):
        """A language model that reads nothing itself."""

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self

        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, logits_to_keep: Any = None) -> Any:
            kept.append(logits_to_keep)
            return SimpleNamespace(logits=super().forward(input_ids)[:, logits_to_keep])

    def counted(name: str) -> Any:
        plain = getattr(torch.Tensor, name)
        return lambda x, *arguments: (read.append(name), plain(x, *arguments))[1]

    model, batch = Embedding(hf_models.VOCAB, hf_models.VOCAB), hf_models.batch(side=side)
    batch["chosen_labels"][0, 0] = 1  # which nothing predicts
    with monkeypatch.context() as patched:
        for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero"):
            patched.setattr(torch.Tensor, name, counted(name))
        pair_logps(model, batch)
    assert read == ["tolist", "__bool__"]
    labels = to_the_right(stack_pairs(batch))["labels"]  # it takes no positions, so that padding goes to the right
    labelled = [column for column in range(1, labels.shape[1]) if (labels[:, column] >= 0).any()]
    assert kept[0].tolist() == list(range(labelled[0] - 1, labelled[-1] + 1))


def test_padding_on_either_side_changes_nothing() -> None:
    for kind in hf_models.KINDS:
        model = hf_models.make(kind).double()
        left, right = (pair_logps(model, hf_models.batch(side=side)) for side in ("left", "right"))
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
