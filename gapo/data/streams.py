"""Random streams by name: draws that share a seed must not share their numbers."""

from __future__ import annotations

from zlib import crc32

import numpy as np


def stream(seed: int, name: str, *more: int) -> np.random.Generator:
    """A generator for the draw `name` under `seed`, independent of every other name's.

    The plain `default_rng(seed)` belongs to `flip_pairs`, so that flips stay what they were. Whoever shuffles as many
    rows by it, or by `[seed, 0]` (NumPy pads with zeros: the same stream), picks the flipped ones.

    Args:
        seed: what the user gave, >= 0.
        name: what is drawn, such as "hold-out".
        more: numbers that tell draws of one name apart, such as the epoch; always as many for one name.
    """
    return np.random.default_rng([crc32(name.encode()), seed, *more])
