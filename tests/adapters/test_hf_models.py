"""Models of every kind under one question: are their log-probabilities those of unpadded rows, or are they refused?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import hf_models
import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from gapo import GAPOConfig
from gapo.adapters.hf import DriftCallback, GAPOCallback, PreferenceCollator, with_reference_logps
from gapo.adapters.hf.batches import stack_pairs
from gapo.adapters.hf.margins import pair_logps
from gapo.adapters.hf.models import padding_may_stand_left, require_causal
from gapo.backends.torch import TorchBackend
from gapo.step import run

WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}


def by_hand(model: Any, batch: dict[str, Tensor], virtual: int = 0, **further: Any) -> Tensor:
    """(2N,) mean log-probabilities: one row at a time, unpadded, whole logits, token by token."""
    found = []
    for side in ("chosen", "rejected"):
        for i in range(len(batch["chosen_input_ids"])):
            real = batch[f"{side}_attention_mask"][i].bool()
            ids, labels = (batch[f"{side}_{part}"][i][real] for part in ("input_ids", "labels"))
            given = {name: x[i : i + 1] for name, x in further.items()}
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **given).logits[0, virtual:]
            steps = [t for t in range(1, len(ids)) if labels[t] != -100]
            found.append(torch.stack([logits[t - 1].log_softmax(-1)[ids[t]] for t in steps]).mean())
    return torch.stack(found)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=hf_models.VOCAB, **{**WIDE, "initializer_range": 0.3, **options})
    return tf.LlamaForCausalLM(config).eval()


def prompted(kind: str) -> tuple[Any, int]:
    """A small model behind a learned prompt, and how many positions of its logits are the prompt's."""
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**shared),
        "p": lambda: peft.PromptEncoderConfig(**shared, encoder_hidden_size=8),
        "multitask": lambda: peft.MultitaskPromptTuningConfig(**shared, num_tasks=2),
        "cpt": lambda: peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
        ),
        "prefix": lambda: peft.PrefixTuningConfig(**shared),
    }[kind]()
    model = peft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.5)
    return model, {"prefix": 0, "cpt": 4}.get(kind, 5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["prompt", "p", "multitask", "cpt", "prefix"])
@pytest.mark.filterwarnings("ignore")
def test_a_learned_prompt_shifts_nothing(kind: str, side: str) -> None:
    model, virtual = prompted(kind)
    batch = hf_models.batch(side=side)
    further = {"task_ids": torch.tensor([0, 1, 1])} if kind == "multitask" else {}
    with torch.no_grad():
        got = torch.cat(pair_logps(model, {**batch, **further}))
        torch.testing.assert_close(got, by_hand(model, batch, virtual, **further), rtol=1e-4, atol=1e-5)
        require_causal(model, stack_pairs(batch))
        with model.disable_adapter():  # as drift's starting policy is asked
            base = torch.cat(pair_logps(model, {**batch, **further}))
            torch.testing.assert_close(base, by_hand(model.get_base_model(), batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, base, atol=1e-3)


@pytest.mark.parametrize("kind", ["prompt", "p", "cpt", "prefix"])
@pytest.mark.filterwarnings("ignore")
def test_a_learned_prompt_gets_the_gradient_of_the_loss(kind: str) -> None:
    model, virtual = prompted(kind)
    batch, config = hf_models.batch(), GAPOConfig(rho=0.1, perturb="all")
    forward = TorchBackend().forward(pair_logps, model, batch, config)
    result, cotangents = run(forward, config, TorchBackend())
    got = forward.pullback(cotangents)
    logps = by_hand(model, batch, virtual)
    gaps = logps[:3] - logps[3:] - result.anchor_margins
    loss = -nn.functional.logsigmoid(config.beta * gaps - config.gamma).mean()
    names = list(got)
    for name, want in zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True):
        torch.testing.assert_close(got[name], want, rtol=1e-3, atol=1e-6)


def recurrent() -> dict[str, Any]:
    torch.manual_seed(0)
    shared = {"vocab_size": hf_models.VOCAB, **WIDE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return {
        "recurrent_gemma": tf.RecurrentGemmaForCausalLM(
            tf.RecurrentGemmaConfig(**{**shared, "num_hidden_layers": 3}, lru_width=16, attention_window_size=32)
        ),
        "mamba": tf.MambaForCausalLM(tf.MambaConfig(**shared, state_size=4)),
        "bloom": tf.BloomForCausalLM(tf.BloomConfig(vocab_size=hf_models.VOCAB, hidden_size=16, n_layer=1, n_head=2)),
        "lfm2": tf.Lfm2ForCausalLM(
            tf.Lfm2Config(
                **{**shared, "num_hidden_layers": 2}, num_key_value_heads=2, layer_types=["conv", "full_attention"]
            )
        ),
    }


@pytest.mark.parametrize("kind", ["recurrent_gemma", "mamba", "bloom", "lfm2"])
def test_padding_on_the_left_does_not_enter_a_recurrent_model(kind: str) -> None:
    model = recurrent()[kind].eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        for side in ("left", "right"):
            batch = hf_models.batch(side=side)
            got = torch.cat(pair_logps(model, batch))
            torch.testing.assert_close(got, by_hand(model, batch), rtol=1e-4, atol=1e-4)
    assert not padding_may_stand_left(model)
    assert padding_may_stand_left(llama())


def llava() -> Any:
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(**{**WIDE, "num_hidden_layers": 2}, image_size=28, patch_size=14)
    text = tf.LlamaConfig(vocab_size=64, **WIDE, initializer_range=0.3)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    ).eval()


def test_images_reach_the_model() -> None:
    model = llava()
    ids = torch.tensor([[60] * 4 + [5, 6, 7, 8], [60] * 4 + [5, 6, 9, 8]])
    ones, images = torch.ones_like(ids), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=ones, pixel_values=images[:1].expand(2, 3, 28, 28)).logits
        want = torch.stack([logits[r, 5:7].log_softmax(-1).gather(1, ids[r, 6:, None]).mean() for r in (0, 1)])
        stacked = {
            "input_ids": ids,
            "attention_mask": ones,
            "completion_mask": (torch.arange(8) > 5).long().expand(2, 8),
        }
        both = {**stacked, "pixel_values": images[:1].repeat(2, 1, 1, 1)}
        labels = ids.masked_fill(torch.arange(8) < 6, -100)
        sides = {
            f"{side}_{part}": x[i : i + 1]
            for i, side in enumerate(("chosen", "rejected"))
            for part, x in (("input_ids", ids), ("attention_mask", ones), ("labels", labels))
        }
        each = {f"{side}_pixel_values": images[:1] for side in ("chosen", "rejected")}
        for batch in (both, {**sides, "pixel_values": images[:1]}, {**sides, **each}):
            torch.testing.assert_close(torch.cat(pair_logps(model, batch)), want)
    with pytest.raises(ValueError, match=r"row 0 of input_ids .* stands for an image, .* but the batch holds none"):
        pair_logps(model, {**stacked, "position_ids": torch.arange(8).expand(2, 8)})
    with pytest.raises(ValueError, match=r"the batch holds 'pixel_values', but the model's forward takes no"):
        pair_logps(llama(), both)


def test_models_that_see_the_answer_are_refused(tmp_path: Path) -> None:
    shared = {"vocab_size": hf_models.VOCAB, **WIDE, "pad_token_id": 0}
    rows = stack_pairs(hf_models.batch())
    for model in (
        tf.BertLMHeadModel(tf.BertConfig(**shared)),
        tf.BertForMaskedLM(tf.BertConfig(**shared)).train(),
        tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=hf_models.VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=24)),
    ):
        with pytest.raises(ValueError, match=r"sees the answer that it should predict: .* needs a causal language"):
            require_causal(model, rows)
    decoder = tf.BertLMHeadModel(tf.BertConfig(**shared, is_decoder=True))
    causal = (decoder.train(), hf_models.make("gpt2", dropout=0.5).train(), *recurrent().values())
    state = torch.get_rng_state()
    for model in causal:
        require_causal(model, rows)  # dropout draws alike in both forwards
    assert torch.equal(state, torch.get_rng_state())
    bart = tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=hf_models.VOCAB, d_model=16, encoder_layers=1, decoder_layers=1)
    )
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration is an encoder-decoder: GAPO needs a causal"):
        trainer(tmp_path, bart)
    bert = trainer(tmp_path, tf.BertLMHeadModel(tf.BertConfig(**shared)))
    before = {name: x.clone() for name, x in bert.model.state_dict().items()}
    for use in (bert.train, bert.evaluate):
        with pytest.raises(ValueError, match="BertLMHeadModel sees the answer that it should predict"):
            use()
    assert all(torch.equal(x, before[name]) for name, x in bert.model.state_dict().items())
    with pytest.raises(ValueError, match="BertLMHeadModel sees the answer"):
        with_reference_logps(bert.model, hf_models.pairs(2), progress=None)


def test_a_row_longer_than_learned_positions_is_refused() -> None:
    batch = hf_models.batch()
    longest = max(int(batch[f"{side}_attention_mask"].sum(1).max()) for side in ("chosen", "rejected"))
    learned = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    short = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=hf_models.VOCAB, n_positions=longest - 1, **learned))
    with pytest.raises(
        ValueError, match=rf"a row of {longest} tokens is longer than the model, which knows {longest - 1} positions"
    ):
        pair_logps(short, batch)
    pair_logps(tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=hf_models.VOCAB, n_positions=longest, **learned)), batch)
    pair_logps(llama(max_position_embeddings=longest - 1), batch)  # rotary: any length


def test_what_is_no_batch_of_pairs_is_refused() -> None:
    ids = torch.randint(3, 60, (4, 6))
    stacked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match=r"holds KL_input_ids, label: its rows are no pairs"):
        stack_pairs({**stacked, "KL_input_ids": ids, "label": torch.ones(4)})
    with pytest.raises(ValueError, match=r"as many chosen rows as rejected ones; got 3 rows"):
        stack_pairs({name: x[:3] for name, x in stacked.items()})
    with pytest.raises(ValueError, match=r"'pixel_values', which .* takes, must be a tensor, got list"):
        stack_pairs({**stacked, "pixel_values": []}, {"pixel_values"})


def test_rows_of_trls_batches_share_their_pairs_prompt() -> None:
    def stacked(*rows: tuple[list[int], list[int]]) -> dict[str, torch.Tensor]:
        """(prompt, completion) of each row, padded as TRL does."""
        longest = max(len(prompt) + len(completion) for prompt, completion in rows)
        table = torch.zeros(3, len(rows), longest, dtype=torch.long)
        for r, (prompt, completion) in enumerate(rows):
            tokens = [*prompt, *completion]
            table[0, r, : len(tokens)] = torch.tensor(tokens)
            table[1, r, : len(tokens)] = 1
            table[2, r, len(prompt) : len(tokens)] = 1
        return dict(zip(("input_ids", "attention_mask", "completion_mask"), table, strict=True))

    prompts = [[5, 6], [7], [5, 8, 9], [4, 4]]
    chosen, rejected, third = ([(prompt, answer) for prompt in prompts] for answer in ([11, 12], [13], [14, 15]))
    rows = stack_pairs(stacked(*chosen, *rejected))
    assert rows["labels"][4].tolist() == [-100, -100, 13, -100, -100]
    stack_pairs(stacked(([6], [11]), ([5, 6], [12])))  # cut from the left, each side by as much as its answer asks for
    stack_pairs(stacked(([], [11]), ([5, 6], [12])))
    alternating = [row for pair in zip(chosen, rejected, strict=True) for row in pair]
    for other in (alternating, [*chosen, *rejected, *third], [*chosen, *reversed(rejected)]):
        with pytest.raises(ValueError, match=r"rows \d and \d+ of a batch of \d pairs have other prompts"):
            stack_pairs(stacked(*other))


def trainer(folder: Path, model: Any = None, callback: Any = None, kind: Any = Trainer, **options: Any) -> Trainer:
    own = {name: options.pop(name) for name in ("model_init", "compute_loss_func", "eval_dataset") if name in options}
    defaults = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    defaults |= {"per_device_train_batch_size": 4, "dataloader_pin_memory": False, "logging_steps": 1}
    data = {"train_dataset": options.pop("rows", hf_models.pairs(8)), "eval_dataset": hf_models.pairs(3, seed=5)}
    collator = options.pop("data_collator", PreferenceCollator(hf_models.tokenizer(), max_length=64))
    return kind(
        llama() if model is None and "model_init" not in own else model,
        TrainingArguments(str(folder), **{**defaults, **options}),
        data_collator=collator,
        callbacks=[callback or GAPOCallback(GAPOConfig(rho=0.1))],
        **{**data, **own},
    )


def chances(model: nn.Module) -> set[float]:
    return {m.p for m in model.modules() if isinstance(m, nn.Dropout)}


def test_a_model_made_later_has_no_dropout_either(tmp_path: Path) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(hf_models.make("gpt2", dropout=0.1))
        return made[-1]

    callback = GAPOCallback(GAPOConfig(rho=0.1))
    found = trainer(tmp_path, None, callback, model_init=make)
    found.train()
    assert chances(found.model) == {0.0}
    assert chances(made[0]) == {0.1}  # which the training does not use
    found.train()
    assert chances(found.model) == {0.0}
    callback.detach()
    assert chances(made[-1]) == {0.1}

    model = hf_models.make("gpt2", dropout=0.0)
    found = trainer(tmp_path, model)
    model.transformer.drop.p = 0.3  # after attaching
    found.train()
    assert chances(model) == {0.0}


@pytest.mark.filterwarnings("ignore")
def test_checkpointing_by_reentrance_is_refused_in_every_form(tmp_path: Path) -> None:
    def enabled(**kwargs: Any) -> Any:
        model = llama()
        model.gradient_checkpointing_enable(kwargs or None)
        return model

    for options in ({"use_reentrant": True}, {"preserve_rng_state": False}):  # torch's default is re-entrant
        with pytest.raises(ValueError, match="re-entrant gradient checkpointing"):
            trainer(tmp_path, enabled(**options)).train()
        with pytest.raises(ValueError, match="re-entrant gradient checkpointing"):
            trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options).train()
    assert trainer(tmp_path, enabled()).train().global_step == 1
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert trainer(tmp_path, enabled(use_reentrant=True), **again).train().global_step == 1  # as QLoRA scripts do
    assert trainer(tmp_path, gradient_checkpointing=True).train().global_step == 1
    prefix, _ = prompted("prefix")
    found = trainer(tmp_path, prefix)
    prefix.base_model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="drops the cache in which prefix tuning keeps its prompt"):
        found.train()


def test_experts_auxiliary_loss_is_said_to_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def moe(asked: bool) -> Any:
        config = tf.MixtralConfig(
            vocab_size=hf_models.VOCAB, **WIDE, num_key_value_heads=2, num_local_experts=4, output_router_logits=asked
        )
        return tf.MixtralForCausalLM(config)

    with caplog.at_level(logging.WARNING, logger="gapo"):
        trainer(tmp_path, moe(False))
        assert "auxiliary loss" not in caplog.text
        trainer(tmp_path, moe(True)).train()
        assert caplog.text.count("router_aux_loss_coef=0.001: the experts' auxiliary loss is left out") == 1
        caplog.clear()
        found = trainer(tmp_path, moe(False))
        found.aux_loss_enabled = True  # which TRL's DPOTrainer sets when it has been made
        found.train()
        assert "router_aux_loss_coef=0.001" in caplog.text
        ada = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10)
        trainer(tmp_path, peft.get_peft_model(llama(), ada))
        assert "AdaLoRA's orthogonality loss is left out" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect"),
        ({"compute_loss_func": print}, "compute_loss_func would not be called"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen counts"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics=\['inputs'\] asks for one row"),
        ({"train_sampling_strategy": "group_by_length"}, "needs a column 'length'"),
        ({"optim": "lomo"}, "optim='lomo' changes weights within the backward"),
        ({"data_collator": None}, "the trainer has transformers' own collator"),
        ({"rows": [{"prompt": "a", "chosen": "b", "rejected": "c", "images": []}]}, "a column 'images', and Pref"),
    ],
)
def test_arguments_without_effect_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_arguments_are_looked_at_again_when_training_begins(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    found.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.loss
    with pytest.raises(ValueError, match="compute_loss_func would not be called"):
        found.train()


def test_a_trainer_that_never_asks_for_the_loss_is_refused(tmp_path: Path) -> None:
    class Own(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            loss = pair_logps(model, inputs)[0].mean()
            loss.backward()
            return loss.detach()

    with pytest.raises(RuntimeError, match="Own made a step without calling compute_loss"):
        trainer(tmp_path, kind=Own).train()


def test_an_empty_evaluation_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data set to evaluate on holds no pairs"):
        trainer(tmp_path).evaluate([])


def test_an_evaluation_that_rounds_the_weights_is_the_last(tmp_path: Path) -> None:
    found = trainer(tmp_path, bf16_full_eval=True)
    found.train()
    found.evaluate()
    with pytest.raises(ValueError, match="has rounded the model's weights to 16 bits"):
        found.train()


def test_the_loss_of_an_evaluation_is_every_pairs_mean(tmp_path: Path) -> None:
    found = trainer(tmp_path, per_device_eval_batch_size=2)
    rows = hf_models.pairs(3, seed=5)
    with torch.no_grad():
        logps = by_hand(found.model, found.data_collator(rows))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows)

    def stacked(rows: Any) -> Any:  # as TRL's collator does
        both = stack_pairs(PreferenceCollator(hf_models.tokenizer())(rows))
        return {**both, "completion_mask": (both.pop("labels") != -100).long()}

    found.data_collator = stacked
    want = -nn.functional.logsigmoid(2.5 * (logps[:3] - logps[3:]) - 0.25).mean()
    assert found.evaluate(Stream())["eval_loss"] == pytest.approx(float(want), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_drift_behind_a_learned_prompt(tmp_path: Path) -> None:
    model, virtual = prompted("prompt")
    found = trainer(tmp_path, model, DriftCallback(pairs=3, prompts=0), learning_rate=0.0)
    GAPOCallback(GAPOConfig(rho=0.1)).attach(found)
    with torch.no_grad():
        want = by_hand(model, found.data_collator(hf_models.pairs(3, seed=5)), virtual)
    found.train()
    logged = [row for row in found.state.log_history if "drift/held_out_margin" in row]
    assert logged[0]["drift/held_out_margin"] == pytest.approx(float((want[:3] - want[3:]).mean()), abs=1e-4)
    assert logged[0]["drift/kl"] == pytest.approx(0, abs=1e-5)
