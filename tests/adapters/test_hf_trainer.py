"""`GAPOTrainer` and its `GAPOConfig`, as a user of TRL meets them; GAPOCallback on TRL's own trainers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import datasets
import hf_models
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, HfArgumentParser, Trainer

import gapo
from gapo.adapters.hf import GAPOCallback, GAPOConfig, GAPOTrainer, PreferenceCollator, with_reference_logps
from gapo.adapters.hf.margins import pair_logps
from gapo.data import write_rows
from gapo.objectives import LogProbs

COLUMNS = ("prompt", "chosen", "rejected")


def arguments(folder: Path, **options: Any) -> GAPOConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "max_length": 64,
        "rho": 0.3,
    }
    return GAPOConfig(str(folder), **{**defaults, **options})


def dataset(n: int = 8, seed: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list([{name: row[name] for name in COLUMNS} for row in hf_models.pairs(n, seed)])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` leaves it, with its tokenizer."""
    hf_models.make("llama").save_pretrained(tmp_path / "saved")
    hf_models.tokenizer().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_from_a_path_to_a_model_that_loads_again(saved: Path, tmp_path: Path) -> None:
    trainer = GAPOTrainer(
        str(saved),
        arguments(tmp_path / "run", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=dataset(),
        eval_dataset={"held_out": dataset(4, 1), "more": dataset(4, 2)},
    )
    trainer.train()
    assert trainer.model.dtype == torch.float32
    row = next(row for row in trainer.state.log_history if "gapo/weight_mean" in row)
    assert row["gapo/radius"] == pytest.approx(0.3, rel=1e-3)
    assert any("eval_held_out_rewards/accuracies" in row for row in trainer.state.log_history)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    prompt = torch.tensor([[5, 6, 7]])
    assert loaded.generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, 6)
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.count("arxiv.org/abs/2602.04909") == 1  # also after the second checkpoint
    assert "rho 0.3" in card
    assert "- gapo" in card


def test_equals_the_callback_on_a_plain_trainer(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    ours = GAPOTrainer(hf_models.make("llama"), args, train_dataset=dataset(), processing_class=hf_models.tokenizer())
    plain = Trainer(
        hf_models.make("llama"),
        args,
        train_dataset=hf_models.pairs(8),
        data_collator=PreferenceCollator(hf_models.tokenizer(), max_length=64),
        callbacks=[GAPOCallback(gapo.GAPOConfig(rho=0.3))],
    )
    for trainer in (ours, plain):
        trainer.train()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name


def test_rows_of_every_kind(tmp_path: Path) -> None:
    lists = [{name: row[name] for name in COLUMNS} for row in hf_models.pairs(8)]
    for rows in (lists, dataset().to_iterable_dataset(), datasets.Dataset.from_list(hf_models.pairs(8))):
        trainer = GAPOTrainer(
            hf_models.make("llama"), arguments(tmp_path), train_dataset=rows, processing_class=hf_models.tokenizer()
        )
        assert trainer.train().global_step == 2


def test_adapters(saved: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    trainer = GAPOTrainer(str(saved), arguments(tmp_path / "run"), train_dataset=dataset(), peft_config=lora)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(saved)
    loaded = PeftModel.from_pretrained(base, tmp_path / "run")
    batch = hf_models.batch()["chosen_input_ids"]
    torch.testing.assert_close(loaded.eval()(batch).logits, trainer.model.eval()(batch).logits)
    with pytest.raises(ValueError, match="the model has adapters already"):
        GAPOTrainer(
            trainer.model, arguments(tmp_path), train_dataset=dataset(), peft_config=lora,
            processing_class=hf_models.tokenizer(),
        )  # fmt: skip


def test_pushing_goes_the_trainers_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    trainer = GAPOTrainer(
        hf_models.make("llama"), arguments(tmp_path), train_dataset=dataset(), processing_class=hf_models.tokenizer()
    )
    pushed: dict[str, Any] = {}
    url = type("Url", (), {"repo_id": "someone/model"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: url)
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: pushed.update(options))
    monkeypatch.setattr("transformers.trainer.create_repo", lambda *_, **__: url, raising=False)  # older versions call
    monkeypatch.setattr("transformers.trainer.upload_folder", lambda **options: pushed.update(options), raising=False)
    trainer.push_to_hub()
    assert pushed["repo_id"] == "someone/model"
    assert "2602.04909" in (tmp_path / "README.md").read_text()


def test_other_objectives_bring_their_settings_and_claim_no_gapo(tmp_path: Path) -> None:
    model = hf_models.make("llama")
    rows = with_reference_logps(model, hf_models.pairs(8), progress=None)
    args = arguments(tmp_path, objective="rdpo", objective_settings='{"label_smoothing": 0.25}', logging_steps=1)
    assert args.objective_settings == {"label_smoothing": 0.25}
    trainer = GAPOTrainer(model, args, train_dataset=rows, processing_class=hf_models.tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # (0.75 - 0.25) / 0.5 log 2
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "2602.04909" not in card
    assert "objective `rdpo` (Chowdhury, Kini, Natarajan, arXiv 2403.00409)" in card
    assert "beta 0.1, label_smoothing 0.25" in card
    assert "- rdpo" in card
    with pytest.raises(ValueError, match="objective 'rdpo' has no setting 'rho'"):
        arguments(tmp_path, objective="rdpo", objective_settings={"rho": 1})


def squares(logps: LogProbs, *, target: float = 1.0) -> torch.Tensor:
    """A user's own objective, of margins."""
    return (target - logps.margins) ** 2


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    model, options = hf_models.make("llama"), {"processing_class": hf_models.tokenizer(), "train_dataset": dataset()}
    args, settings = arguments(tmp_path, max_steps=1), {"target": 3.0}
    batch = PreferenceCollator(hf_models.tokenizer())(hf_models.pairs(8))
    with torch.no_grad():
        chosen, rejected = pair_logps(model, batch)
    trainer = GAPOTrainer(
        model, args, objective=squares, objective_settings=settings, eval_dataset=dataset(), **options
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(((3 - (chosen - rejected)) ** 2).mean()), rel=1e-5)
    trainer.train()
    assert {"loss", "gapo/weight_mean"} <= set(trainer.state.log_history[0])
    trainer.create_model_card()
    assert "the objective `squares`, by the `gapo` library: target 3.0" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="args name the objective 'dpo', and objective= names another: leave one out"):
        GAPOTrainer(hf_models.make("llama"), arguments(tmp_path, objective="dpo"), objective=squares, **options)
    with pytest.raises(ValueError, match=r"objective 'squares' has no setting 'beta'; it takes target \(1.0\)"):
        GAPOTrainer(hf_models.make("llama"), args, objective=squares, objective_settings={"beta": 1}, **options)
    with pytest.raises(ValueError, match=r"objective_settings are of objective=, which is not given"):
        GAPOTrainer(hf_models.make("llama"), args, objective_settings=settings, **options)


def test_settings_are_the_cores_and_checked(tmp_path: Path) -> None:
    assert GAPOConfig(str(tmp_path)).step_config() == gapo.GAPOConfig()
    with pytest.raises(ValueError, match=r"rho must be a finite number >= 0, got -0\.1"):
        GAPOConfig(str(tmp_path), rho=-0.1)
    with pytest.raises(ValueError, match=r"objective must be one of 'gapo', 'simpo', .*, got 'orpo'"):
        GAPOConfig(str(tmp_path), objective="orpo")
    with pytest.raises(TypeError, match=r"args must be a gapo.adapters.hf.GAPOConfig, got gapo\.config\.GAPOConfig"):
        GAPOTrainer(hf_models.make("llama"), gapo.GAPOConfig())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="was not loaded by name, so its tokenizer is not known: give processing_class"
    ):
        GAPOTrainer(hf_models.make("llama"), arguments(tmp_path))
    with pytest.raises(ValueError, match="model_init_kwargs were given, but the model is loaded already"):
        GAPOTrainer(hf_models.make("llama"), GAPOConfig(str(tmp_path), model_init_kwargs={"dtype": "float32"}))
    model, tokenizer = hf_models.make("llama"), hf_models.tokenizer()
    rows = datasets.Dataset.from_list([*dataset(1), {"prompt": "a", "chosen": "", "rejected": "b"}])
    with pytest.raises(ValueError, match=r"row 1 of train_dataset: a row is no preference pair: column 'chosen' is em"):
        GAPOTrainer(model, arguments(tmp_path), train_dataset=rows, processing_class=tokenizer)


def test_lengths_are_whole_numbers_or_none(tmp_path: Path) -> None:
    assert GAPOConfig(str(tmp_path), max_length=None).max_length is None
    with pytest.raises(ValueError, match="pad_to_multiple_of must be a whole number >= 1, or None, got 'auto'"):
        GAPOConfig(str(tmp_path), pad_to_multiple_of="auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length must be a whole number >= 1, or None, got 0"):
        GAPOConfig(str(tmp_path), max_length=0)


def test_parsers_and_yaml(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(f"output_dir: {tmp_path}\nrho: 0.05\nanchor: first_order\nlast_layers: 2\n")
    (args,) = HfArgumentParser(GAPOConfig).parse_yaml_file(str(path))
    assert args.step_config() == gapo.GAPOConfig(rho=0.05, anchor="first_order", last_layers=2)
    (args,) = HfArgumentParser(GAPOConfig).parse_args_into_dataclasses(
        f'--output_dir {tmp_path} --adaptive false --probe margin --model_init_kwargs {{"dtype":"auto"}}'.split()
    )
    assert args.step_config() == gapo.GAPOConfig(adaptive=False, probe="margin")
    assert args.model_init_kwargs == {"dtype": "auto"}
    help_text = HfArgumentParser(GAPOConfig).format_help()
    hints, core_hints = typing.get_type_hints(GAPOConfig), typing.get_type_hints(gapo.GAPOConfig)
    for name, core in gapo.GAPOConfig.__dataclass_fields__.items():
        carried = GAPOConfig.__dataclass_fields__[name]
        assert f"--{name}" in help_text
        assert (carried.default, carried.metadata) == (core.default, core.metadata)
        assert hints[name] == (str if name == "perturb" else core_hints[name])  # a parser reads no masks
    assert "--probe {loss,margin}" in help_text


@pytest.mark.slow
def test_the_example_in_trls_style(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    examples = Path(gapo.__file__).parent / "examples"
    write_rows(tmp_path / "pairs.jsonl", [{name: row[name] for name in COLUMNS} for row in hf_models.pairs(8)])
    command = [sys.executable, str(examples / "trl_style.py"), "--config", str(examples / "trl_style.yaml")]
    options = {
        "model_name_or_path": saved,
        "train_pairs": tmp_path / "pairs.jsonl",
        "eval_pairs": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    done = subprocess.run(
        [*command, *(part for name, value in options.items() for part in (f"--{name}", str(value)))],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "eval_rewards/accuracies" in done.stdout
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_callback_on_trls_own_trainers(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl", minversion="1.0")  # older ones do not run on transformers 5
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    options = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "use_cpu": True,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 1.0,
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
    }
    weights = {}
    for kind, made in ((GAPOTrainer, None), (trl.DPOTrainer, trl.DPOConfig), (CPOTrainer, CPOConfig)):
        ours = {"args": GAPOConfig(**options, rho=0.3)}
        theirs = made and {"args": made(**options), "callbacks": [GAPOCallback(gapo.GAPOConfig(rho=0.3))]}
        model = AutoModelForCausalLM.from_pretrained(saved)
        trainer = kind(model, train_dataset=dataset(), processing_class=hf_models.tokenizer(), **(theirs or ours))
        trainer.train()
        row = next(row for row in trainer.state.log_history if "gapo/radius" in row)
        assert row["gapo/radius"] == pytest.approx(0.3, rel=1e-3)
        weights[kind.__name__] = trainer.model.state_dict()
    start = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    for name, x in weights["GAPOTrainer"].items():
        torch.testing.assert_close(weights["DPOTrainer"][name], x, rtol=1e-4, atol=1e-6)
        # TRL's CPOTrainer opens every prompt with a BOS token: other tokens, nearly the same update
        ours, theirs = (x - start[name], weights["CPOTrainer"][name] - start[name])
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9


@pytest.mark.filterwarnings("ignore")
def test_trls_trainers_without_pairs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl", minversion="1.0")  # older ones do not run on transformers 5

    own = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    unpaired = datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "label": i % 2 == 0} for i in range(4)])
    text = datasets.Dataset.from_list([{"text": "a b"}] * 4)
    for kind, made, rows in ((trl.KTOTrainer, trl.KTOConfig, unpaired), (trl.SFTTrainer, trl.SFTConfig, text)):
        with pytest.raises(ValueError, match=rf"TRL's {kind.__name__} does not train on pairs in batches"):
            kind(
                hf_models.make("llama"), args=made(str(tmp_path), **own), train_dataset=rows,
                processing_class=hf_models.tokenizer(), callbacks=[GAPOCallback()],
            )  # fmt: skip
    tpo = pytest.importorskip("trl.experimental.tpo.tpo_trainer", reason="this version of TRL has no TPO")
    with pytest.raises(ValueError, match="TRL's DataCollatorForTriplePreference does not make batches of pairs"):
        Trainer(
            hf_models.make("llama"), arguments(tmp_path), train_dataset=hf_models.pairs(2),
            data_collator=tpo.DataCollatorForTriplePreference(pad_token_id=0), callbacks=[GAPOCallback()],
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_trls_settings_of_the_loss_are_said_to_have_no_effect(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trl = pytest.importorskip("trl", minversion="1.0")  # older ones do not run on transformers 5

    own = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    for settings in ({}, {"beta": 0.2, "loss_type": ["ipo"], "ld_alpha": 0.5}):
        caplog.clear()
        with caplog.at_level("WARNING", logger="gapo"):
            trl.DPOTrainer(
                str(saved), args=trl.DPOConfig(str(tmp_path), **own, **settings), train_dataset=dataset(2),
                processing_class=hf_models.tokenizer(), callbacks=[GAPOCallback()],
            )  # fmt: skip
        assert ("beta=0.2, ld_alpha=0.5, loss_type=['ipo']: no effect" in caplog.text) is bool(settings)


@pytest.mark.parametrize("objective", ["dpo", "gapo+dpo"])
def test_a_beta_that_the_objective_would_not_read_is_refused(tmp_path: Path, objective: str) -> None:
    """TRL's users write beta=0.05 for DPO; here that field is GAPO's, and DPO's stands in objective_settings."""
    with pytest.raises(ValueError, match=r"beta=0.05 is a setting of .*give objective_settings=\{'beta': 0.1\}"):
        GAPOConfig(str(tmp_path), objective=objective, beta=0.05)
    args = GAPOConfig(str(tmp_path), objective="gapo+dpo", beta=2.0, objective_settings={"beta": 0.05})
    loss = gapo.objectives.resolve(args.objective, args.step_config(), args.objective_settings)
    assert (loss.settings["beta"], loss.settings["gap_beta"], loss.settings["gap_gamma"]) == (0.05, 2.0, 0.25)


def test_a_gpu_has_trls_defaults_and_a_cpu_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = "activation_checkpointing"  # since transformers 5.20

    def defaults(**options: Any) -> tuple[Any, Any]:
        args = GAPOConfig(str(tmp_path), **options)
        if hasattr(args, new):
            assert getattr(args, new) == args.gradient_checkpointing
        return args.bf16, args.gradient_checkpointing

    assert defaults() == (False, False)
    assert defaults(bf16=True, gradient_checkpointing=True, use_cpu=True) == (
        True,
        True,
    )  # and no FutureWarning of the old name
    module = sys.modules[GAPOConfig.__module__]
    monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)  # type: ignore[attr-defined]
    for options, values in (
        ({}, (True, True)),
        ({"fp16": True}, (False, True)),
        ({"use_cpu": True}, (False, False)),
        ({"bf16": False, "gradient_checkpointing": False}, (False, False)),
    ):
        args = GAPOConfig.__new__(GAPOConfig)
        for name, value in {"bf16": None, "gradient_checkpointing": None, "fp16": False, "use_cpu": False}.items():
            setattr(args, name, options.get(name, value))
        args.activation_checkpointing = None
        args._take_defaults_of_device()
        assert (args.bf16, args.activation_checkpointing) == values, options


def test_checkpointing_by_default_is_for_models_that_support_it(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.checkpointing_by_default = True
    args.gradient_checkpointing = args.activation_checkpointing = True  # as on a GPU
    model = hf_models.make("llama")
    GAPOTrainer(model, args, train_dataset=dataset(), processing_class=hf_models.tokenizer())
    assert args.gradient_checkpointing
    model.supports_gradient_checkpointing = False
    GAPOTrainer(model, args, train_dataset=dataset(), processing_class=hf_models.tokenizer())
    assert not args.gradient_checkpointing
    assert not args.activation_checkpointing


def test_the_arguments_of_dpo_trainer(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"args": arguments(tmp_path), "train_dataset": dataset(), "ref_model": None}
    GAPOTrainer(str(saved), **more)
    with pytest.raises(ValueError, match="GAPO has no reference model: leave ref_model out, or give None"):
        GAPOTrainer(str(saved), **{**more, "ref_model": hf_models.make("llama")})
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="quantized weights cannot be trained: give peft_config"):
        GAPOTrainer(str(saved), **more, quantization_config=quantised)
    with pytest.raises(ValueError, match="quantization_config were given, but the model is loaded already"):
        GAPOTrainer(hf_models.make("llama"), **more, quantization_config=quantised)
    plain, options = AutoModelForCausalLM.from_pretrained, {}

    def loading(name: str, **kwargs: Any) -> Any:
        options.update(kwargs)
        return plain(name, dtype=kwargs["dtype"])

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loading)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = GAPOTrainer(str(saved), **more, quantization_config=quantised, peft_config=lora)
    assert options["quantization_config"] is quantised
    assert isinstance(trainer.model, PeftModel)
    more["args"] = arguments(tmp_path, model_init_kwargs={"quantization_config": {}})
    with pytest.raises(ValueError, match="quantization_config is in model_init_kwargs too"):
        GAPOTrainer(str(saved), **more, quantization_config=quantised, peft_config=lora)


def test_a_beta_of_dpos_scale_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    GAPOCallback(gapo.GAPOConfig(beta=0.5))
    GAPOCallback(objective="dpo", objective_settings={"beta": 0.1})
    assert caplog.text == ""
    GAPOCallback(gapo.GAPOConfig(beta=0.1))
    assert "beta=0.1 is of DPO's scale, for sums of log-probabilities; gapo applies it to means" in caplog.text
