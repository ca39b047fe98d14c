"""Time and memory of reading and tokenising pairs: the tables of docs/pairs.md.

    python benchmarks/reading.py --pairs 200000
    python benchmarks/reading.py --file pairs.jsonl --chat

Each row is measured in a process of its own. Memory is what is not a mapped file (Linux). Times are of the processor,
since other processes share the machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gapo.data import generate_pairs, read_pairs, tokenize_pair, tokenize_pairs, warmup_text, write_rows
from gapo.data.limits import Limits
from gapo.data.token_table import tokenized_rows


def memory(name: str) -> int:
    """RssAnon (now) or VmHWM (at most) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def reading(path: Path, in_lists: bool) -> dict[str, float]:
    before = memory("RssAnon")
    began = time.process_time()
    rows: Any = read_pairs(path).rows
    seconds = time.process_time() - began
    if in_lists:
        rows = [dict(row) for row in rows]
    held, peak = memory("RssAnon") - before, memory("VmHWM") - before
    began = time.process_time()
    sum(len(row["chosen"]) for row in rows)
    again = time.process_time() - began
    n = len(rows)
    row = {
        "held_kb": held / n / 1e3,
        "peak_kb": peak / n / 1e3,
        "read_us": seconds / n * 1e6,
        "again_us": again / n * 1e6,
    }
    return {name: round(value, 2) for name, value in row.items()}


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(warmup_text(5000).split("\n"), trainer)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


def tokenising(path: Path, way: str, chat: bool, most: int) -> dict[str, float]:
    rows: Any = read_pairs(path, limit=most).rows
    if chat:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{**r, **{n: [{"role": role, "content": r[n]}] for n, role in roles.items()}} for r in rows]
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:

        def from_file() -> None:
            tokenized_rows(rows, tokenizer, Limits(1024), name="pairs", folder=Path(folder))

        ways: dict[str, Callable[[], Any]] = {
            "pair by pair": lambda: [tokenize_pair(row, tokenizer) for row in rows],
            "many at once": lambda: tokenize_pairs(rows, tokenizer),
            "into a file": from_file,
            "from the file": from_file,
        }
        if way == "from the file":
            from_file()
        tokenize_pair(rows[0], tokenizer)
        began = time.process_time()
        ways[way]()
        return {"ms": round((time.process_time() - began) / len(rows) * 1e3, 3)}


def synthetic(path: Path, n: int) -> Path:
    """`n` pairs of about 1 kB, of the words of the demonstration pairs."""
    base = generate_pairs(1000)
    rng = np.random.default_rng(0)

    def longer(row: dict[str, Any], i: int) -> dict[str, Any]:
        others = " ".join(base[j]["prompt"].strip() for j in rng.integers(1000, size=18))
        return {**row, "id": i, "prompt": f"{i} {others} {row['prompt']}"}

    write_rows(path, (longer(base[i % 1000], i) for i in range(n)))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000, help="generated pairs (default: 20000)")
    parser.add_argument("--file", type=Path, help="pairs to measure instead")
    parser.add_argument("--chat", action="store_true", help="tokenise messages through a chat template")
    parser.add_argument("--tokenized", type=int, default=4000, help="pairs to tokenise (default: 4000)")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")

    def show(name: str, function: Callable[..., dict[str, float]], *arguments: Any) -> None:
        with context.Pool(1) as pool:
            print(json.dumps({"what": name, **pool.apply(function, arguments)}), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = options.file or synthetic(Path(folder, "pairs.jsonl"), options.pairs)
        show("read, rows in a file", reading, path, False)
        show("read, then copied into a list", reading, path, True)
        for way in ("pair by pair", "many at once", "into a file", "from the file"):
            show(f"tokenised {way}", tokenising, path, way, options.chat, options.tokenized)


if __name__ == "__main__":
    main()
