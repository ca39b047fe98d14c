"""Small models of the layouts people tune, with random weights, a tokenizer of characters, and pairs for them."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers

from gapo.data import collate_pairs, generate_pairs, tokenize_pair

VOCAB = 96
HEADS = {"llama": "lm_head.weight", "gpt2": "transformer.wte.weight", "pythia": "lm_head.weight"}
KINDS = tuple(HEADS)


def make(kind: str, *, dropout: float = 0.0, seed: int = 0) -> Any:
    """A model of two layers in float32."""
    torch.manual_seed(seed)
    shared = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                **shared, n_embd=32, n_layer=2, n_head=4, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout
            )
        ).eval()
    if kind == "pythia":
        return transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**shared, **wide, hidden_dropout=dropout, attention_dropout=dropout)
        ).eval()
    config = transformers.LlamaConfig(**shared, **wide, tie_word_embeddings=False, attention_dropout=dropout)
    return transformers.LlamaForCausalLM(config).eval()


def lora(kind: str) -> Any:
    """The same with LoRA adapters on attention."""
    import peft

    return peft.get_peft_model(make(kind), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def batch(pairs: int = 3, seed: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Random token ids as a padded batch of pairs."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(pairs):
        prompt = rng.integers(1, VOCAB, rng.integers(2, 6)).tolist()
        row = {}
        for answer in ("chosen", "rejected"):
            ids = rng.integers(1, VOCAB, rng.integers(2, 8)).tolist()
            row |= {f"{answer}_input_ids": prompt + ids, f"{answer}_labels": [-100] * len(prompt) + ids}
        rows.append(row)
    arrays = collate_pairs(rows, pad_token_id=0, padding_side=side)
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


@cache
def tokenizer() -> Any:
    """A tokenizer of characters and a few merges, trained on generated pairs; "<|end|>" opens, closes and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE(unk_token="<|end|>"))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    found.decoder = decoders.Metaspace(prepend_scheme="never")
    texts = [row[part] for row in generate_pairs(50) for part in ("prompt", "chosen", "rejected")]
    alphabet = [*string.ascii_letters, *string.digits, *".,?\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<|end|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, **special)


def pairs(n: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Generated pairs, tokenised as well."""
    return [{**row, **tokenize_pair(row, tokenizer(), max_length=64)} for row in generate_pairs(n, seed=seed)]


class InOrder(transformers.Trainer):
    """Without shuffling, so that all runs see the same pairs in each step."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)
