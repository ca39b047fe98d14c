"""States of sequences on disk: computed once, in blocks, and then mapped into memory."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from gapo.files import write_bytes
from gapo.runs.errors import ConfigError
from gapo.runs.policy.frozen import states_of

_BLOCK = 256  # sequences in a file: seconds to minutes of work, the most that an interruption costs
_AT_ONCE = 32


def kept_states(
    model: nn.Module, ids: Sequence[Sequence[int]], pad: int, folder: Path, weights: str
) -> list[np.ndarray]:
    """The states of each sequence that enter the trained layers of `model`: (tokens, width) float32, read as needed.

    They lie in a folder of their own under `folder`, named by the set of sequences: flipped pairs, or those in another
    order share it, and a sequence that occurs twice is computed once. What is missing is computed, with a progress bar.

    Args:
        model: the policy, with frozen layers.
        ids: token ids of each sequence.
        pad: any token id.
        folder: of the cache.
        weights: digest of the model's weights and of where its frozen layers end.

    Raises:
        ConfigError: a file of states is damaged.
    """
    distinct = sorted({tuple(x) for x in ids})
    folder = folder / f"states-{digest_of([weights, distinct])}"
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [(distinct[i : i + _BLOCK], folder / f"{i // _BLOCK:05d}.npy") for i in range(0, len(distinct), _BLOCK)]
    missing = [(block, path) for block, path in blocks if not path.exists()]
    with tqdm(
        total=len(distinct),
        initial=len(distinct) - sum(len(block) for block, _ in missing),
        desc="states below the trained layers",
        disable=not missing,
    ) as bar:
        for block, path in missing:
            by_length = sorted(range(len(block)), key=lambda i: len(block[i]))
            computed: dict[int, np.ndarray] = {}
            for start in range(0, len(block), _AT_ONCE):
                part = by_length[start : start + _AT_ONCE]
                computed |= zip(part, states_of(model, [block[i] for i in part], pad), strict=True)
                bar.update(len(part))
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate([computed[i] for i in range(len(block))]))
            write_bytes(path, buffer.getvalue())
    rows: dict[tuple[int, ...], np.ndarray] = {}
    for block, path in blocks:
        ends = np.cumsum([len(x) for x in block])
        try:
            states = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{path} is damaged ({error}): remove it, and its states are computed anew") from error
        if len(states) != ends[-1]:
            raise ConfigError(f"{path} has {len(states)} states for {ends[-1]} tokens: remove it")
        rows |= zip(block, np.split(states, ends[:-1]), strict=True)
    return [rows[tuple(x)] for x in ids]


def digest_of(thing: object) -> str:
    """A digest of what JSON holds."""
    return hashlib.sha256(json.dumps(thing, sort_keys=True).encode()).hexdigest()[:16]
