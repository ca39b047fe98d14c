"""Tokenised pairs in an Arrow file, memory-mapped: made once by `datasets`, then found again by what they depend on."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo._extras import named_extra
from gapo.data.collate import TOKENIZED
from gapo.data.lazy_rows import Row, Rows
from gapo.data.limits import Cuts, Limits
from gapo.data.special_tokens import text_tokenizer
from gapo.data.tokenize import Tokens, tokens_of_each
from gapo.pairs import SIDES

# Columns that a table has while it is made: how many tokens of a row were cut, and whether it is left out.
NOTES = ("_gapo_prompt_cut", "_gapo_answers_cut", "_gapo_equal")
_AT_ONCE = 512


def tokenized_rows(
    rows: Sequence[Row], tokenizer: Any, limits: Limits, *, name: str, folder: Path, processes: int | None = None
) -> TokenRows:
    """The rows with their token ids and labels, as `gapo.data.tokenize_pairs`, but from a file in `folder`.

    The file's name is a digest of the rows, the tokenizer, the limits and the code. So the same call reads it again,
    and so do other processes, once the first one has returned.

    Args:
        rows: pairs.
        tokenizer: as for `tokenize_pairs`; so is `name`.
        limits: of the tokens.
        name: names the rows in warnings and errors.
        folder: for the files.
        processes: that tokenise; None for this one.

    Raises:
        ModuleNotFoundError: the `datasets` library is not installed.
        ValueError: as `tokenize_pairs`.
        OSError: the file cannot be written.
    """
    with named_extra("tokenising into a file", "hf"):
        import datasets
    key = _digest(rows, tokens_key(tokenizer, limits))
    folder.mkdir(parents=True, exist_ok=True)
    ids, number = datasets.Sequence(datasets.Value("int32")), datasets.Value("int32")
    features = {**dict.fromkeys(TOKENIZED, ids), **dict.fromkeys(NOTES[:2], number), NOTES[2]: datasets.Value("bool")}
    table = datasets.Dataset.from_dict({"place": np.arange(len(rows))}).map(
        _Tokenize(rows, tokenizer, limits, name),
        input_columns=["place"],
        batched=True,
        batch_size=_AT_ONCE,
        remove_columns=["place"],
        features=datasets.Features(features),
        cache_file_name=str(folder / f"tokens-{key}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=key,
        num_proc=processes if processes and processes > 1 else None,
        desc=f"tokenising {name}",
    )
    notes = table.select_columns(list(NOTES)).with_format("numpy")[:]
    cuts, (prompts, answers, equal) = Cuts(), (notes[note] for note in NOTES)
    for place in range(len(rows)):
        cuts.add(place, int(prompts[place]), int(answers[place]), bool(equal[place]))
    cuts.tell(name, limits)
    different = np.flatnonzero(~np.asarray(equal, dtype=bool))
    return TokenRows(rows, table.select_columns(list(TOKENIZED)), different)


class TokenRows(Rows):
    """Rows with their token ids and labels, which lie in a table of `datasets`.

    Args:
        rows: as they were before they were tokenised.
        table: the token columns of each.
        index: the numbers of the rows that are meant, (n,) integers.
    """

    def __init__(self, rows: Sequence[Row], table: Any, index: np.ndarray) -> None:
        super().__init__(_WithTokens(rows, table), index)
        self._table = table if len(index) == len(table) else table.select(index)

    def extent(self) -> tuple[int, int]:
        """(greatest token id, most tokens of a side), from the columns, without making a row."""
        import pyarrow.compute as pc

        highest = longest = 0
        for part in self._table.with_format("arrow").iter(batch_size=10_000):
            for side in SIDES:
                ids = part[f"{side}_input_ids"]
                highest = max(highest, pc.max(pc.list_flatten(ids)).as_py())
                longest = max(longest, pc.max(pc.list_value_length(ids)).as_py())
        return highest, longest


def columns_of(tokens: Sequence[Tokens]) -> dict[str, list[Any]]:
    """The columns of several rows: `TOKENIZED`, and `NOTES` on what was cut."""
    columns: dict[str, list[Any]] = {name: [row.columns[name] for row in tokens] for name in TOKENIZED}
    notes = [(row.prompt_cut, row.answers_cut, row.are_equal) for row in tokens]
    return columns | {name: [note[i] for note in notes] for i, name in enumerate(NOTES)}


class _Tokenize:
    """The function that is mapped: places of rows to columns."""

    def __init__(self, rows: Sequence[Row], tokenizer: Any, limits: Limits, name: str) -> None:
        self._rows, self._tokenizer, self._limits, self._name = rows, tokenizer, limits, name

    def __call__(self, places: list[int]) -> dict[str, list[Any]]:
        rows = (self._rows[place] for place in places)
        each = tokens_of_each(rows, self._tokenizer, self._limits, name=self._name, numbers=places)
        return columns_of([tokens for _, tokens in each])


class _WithTokens:
    """A row of a place, with its token ids and labels."""

    def __init__(self, rows: Sequence[Row], table: Any) -> None:
        self._rows, self._table = rows, table

    def __call__(self, place: int) -> Row:
        return {**self._rows[place], **self._table[place]}


def _digest(rows: Sequence[Row], key: str) -> str:
    digest = hashlib.sha256(key.encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()[:32]


def tokens_key(tokenizer: Any, limits: Limits) -> str:
    """A digest of everything but the rows that tokens depend on: the tokenizer, the limits, the code, the libraries."""
    digest = hashlib.sha256(repr((limits, _identity(text_tokenizer(tokenizer)))).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _identity(tokenizer: Any) -> list[Any]:
    """What makes the tokens of a tokenizer: its own content, its special tokens, its template, and the libraries."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content |= {"truncation": None, "padding": None}  # set by calls, and reset by the next
    else:
        from datasets.fingerprint import Hasher

        content = Hasher.hash(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    # A template may print the day, as that of Llama 3 does.
    day = datetime.date.today() if "strftime_now" in str(template) else None
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")]
    special = [getattr(tokenizer, name, None) for name in ("special_tokens_map", "bos_token_id", "eos_token_id")]
    return [type(tokenizer).__qualname__, json.dumps(content, sort_keys=True), template, day, versions, special]
