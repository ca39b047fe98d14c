"""A tokenizer of characters, pairs for it, and padded batches: what adapters are tested on, without PyTorch."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import numpy as np
from frameworks import require

from gapo.data import collate_pairs, generate_pairs, tokenize_pair

VOCAB = 96
GOOD = {"prompt": "Q? ", "chosen": "yes", "rejected": "no"}
CONVERSATION = {
    "prompt": [{"role": "user", "content": "Q?"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


def arrays(pairs: int = 3, seed: int = 0, side: str = "right") -> dict[str, np.ndarray]:
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
    return collate_pairs(rows, pad_token_id=0, padding_side=side)


@cache
def tokenizer() -> Any:
    """A tokenizer of characters and a few merges, trained on generated pairs; "<|end|>" opens, closes and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(tokenizer_object=found, **special)


def bytes_tokenizer(template: str | None = None, *, opens: str = "", closes: str = "") -> Any:
    """A tokenizer of one token for each byte, so that text says where tokens are; "<b>" is its BOS, "<e>" its EOS.

    `opens` and `closes` are what it sets before and behind every text: "<b>", "<e>" or nothing.
    """
    require("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<e>", "<b>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate([*special, *alphabet])}, merges=[]))
    found.add_special_tokens(special)
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    frame = [(x, found.token_to_id(x)) for x in {opens, closes} - {""}]
    if frame:
        found.post_processor = processors.TemplateProcessing(
            single=f"{opens} $A {closes}".split(), special_tokens=frame
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<b>", eos_token="<e>", pad_token="<e>", chat_template=template
    )


def pairs(n: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Generated pairs, tokenised as well."""
    return [{**row, **tokenize_pair(row, tokenizer(), max_length=64)} for row in generate_pairs(n, seed=seed)]
