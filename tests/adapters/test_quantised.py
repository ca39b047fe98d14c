"""Adapters over a quantised base: it stays as it is, bit for bit, and the step is that of the dequantised model."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import hf_models
import peft
import pytest
import torch
from frameworks import require
from trainers import make_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gapo
from gapo import GAPOConfig, cli, data
from gapo.adapters import hf
from gapo.adapters.hf import DriftCallback, GAPOCallback, GAPOTrainer
from gapo.adapters.hf.margins import pair_logps
from gapo.adapters.hf.models import stay_differentiable
from gapo.backends.torch.onepass import OnePassForward

require("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")  # peft 0.18, when it saves
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at every layer that it computes in float16

QUANTISED = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
KINDS = pytest.mark.parametrize("kind", QUANTISED)
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    hf_models.save_wide_llama(path)
    return path


def base(folder: Path, kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISED[kind], dtype=torch.float32)


def with_adapters(model: Any, *, at_work: bool = True) -> Any:
    """LoRA adapters, the same for the same seed; `at_work` with a B that is not 0."""
    torch.manual_seed(1)
    model = peft.get_peft_model(model, LORA)
    for name, p in model.named_parameters():
        if at_work and "lora_B" in name:
            p.data.normal_(std=0.1)
    return model.train()


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """All that is no adapter: packed weights, their scales, norms, embeddings."""
    state = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    return {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}


def assert_the_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@KINDS
@pytest.mark.parametrize("anchor", ["exact", "first_order"])
def test_the_step_is_that_of_the_dequantised_base(folder: Path, kind: str, anchor: str) -> None:
    model = with_adapters(base(folder, kind))
    plain = with_adapters(base(folder, kind).dequantize().float())
    quantised_layers = {type(module).__name__ for module in model.modules()} & {"Linear4bit", "Linear8bitLt"}
    assert len(quantised_layers) == 1
    assert not {type(module).__name__ for module in plain.modules()} & {"Linear4bit", "Linear8bitLt"}
    before = frozen(model)
    config = GAPOConfig(rho=0.3, anchor=anchor)
    results = [gapo.value_and_grad(pair_logps, config, backend="torch")(m, hf_models.batch()) for m in (model, plain)]
    (found, gradients), (expected, plain_gradients) = results
    torch.testing.assert_close(found.anchor_gaps, expected.anchor_gaps, rtol=1e-4, atol=2e-6)
    assert float(found.anchor_gaps.abs().min()) > 1e-3
    assert all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        assert float((gradient - plain_gradients[name]).norm() / plain_gradients[name].norm()) < 1e-4, name
    assert_the_same(before, frozen(model))


@KINDS
def test_one_pass_serves_adapters_over_a_quantised_base(
    folder: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the adapters' own layers are tapped: what their quantised parent is made of does not matter."""
    model = with_adapters(base(folder, kind))
    config = GAPOConfig(rho=0.3)
    with caplog.at_level(logging.WARNING, logger="gapo"):
        forward = OnePassForward(pair_logps, model, hf_models.batch(), config)
        one, two = (
            gapo.value_and_grad(pair_logps, config, backend="torch", one_pass=one_pass)(model, hf_models.batch())[1]
            for one_pass in (True, False)
        )
    assert forward.one_pass
    assert {type(m).__name__ for m in model.modules() if m._forward_hooks} == {"Linear"}
    assert caplog.records == []
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, two[name], rtol=1e-4, atol=1e-6)


@KINDS
def test_training_moves_the_adapters_alone(folder: Path, tmp_path: Path, kind: str) -> None:
    model = with_adapters(base(folder, kind), at_work=False)
    before, adapters = frozen(model), copy.deepcopy(peft.get_peft_model_state_dict(model))
    trainer = make_trainer(tmp_path, model, max_steps=3, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(DriftCallback(pairs=3, prompts=2, max_new_tokens=3))
    trainer.evaluate()
    trainer.train()
    assert_the_same(before, frozen(model))
    moved = peft.get_peft_model_state_dict(model)
    assert all(not torch.equal(adapters[name], value) for name, value in moved.items())
    rows = trainer.state.log_history
    assert [row["gapo/radius"] > 0 for row in rows if "gapo/radius" in row] == [False, True, True]
    assert [row["drift/kl"] for row in rows if "drift/kl" in row] == [0.0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(base(folder, kind), tmp_path / "saved").train()
    torch.testing.assert_close(pair_logps(loaded, hf_models.batch()), pair_logps(model.train(), hf_models.batch()))


@KINDS
def test_an_evaluation_changes_no_step_after_it(folder: Path, tmp_path: Path, kind: str) -> None:
    """On a CPU with AVX512-BF16, bitsandbytes would pack 4-bit weights in it, and gradients and gaps would be 0."""
    trained = []
    for evaluate in (False, True):
        model = with_adapters(base(folder, kind))
        trainer = make_trainer(tmp_path, model)
        if evaluate:
            trainer.evaluate()
        trainer.train()
        trained.append(([r["gapo/anchor_gap_mean"] for r in trainer.state.log_history if "loss" in r], model))
    (gaps, one), (gaps_after, other) = trained
    assert gaps == gaps_after
    assert min(gaps) > 0
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@KINDS
def test_gapo_trainer_makes_a_quantised_model_ready(folder: Path, tmp_path: Path, kind: str) -> None:
    """As peft prepares it: 16-bit parts widened, inputs that carry gradients for checkpointed layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISED[kind], dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    before = frozen(model)
    options = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    options |= {"learning_rate": 1e-3, "warmup_steps": 0, "gradient_checkpointing": True, "bf16": False}
    trainer = GAPOTrainer(
        model,
        hf.GAPOConfig(str(tmp_path), rho=0.3, **options),
        train_dataset=hf_models.pairs(8),
        eval_dataset=hf_models.pairs(4, seed=5),
        processing_class=hf_models.tokenizer(),
        peft_config=LORA,
        callbacks=[DriftCallback(pairs=2, prompts=1, max_new_tokens=2)],
    )
    trainer.evaluate()
    trainer.train()
    assert trainer.model.get_base_model().model.norm.weight.dtype == torch.float32
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): x for name, x in frozen(trainer.model).items()
    }
    for name, value in before.items():
        assert torch.equal(value.to(after[name].dtype), after[name]), name
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    rows = trainer.state.log_history
    assert [row["gapo/radius"] > 0 for row in rows if "gapo/radius" in row] == [False, True]
    assert [row["step"] for row in rows if "drift/kl" in row] == [0, 2]


def test_packing_is_held_off_while_training_and_refused_when_done(folder: Path, tmp_path: Path) -> None:
    model = with_adapters(base(folder, "nf4"))
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # whatever this machine's processor is
    trainer = make_trainer(tmp_path, model)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    trainer.evaluate()
    next(c for c in trainer.callback_handler.callbacks if isinstance(c, GAPOCallback)).detach()
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
    layers[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError, match=r"the 4-bit weights of .*layers\.0.* were packed for inference, .* load the mo"
    ):
        stay_differentiable(model)


@KINDS
def test_gapo_train_over_a_saved_quantised_base(
    folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib")  # of the extra `cli`
    base(folder, kind).save_pretrained(tmp_path / "base")
    data.write_rows(tmp_path / "pairs.jsonl", data.generate_pairs(24))
    hf_models.tokenizer().save_pretrained(tmp_path / "base")
    settings = {"model": str(tmp_path / "base"), "lora_r": 2, "lora_targets": "q_proj,v_proj"}
    settings |= {"max_steps": 2, "batch_size": 4, "eval_steps": 1, "logging_steps": 1, "max_length": 64, "rho": 0.3}
    settings |= {"pairs": str(tmp_path / "pairs.jsonl"), "eval_fraction": 0.25}
    settings |= {"output_dir": str(tmp_path / "run"), "learning_rate": 1e-3, "drift": True, "drift_pairs": 2}
    settings |= {"drift_prompts": 1, "drift_max_new_tokens": 2}
    assert cli.main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "drift/kl" in row] == [0, 1, 2]
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
    settings |= {"lora_r": 0, "output_dir": str(tmp_path / "whole")}
    assert cli.main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 1
    assert "is quantised, and such weights cannot be trained: train adapters, --lora_r 16" in capsys.readouterr().err
