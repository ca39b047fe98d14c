"""Drift diagnostics: the numbers against their definitions, and a training that goes on as if nothing was measured."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import drift_script
import hf_models
import pytest
import torch
from frameworks import require
from quick_runs import Page, interrupt_at_step_3, train
from trainers import callback_of, make_trainer
from transformers import Trainer

from gapo import GAPOConfig, data, files
from gapo.adapters import hf
from gapo.adapters.hf import DriftCallback
from gapo.adapters.hf.drift.responses import Responses, prompt_of
from gapo.adapters.hf.drift.starting import StartingPolicy
from gapo.adapters.hf.margins import stack_pairs
from gapo.backends.torch import token_logps
from gapo.backends.torch.token_kl import token_kl

# peft 0.18, when it saves the adapters of a model that came from no folder.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
KEYS = {
    "drift/kl",
    *(f"drift/{sample}_{name}" for sample in ("train", "held_out") for name in ("margin", "accuracy", "chosen_logps")),
    "drift/response_length",
    "drift/response_ended",
}


def with_drift(folder: Path, model: Any = None, *, drift: dict[str, Any] | None = None, **options: Any) -> Trainer:
    trainer = make_trainer(folder, model, **{**SAVING, **options})
    trainer.add_callback(DriftCallback(**{"pairs": 5, "prompts": 3, "max_new_tokens": 4, **(drift or {})}))
    return trainer


def rows_of(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "drift/held_out_margin" in row]


def continued_lora() -> Any:
    """Adapters that change something already when training begins."""
    model = hf_models.lora("llama")
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3)
    return model


def lora_and_norm() -> Any:
    """Fresh adapters, and a weight of the base that is trained beside them."""
    model = hf_models.lora("llama")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


# A divergence of 0 in float32: ten units in the last place of log 96, which the softmax subtracts. Some two are seen.
ZERO = pytest.approx(0, abs=5e-6)

MODELS = {
    "full": lambda: hf_models.make("llama"),
    "lora": lambda: hf_models.lora("llama"),
    "continued": continued_lora,
    "norm": lora_and_norm,
}


def held_out_of(trainer: Trainer) -> list[Any]:
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DriftCallback))
    return callback._samples["held_out"]


def oracle(policy: Any, start: Any, sample: list[Any]) -> dict[str, float]:
    """The definitions in float64 loops over answers and tokens, on models in float64."""
    policy, start = (copy.deepcopy(model).double().eval() for model in (policy, start))
    kl, margins, chosen = [], [], []
    for rows in sample:
        means = []
        for ids, mask, labels in zip(rows["input_ids"], rows["attention_mask"], rows["labels"], strict=True):
            real = mask.bool()
            ids, labels = ids[real][None], labels[real]
            with torch.no_grad():
                p, q = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (policy, start))
            positions = [t for t in range(1, len(labels)) if labels[t] != -100]
            kl += [float((p[t - 1].exp() * p[t - 1]).sum() - (p[t - 1].exp() * q[t - 1]).sum()) for t in positions]
            means.append(sum(float(p[t - 1, labels[t]]) for t in positions) / len(positions))
        margins.append(means[0] - means[1])
        chosen.append(means[0])
    n = len(sample)
    return {
        "kl": sum(kl) / len(kl),
        "held_out_margin": sum(margins) / n,
        "held_out_accuracy": sum(m > 0 for m in margins) / n,
        "held_out_chosen_logps": sum(chosen) / n,
    }


@pytest.mark.parametrize("kind", MODELS)
def test_the_numbers_are_their_definitions(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    start = copy.deepcopy(model)
    trainer = with_drift(tmp_path, model, learning_rate=1e-2)
    trainer.train()
    first, *_, last = rows_of(trainer)
    assert [row["step"] for row in rows_of(trainer)] == [0, 2, 4]
    assert set(first) >= KEYS
    assert first["drift/kl"] == ZERO
    assert last["drift/kl"] > 1e-5
    for row, policy in ((first, start), (last, model)):
        for name, value in oracle(policy, start, held_out_of(trainer)).items():
            near = pytest.approx(value, rel=1e-2 if name == "kl" else 1e-4, abs=1e-6)
            assert row[f"drift/{name}"] == (ZERO if name == "kl" and row is first else near), name
    kept = sorted(path.name for path in (tmp_path / "_starting_policy").iterdir())
    expected = ["adapters_off"] if kind == "lora" else [f"pair-{i:05d}.safetensors" for i in range(5)]
    assert kept == expected


@pytest.mark.parametrize("kind", MODELS)
def test_training_is_bit_for_bit_as_without(tmp_path: Path, kind: str) -> None:
    """Random draws in training (anchors, dropout), random draws in measuring (sampled responses)."""
    runs = []
    for drift in (False, True):
        model = MODELS[kind]() if kind != "full" else hf_models.make("llama", dropout=0.2)
        if kind == "lora":
            for name, p in model.named_parameters():  # a choice of the user's that switching adapters must not undo
                p.requires_grad_("lora_B" in name)
        options = {"config": GAPOConfig(rho=0.3, direction="gaussian"), "callback": {"disable_dropout": False}}
        make = with_drift if drift else make_trainer
        more = {"drift": {"temperature": 1.0, "every": 1}} if drift else {}
        trainer = make(tmp_path / str(drift), model, **SAVING, **options, **more)
        trainer.train()
        runs.append(trainer)
    plain, measured = runs
    for (name, p), (_, q) in zip(plain.model.named_parameters(), measured.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad, name
    histories = [
        [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in t.state.log_history]
        for t in runs
    ]
    assert [row for row in histories[1] if "drift/kl" not in row] == histories[0]
    assert [row["step"] for row in rows_of(measured)] == [0, 1, 2, 3, 4]
    assert [m.training for m in plain.model.modules()] == [m.training for m in measured.model.modules()]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_measures_from_step_zero(tmp_path: Path, kind: str) -> None:
    whole = with_drift(tmp_path, MODELS[kind](), learning_rate=1e-2)
    whole.train()
    resumed = with_drift(tmp_path, MODELS[kind](), learning_rate=1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rows_of(resumed) == rows_of(whole)
    assert [row["step"] for row in rows_of(resumed)] == [0, 2, 4]


def test_a_start_that_was_not_kept_is_told_and_another_sample_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, **SAVING).train()
    late = with_drift(tmp_path)
    with caplog.at_level(logging.WARNING, logger="gapo"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sum("drift/kl is left out: the starting policy was not kept" in r.message for r in caplog.records) == 1
    assert set(rows_of(late)[-1]) >= KEYS - {"drift/kl"}
    assert "drift/kl" not in rows_of(late)[-1]
    with_drift(tmp_path).train()
    other = with_drift(tmp_path, drift={"seed": 1})
    with pytest.raises(
        ValueError, match=r"pair 0 of the held-out sample is not the one that .*pair-00000\.safetensors"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_new_run_in_the_same_folder_starts_anew(tmp_path: Path) -> None:
    with_drift(tmp_path, hf_models.lora("llama"), max_steps=1).train()
    with_drift(tmp_path, hf_models.make("llama", seed=7), max_steps=1).train()
    assert not (tmp_path / "_starting_policy" / "adapters_off").exists()
    again = with_drift(tmp_path, hf_models.make("llama", seed=8), max_steps=1)
    again.train()
    assert rows_of(again)[0]["drift/kl"] == ZERO


def test_a_push_to_the_hub_leaves_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    trainer = with_drift(tmp_path, max_steps=1)
    trainer.train()
    uploads: list[list[str]] = []

    def upload(_: Any, *, folder_path: str, ignore_patterns: list[str], **__: Any) -> None:
        names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        uploads.append(list(filter_repo_objects(names, ignore_patterns=ignore_patterns)))

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    # As older versions call it.
    monkeypatch.setattr("transformers.trainer.upload_folder", functools.partial(upload, None), raising=False)
    trainer.hub_model_id = "somebody/model"
    trainer.push_to_hub()
    assert "model.safetensors" in uploads[0]
    assert not any("pair-" in name for name in uploads[0])


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_the_steps_own_log_and_its_window_stay_whole(tmp_path: Path, logging_steps: int) -> None:
    runs = []
    for make in (make_trainer, with_drift):
        trainer = make(tmp_path, **{**SAVING, "logging_steps": logging_steps})
        trainer.train()
        runs.append(
            [(row["step"], row["loss"], row["rewards/margins"]) for row in trainer.state.log_history if "loss" in row]
        )
    assert runs[0] == runs[1]
    assert [step for step, *_ in runs[1]] == list(range(logging_steps, 5, logging_steps))


def test_a_trainer_that_logs_a_window_of_its_own_keeps_it(tmp_path: Path) -> None:
    """As TRL's trainers do: what they gathered goes with the next log, whatever it is."""

    class Windowed(Trainer):
        steps = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().training_step(*args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            super().log({**logs, "steps_in_window": self.steps}, *args, **kwargs)
            self.steps = 0

    trainer = with_drift(tmp_path, logging_steps=4)
    callback_of(trainer).detach()
    trainer.__class__ = Windowed
    callback_of(trainer).attach(trainer)
    trainer.train()
    assert [row["steps_in_window"] for row in trainer.state.log_history if "loss" in row] == [4]
    assert not any("steps_in_window" in row for row in rows_of(trainer))


def test_checkpoints_of_epochs_and_of_the_best_are_measured_once(tmp_path: Path) -> None:
    epochs = with_drift(tmp_path, max_steps=-1, num_train_epochs=2, save_strategy="epoch")
    epochs.train()
    assert [row["step"] for row in rows_of(epochs)] == [0, 2, 4]
    options = {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 2}
    best = with_drift(tmp_path, **options)
    best.train()
    steps = [row["step"] for row in rows_of(best)]
    assert steps[0] == 0
    assert len(steps) == len(set(steps)) > 1


def test_trackers_get_it(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = with_drift(tmp_path, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent))
    events.Reload()
    for key in KEYS:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows_of(trainer)], key


def test_responses_are_those_of_each_prompt_alone(tmp_path: Path) -> None:
    """Greedy, batched and padded, against one token at a time without padding."""
    model = hf_models.make("llama", seed=4)
    prompts = [torch.arange(5, 5 + n) for n in (2, 9, 5)]
    free = []
    for prompt in prompts:
        ids = prompt[None]
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=-1)
        free.append(ids[0, len(prompt) :].tolist())
    end = free[0][3]  # what the first response says fourth shall close it
    found = list(Responses(6, 0.0).lengths(model, prompts, [end]))
    expected = [[float(ids.index(end)), 1.0] if end in ids else [6.0, 0.0] for ids in free]
    assert found == expected
    assert any(ended for _, ended in found)
    assert list(Responses(6, 0.0).lengths(model, prompts, [])) == [[6.0, 0.0]] * 3


def test_sampled_responses_follow_the_seed() -> None:
    model = hf_models.make("llama")
    prompts, ends = [torch.arange(5, 9)] * 20, list(range(1, 24))  # a quarter of the vocabulary ends a response
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(list(Responses(8, 1.0).lengths(model, prompts, ends)))
    assert draws[0] == draws[1] != draws[2]
    assert len({length for length, _ in draws[0]}) > 2


def test_the_same_policy_is_sampled_the_same_at_every_measurement(tmp_path: Path) -> None:
    drift = {"temperature": 1.0, "prompts": 5, "max_new_tokens": 40}
    lengths = []
    for seed in (0, 1):
        options = {"learning_rate": 0.0, "config": GAPOConfig(rho=0.3, direction="gaussian")}
        trainer = with_drift(tmp_path, drift={**drift, "seed": seed}, **options)
        trainer.train()
        lengths.append({row["drift/response_length"] for row in rows_of(trainer)})
    assert [len(found) for found in lengths] == [1, 1]
    assert lengths[0] != lengths[1]


def test_the_prompt_is_what_stands_before_the_answer() -> None:
    for side in ("left", "right"):
        batch = hf_models.batch(1, side=side)
        shown = prompt_of(stack_pairs(batch))
        real = batch["chosen_attention_mask"][0].bool()
        kept = batch["chosen_labels"][0][real] == -100
        assert shown.tolist() == batch["chosen_input_ids"][0][real][kept].tolist()


def test_kl_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    p, q = torch.randn(11, 7, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    p[3, 2] = -math.inf  # a token that the policy cannot say adds nothing
    whole = [
        sum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True) if a > -math.inf)
        for x, y in zip(p.log_softmax(-1).tolist(), q.log_softmax(-1).tolist(), strict=True)
    ]
    for size in (1, 20, 10**6):
        monkeypatch.setitem(token_logps._CHUNK, "cpu", size)
        torch.testing.assert_close(token_kl(p, q + 3).tolist(), whole)
        assert token_kl(p.bfloat16(), q).dtype == torch.float32
    assert float(token_kl(p[:3], p[:3]).abs().max()) < 1e-15


def test_what_it_needs_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in (("pairs", 0), ("every", -1), ("prompts", -1), ("max_new_tokens", 0), ("temperature", -0.5)):
        with pytest.raises(ValueError, match=rf"{name} must be >= [01], got {value}"):
            DriftCallback(**{name: value})
    trainer = with_drift(tmp_path)
    trainer.eval_dataset = None
    with pytest.raises(
        ValueError, match=r"from the trainer's eval_dataset, .* got NoneType\. Give pairs with .*held_out="
    ):
        trainer.train()
    bare = {"warn_above_gib": 0.0, "held_out": hf_models.pairs(2), "prompts": 0}
    trainer = with_drift(tmp_path, drift=bare, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="gapo"):
        trainer.train()
    assert "fewer pairs take less" in caplog.text
    assert "drift/response_length" not in rows_of(trainer)[0]
    assert len(held_out_of(trainer)) == 2
    monkeypatch.setattr("gapo.adapters.hf.drift.starting._free", lambda folder: 10)
    with pytest.raises(ValueError, match=r"takes 0\.00 GiB in .*, where 0\.00 GiB are free: give DriftCallback fewer"):
        with_drift(tmp_path).train()


def test_the_sample_has_nothing_to_do_with_who_was_flipped(tmp_path: Path) -> None:
    """Flips are drawn by a permutation too, and 0 is everybody's first seed."""
    rows = data.flip_pairs(hf_models.pairs(200), rate=0.2, seed=0)
    trainer = with_drift(tmp_path, rows=rows, max_steps=1, drift={"pairs": 50, "seed": 0, "prompts": 0})
    flipped: list[bool] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda drawn: flipped.extend(row["is_flipped"] for row in drawn) or collate(drawn)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DriftCallback))
    callback._sample("train", None, rows, trainer)
    assert len(flipped) == 50
    assert 3 <= sum(flipped) <= 18


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("gapo.adapters.hf.drift.starting.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        StartingPolicy(tmp_path).keep(hf_models.make("llama"), 0, stack_pairs(hf_models.batch(1)))
    assert list(tmp_path.iterdir()) == []


def test_with_gapo_trainer_and_its_tokenised_rows(tmp_path: Path) -> None:
    import datasets

    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in hf_models.pairs(8)]
    trainer = hf.GAPOTrainer(
        hf_models.make("llama"),
        hf.GAPOConfig(
            str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:3]),
        processing_class=hf_models.tokenizer(),
        callbacks=[DriftCallback(prompts=2, max_new_tokens=2)],
    )
    trainer.train()
    assert [row["step"] for row in rows_of(trainer)] == [0, 2]
    assert set(rows_of(trainer)[1]) >= KEYS
    assert len(held_out_of(trainer)) == 3


def test_gapo_train_draws_it_in_its_report_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("jsonargparse")
    pairs = tmp_path / "pairs.jsonl"
    data.write_rows(pairs, data.generate_pairs(40))
    options = {"pairs": str(pairs), "eval_fraction": 0.25, "drift": True, "drift_pairs": 3, "drift_prompts": 2}
    options |= {"drift_max_new_tokens": 3, "flip_rate": 0.0}
    interrupt_at_step_3(monkeypatch)
    assert train(tmp_path, **options) == 130
    monkeypatch.undo()
    assert train(tmp_path, **options) == 0
    found = [row for row in files.read_lines(tmp_path / "run" / "metrics.jsonl") if "drift/kl" in row]
    assert [row["step"] for row in found] == [0, 2, 4]
    assert 0 < found[1]["drift/kl"] < found[2]["drift/kl"]
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert page.counts["svg"] == 8  # three of drift beside five of the run
    for title in ("KL to the starting policy", "Margins of two fixed samples", "Length of generated responses"):
        assert text.count(f'aria-label="{title}"') == 1
    assert f"At step 4 the policy's distribution over the next token was {found[2]['drift/kl']:.3g} nats" in text


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Five pairs over two gloo ranks: shares of unequal size, each pair once, and nobody waits for ever."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, drift_script.__file__, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2000, env=environment)
    assert done.returncode == 0, done.stderr
    drift_script.main(str(tmp_path / "one"), 4)
    two, one = (torch.load(tmp_path / name / "rows.pt") for name in ("two", "one"))
    assert [row["step"] for row in two] == [row["step"] for row in one] == [0, 2]
    for there, here in zip(two, one, strict=True):
        for key in KEYS:
            assert there[key] == pytest.approx(here[key], rel=1e-4, abs=1e-6), key
    assert len(list((tmp_path / "two" / "_starting_policy").glob("pair-*.safetensors"))) == 5
