"""Small models of the layouts people tune, with random weights, and batches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from token_pairs import VOCAB, arrays, pairs, tokenizer

__all__ = ["HEADS", "KINDS", "VOCAB", "InOrder", "batch", "lora", "make", "pairs", "save_wide_llama", "tokenizer"]

HEADS = {"llama": "lm_head.weight", "gpt2": "transformer.wte.weight", "pythia": "lm_head.weight"}
KINDS = tuple(HEADS)


def make(kind: str, *, dropout: float = 0.0, seed: int = 0, layers: int = 2) -> Any:
    """A small model in float32."""
    torch.manual_seed(seed)
    shared = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    wide = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                **shared,
                n_embd=32,
                n_layer=layers,
                n_head=4,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
            )
        ).eval()
    if kind == "pythia":
        return transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**shared, **wide, hidden_dropout=dropout, attention_dropout=dropout)
        ).eval()
    config = transformers.LlamaConfig(**shared, **wide, tie_word_embeddings=False, attention_dropout=dropout)
    return transformers.LlamaForCausalLM(config).eval()


def save_wide_llama(path: Path) -> None:
    """A small Llama whose widths are whole blocks of 64, and its tokenizer, as `save_pretrained` leaves them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, **ids, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer().save_pretrained(path)


def lora(kind: str) -> Any:
    """The same with LoRA adapters on attention."""
    import peft

    return peft.get_peft_model(make(kind), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def batch(pairs: int = 3, seed: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Random token ids as a padded batch of pairs."""
    return {name: torch.from_numpy(x) for name, x in arrays(pairs, seed, side).items()}


class InOrder(transformers.Trainer):
    """Without shuffling, so that all runs see the same pairs in each step."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)
