"""`model: tiny`: a small Llama with a tokenizer trained on the data at hand, warmed up on text, kept for the next run.

The warm-up sees prompts with chosen and with rejected answers alike, so that nothing of the labels leaks.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gapo.data.lazy_rows import selected
from gapo.data.messages import text_of
from gapo.data.streams import stream
from gapo.files import cannot_write, partial_of, sweep, write_errors
from gapo.runs import ranks
from gapo.runs.config_bases import TrainingConfig

SEQUENCE = 128
_MOST_PAIRS = 50_000
# The variables by which torchrun and `accelerate launch` describe to a process its group, and how it shares the work.
_GROUP = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")
END = "<|end|>"


def tiny_model(config: TrainingConfig, answers: Sequence[str]) -> Path:
    """Folder of the warmed-up tiny model and its tokenizer, made on the first call and kept under `config.cache_dir`.

    The same settings and texts give the same folder, so that runs that are compared start from one policy.

    Args:
        config: its `tiny_*` fields, `cache_dir`, `max_length` and `seed`.
        answers: texts to warm up on after the plain text, such as those of `answer_texts`.

    Raises:
        FileNotFoundError: `tiny_text` does not exist.
    """
    plain = plain_text("tiny_text", config.tiny_text)
    folder = Path(config.cache_dir) / f"tiny-{_key(config, plain, answers)}"
    if not folder.exists():
        sweep(folder)
        partial = partial_of(folder)
        try:
            _alone(_make, config, plain, answers, partial)
            os.replace(partial, folder)
        except write_errors() as error:
            if not folder.exists():  # another process was first
                raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _alone(work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` outside the group of processes that torchrun or `accelerate launch` made.

    Inside it, the Trainer would warm up over all processes, with FSDP or DeepSpeed where the run has it, and the policy
    would depend on that.
    """
    group = {name: value for name, value in os.environ.items() if name in _GROUP or name.startswith(_LAUNCHERS)}
    if ranks.count() == 1 and not any(name.startswith("ACCELERATE_") for name in group):
        work(*arguments)
        return
    for name in group:
        del os.environ[name]
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(work, *arguments).result()
    finally:
        os.environ |= group


def plain_text(name: str, source: str | None) -> str:
    """The text of a file, "" for None. Raises FileNotFoundError, which says that it is the setting `name`."""
    if source is None:
        return ""
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no file {source!r}; give plain text, .txt or .txt.gz")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8", errors="replace")


def answer_texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each prompt with either answer. Flipping pairs changes nothing, so that no label leaks into the warm-up.

    Of more than 50,000 pairs, 50,000 are drawn: a warm-up reads the tokens of a few thousand.
    """
    if len(rows) > _MOST_PAIRS:
        rows = selected(rows, np.sort(stream(0, "warm-up").permutation(len(rows))[:_MOST_PAIRS]))
    texts = []
    for row in rows:
        sides = sorted(text_of(row[side]) for side in ("chosen", "rejected"))  # in an order that tells no label
        texts += [text_of(row["prompt"]) + side for side in sides]
    return texts


def _key(config: TrainingConfig, plain: str, answers: Sequence[str]) -> str:
    settings = {name: value for name, value in vars(config).items() if name.startswith("tiny_") and name != "tiny_text"}
    digest = hashlib.sha256(json.dumps([settings, config.seed], sort_keys=True).encode())
    for text in (plain, *sorted(answers)):
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def _make(config: TrainingConfig, plain: str, answers: Sequence[str], folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer(config, plain, answers)
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.tiny_hidden_size,
            intermediate_size=-(-8 * config.tiny_hidden_size // 3 // 32) * 32,
            num_hidden_layers=config.tiny_layers,
            num_attention_heads=config.tiny_heads,
            num_key_value_heads=config.tiny_heads,
            max_position_embeddings=max(512, config.max_length),
            tie_word_embeddings=False,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    rng = np.random.default_rng(config.seed)
    shuffled = [answers[i] for i in rng.permutation(len(answers))]
    stages = [([plain], config.tiny_text_steps, "text"), (shuffled, config.tiny_answer_steps, "answers")]
    for texts, steps, name in stages:
        if steps and any(texts):
            _warm_up(model, _blocks(tokenizer, texts), steps, config, name, folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(config: TrainingConfig, plain: str, answers: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.tiny_vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*answers, *_paragraphs(plain)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def _paragraphs(text: str, size: int = 10_000) -> Iterator[str]:
    return (text[i : i + size] for i in range(0, len(text), size))


def _blocks(tokenizer: Any, texts: Sequence[str]) -> list[dict[str, list[int]]]:
    """The texts end to end, cut into sequences of equal length."""
    pieces = [piece for text in texts for piece in (_paragraphs(text) if len(texts) == 1 else [text])]
    end = [] if len(texts) == 1 else [tokenizer.eos_token_id]
    ids = [token for piece in tokenizer(pieces)["input_ids"] for token in (*piece, *end)]
    ids = ids * (1 + SEQUENCE // max(1, len(ids)))  # a text shorter than one sequence repeats
    cut = [ids[i : i + SEQUENCE] for i in range(0, len(ids) - SEQUENCE + 1, SEQUENCE)]
    return [{"input_ids": block, "labels": block} for block in cut]


def _warm_up(model: Any, blocks: list[Any], steps: int, config: TrainingConfig, name: str, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    print(
        f"warming up the tiny model on {name}: {steps} steps of {config.tiny_batch_size} x {SEQUENCE} tokens",
        flush=True,
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "warmup"),
        max_steps=steps,
        per_device_train_batch_size=config.tiny_batch_size,
        learning_rate=config.tiny_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to="none",
        seed=config.seed,
        dataloader_pin_memory=False,
    )
    arguments.device  # noqa: B018  # counts the GPUs
    arguments._n_gpu = min(1, arguments.n_gpu)  # on several, DataParallel would multiply the batch
    Trainer(model, arguments, train_dataset=blocks, data_collator=default_data_collator).train()
    shutil.rmtree(folder / "warmup", ignore_errors=True)
