"""Random streams by name, so that draws under one seed are independent of each other."""

from __future__ import annotations

from zlib import crc32

import numpy as np


def stream(seed: int, name: str, *more: int) -> np.random.Generator:
    """A generator for the draw `name` under `seed`, independent of every other name's.

    `flip_pairs` alone uses the plain `default_rng(seed)`, so that its flips never change. Another shuffle of as many
    rows by that generator would begin with the flipped rows. So would `[seed, 0]`: NumPy pads with zeros.

    Args:
        seed: the user's seed, >= 0.
        name: the draw, such as "hold-out".
        more: numbers that distinguish draws of one name, such as the epoch; always as many for one name.

    >>> stream(0, "hold-out").integers(9) == stream(0, "hold-out").integers(9)
    np.True_
    """
    return np.random.default_rng([crc32(name.encode()), seed, *more])
