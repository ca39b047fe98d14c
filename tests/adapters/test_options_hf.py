"""LD-DPO's alpha and WPO's weights in the Trainer: value and gradient by hand, TRL's own step, a reference refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hf_models
import logp_by_hand as hand
import numpy as np
import pytest
import torch
from frameworks import require_trls_trainers
from trainers import arguments
from transformers import Trainer, TrainerCallback

import gapo
from gapo.adapters.hf import GAPOCallback, GAPOTrainer, PreferenceCollator, with_reference_logps
from gapo.adapters.hf import GAPOConfig as Arguments
from gapo.adapters.hf.margins import pair_logps

OPTIONS: dict[str, Any] = {"ld_alpha": hand.ALPHA, "use_weighting": True}


class Gradients(TrainerCallback):
    """The gradients of the first step, before clipping."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not hasattr(self, "first"):
            self.first = {n: p.grad.clone() for n, p in model.named_parameters()}


def logits_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    return model(input_ids=torch.from_numpy(ids)).logits


def measured(rows: list[dict[str, Any]], alpha: float | None) -> list[dict[str, Any]]:
    return with_reference_logps(hf_models.make("llama", seed=1).double(), rows, ld_alpha=alpha, progress=None)


def trainer_of(
    tmp_path: Path, model: Any, rows: Any, results: list[Any], config: Any = None, **options: Any
) -> Trainer:
    callback = GAPOCallback(config, on_step=lambda result, batch: results.append(result), **options)
    return Trainer(
        model,
        arguments(tmp_path, max_steps=1, max_grad_norm=0.0),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=PreferenceCollator(hf_models.tokenizer(), padding_side="right"),
        callbacks=[callback],
    )


@pytest.mark.parametrize("objective", ["dpo", "gapo"])
def test_value_gradient_and_evaluation_by_hand(tmp_path: Path, objective: str) -> None:
    """The oracle sums log-softmax times a table of factors; GAPO's weights come from the anchor gaps of the step."""
    model = hf_models.make("llama").double()
    rows, results = measured(hand.rows(), hand.ALPHA), []
    settings = {"objective_settings": {"beta": hand.BETA}} if objective == "dpo" else {}
    config = gapo.GAPOConfig(rho=0.3)
    trainer = trainer_of(tmp_path, model, rows, results, config, objective=objective, **settings, **OPTIONS)
    policy = copy.deepcopy(model)
    evaluated = trainer.evaluate()
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    # Shuffled alike, the mean over the pairs is the same.
    ids, labels = hand.stacked(PreferenceCollator(hf_models.tokenizer(), padding_side="right")(rows))
    logits = logits_of(policy, ids)
    factors = torch.from_numpy(hand.token_factors(labels, hand.ALPHA))
    weights = torch.tensor(hand.wpo(logits.detach().numpy(), labels))
    sums = (logits.log_softmax(-1) * factors).sum((1, 2))
    means = sums / torch.from_numpy(hand.lengths(labels))
    other = logits_of(hf_models.make("llama", seed=1).double(), ids).detach()
    reference = (other.log_softmax(-1) * factors).sum((1, 2))
    if objective == "dpo":
        z = (sums[:4] - sums[4:]) - (reference[:4] - reference[4:])
        loss = (weights * -torch.nn.functional.logsigmoid(hand.BETA * z)).mean()
        value = held_out = loss.detach()
    else:
        margins = means[:4] - means[4:]
        order = [int((margins - m).abs().argmin()) for m in results[0].margins]
        gaps = results[0].anchor_gaps[torch.tensor(order).argsort()]
        pull = weights * config.beta * torch.sigmoid(config.gamma - config.beta * gaps)
        loss = -(pull.detach() * margins).mean()
        torch.testing.assert_close(results[0].weights[torch.tensor(order).argsort()], pull, rtol=1e-6, atol=0)
        value = (weights * -torch.nn.functional.logsigmoid(config.beta * gaps - config.gamma)).mean()
        held_out = (weights * -torch.nn.functional.logsigmoid(config.beta * margins - config.gamma)).mean()
    loss.backward()
    assert float(results[0].loss) == pytest.approx(float(value.detach()), rel=1e-6)
    for name, p in policy.named_parameters():
        torch.testing.assert_close(gradients.first[name], p.grad, rtol=1e-4, atol=1e-6)
    assert evaluated["eval_loss"] == pytest.approx(float(held_out.detach()), rel=1e-5)
    assert evaluated["eval_logps/chosen"] == pytest.approx(float(means[:4].detach().mean()), rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_step_is_trls(tmp_path: Path) -> None:
    """TRL's trainer takes its own step, and with the callback the same one; it measures the reference in both."""
    trl = require_trls_trainers()
    if "precompute_ref_log_probs" not in trl.DPOConfig.__dataclass_fields__:
        pytest.skip("this version of TRL has no reference measured ahead")
    from datasets import Dataset

    hf_models.make("llama").save_pretrained(tmp_path / "model")
    pairs = Dataset.from_list([{n: row[n] for n in ("prompt", "chosen", "rejected")} for row in hf_models.pairs(4)])

    def gradients(callbacks: list[Any], **changes: Any) -> dict[str, torch.Tensor]:
        options = {**OPTIONS, "beta": hand.BETA, "precompute_ref_log_probs": True, **changes}
        args = trl.DPOConfig(
            str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
            max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=4, save_strategy="no", **options,
        )  # fmt: skip
        first = Gradients()
        trainer = trl.DPOTrainer(
            str(tmp_path / "model"), ref_model=hf_models.make("llama", seed=1), args=args, train_dataset=pairs,
            processing_class=hf_models.tokenizer(), callbacks=[*callbacks, first],
        )  # fmt: skip
        trainer.train()
        return first.first

    def ours(**options: Any) -> GAPOCallback:
        return GAPOCallback(objective="dpo", objective_settings={"beta": hand.BETA}, **options)

    theirs = gradients([])
    found = gradients([ours(**OPTIONS)])
    for name, g in theirs.items():
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"TRL measures the reference with ld_alpha=0.4 .* with ld_alpha=None"):
        gradients([ours()])


def test_the_trainer_takes_them_from_its_arguments(tmp_path: Path) -> None:
    args = Arguments(str(tmp_path), use_cpu=True, report_to="none", objective="simpo", **OPTIONS)
    model = hf_models.make("llama")
    trainer = GAPOTrainer(model, args, train_dataset=hf_models.pairs(4), processing_class=hf_models.tokenizer())
    options = next(c.options for c in trainer.callback_handler.callbacks if isinstance(c, GAPOCallback))
    assert (options.ld_alpha, options.use_weighting) == (hand.ALPHA, True)
    assert "ld_alpha 0.4, use_weighting True" in trainer._method()
    with pytest.raises(ValueError, match=r"use_weighting weights the loss of each pair, and objective 'dr_dpo' is one"):
        Arguments(str(tmp_path), use_cpu=True, objective="dr_dpo", use_weighting=True)
    with pytest.raises(ValueError, match=r"config has ld_alpha=0.4, and ld_alpha here is None"):
        GAPOCallback(args, objective="simpo")  # type: ignore[arg-type]


def test_a_reference_of_another_alpha_is_refused_in_training_and_evaluation(tmp_path: Path) -> None:
    model = hf_models.make("llama").double()
    batch = PreferenceCollator(hf_models.tokenizer())(measured(hand.rows(), hand.ALPHA))
    with pytest.raises(ValueError, match="the policy is measured with ld_alpha=None"):
        pair_logps(model, batch)
    for alpha, option in ((None, hand.ALPHA), (hand.ALPHA, None), (0.7, hand.ALPHA)):
        trainer = trainer_of(tmp_path, model, measured(hand.rows(), alpha), [], objective="dpo", ld_alpha=option)
        for ask in (trainer.train, trainer.evaluate):
            with pytest.raises(ValueError, match=rf"the policy is measured with ld_alpha={option}, and the batch's"):
                ask()
