"""`Mask`: which entries of which parameters the anchor perturbs (method document, step 3)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gapo._namespace import Array, library, like, namespace


class Mask(Mapping[str, Array]):
    """Arrays of 0 and 1 by the name of a parameter, or by a pattern that is searched in names: 1 moves.

    Args:
        arrays: each broadcastable to its parameters; bool, integers or floats, of NumPy or of the parameters' library.

    Raises:
        ValueError: there is none, a name is no regular expression, or an array holds other values, or no 1.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        if not arrays:
            raise ValueError("perturb must hold a mask for at least one parameter, got an empty mapping")
        self._arrays = dict(arrays)
        self._shares = {key: _share(key, x) for key, x in self._arrays.items()}

    def __getitem__(self, key: str) -> Array:
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Mask({', '.join(f'{key}: {share:.4g} of its entries' for key, share in self._shares.items())})"

    __eq__, __hash__ = object.__eq__, object.__hash__  # of arrays there is no cheap comparison by value

    def __deepcopy__(self, memo: Any) -> Mask:
        return self

    def keys_by_name(self, names: Iterable[str]) -> dict[str, str]:
        """The key of each parameter that has a mask, by its name, in the order of `names`.

        Raises:
            ValueError: a key is of no parameter, or a parameter has two masks.
        """
        names = list(names)
        keys: dict[str, str] = {}
        for key in self:
            matched = [key] if key in names else [name for name in names if re.search(key, name)]
            if not matched:
                raise ValueError(
                    f"perturb has a mask for {key!r}, and no trainable parameter has this name or is matched by it "
                    f"(they are such as {', '.join(names[:3])})"
                )
            for name in matched:
                if name in keys:
                    raise ValueError(f"perturb has two masks for {name!r}, by {keys[name]!r} and {key!r}: give one")
                keys[name] = key
        return {name: keys[name] for name in names if name in keys}

    def applied(self, arrays: Mapping[str, Array], trainable: Iterable[str]) -> dict[str, Array]:
        """`arrays`, shaped as the parameters of the same names, with 0 where they are masked out.

        Args:
            arrays: of parameters that have masks.
            trainable: the names of all trainable parameters.

        Raises:
            TypeError, ValueError: a mask is of another library than its parameter, or does not fit its shape.
        """
        keys = self.keys_by_name(trainable)
        return {name: _masked(name, x, keys[name], self[keys[name]]) for name, x in arrays.items()}

    def share(self, sizes: Mapping[str, int], trainable: Iterable[str]) -> float:
        """Share of the entries of the named parameters that move; `sizes` are their numbers of entries."""
        keys = self.keys_by_name(trainable)
        return sum(n * self._shares[keys[name]] for name, n in sizes.items()) / max(sum(sizes.values()), 1)


def as_mask(perturb: Any) -> Any:
    """`perturb` with a mapping made a `Mask`; anything else as it is."""
    return Mask(perturb) if isinstance(perturb, Mapping) and not isinstance(perturb, Mask) else perturb


def _share(key: Any, mask: Any) -> float:
    """Share of ones, of an array that was checked."""
    try:
        re.compile(key)
    except (re.error, TypeError) as error:
        raise ValueError(f"perturb maps names or regular expressions to masks; got the key {key!r}: {error}") from None
    if library(mask) is None:
        raise ValueError(
            f"the mask of {key!r} must be an array of 0 and 1, got {type(mask).__name__}: a YAML file and a command "
            "line hold no arrays, so give masks in Python"
        )
    xp = namespace(mask=mask)
    ones, zeros = (int(xp.sum(xp.astype(mask == value, xp.int32))) for value in (1, 0))
    if ones + zeros != _size(mask):
        raise ValueError(f"the mask of {key!r} must hold 0 and 1 alone, or be bool; it holds other values")
    if not ones:
        raise ValueError(f"the mask of {key!r} selects nothing: at least one entry must be 1")
    return ones / (ones + zeros)


def _masked(name: str, x: Array, key: str, mask: Array) -> Array:
    mask = like(mask, x)
    if library(mask) != library(x):
        raise TypeError(
            f"the mask of {key!r} is an array of {library(mask)}, and the parameters are of {library(x)}: give a NumPy "
            "array, or one of theirs"
        )
    shape, wanted = tuple(mask.shape), tuple(x.shape)
    tail = wanted[len(wanted) - len(shape) :]
    if len(shape) > len(wanted) or any(n not in (1, m) for n, m in zip(shape, tail, strict=True)):
        raise ValueError(
            f"the mask of {key!r} has shape {shape}, and cannot be broadcast to {name!r} of shape {wanted}"
        )
    xp = namespace(x=x)
    return xp.where(mask != 0, x, xp.zeros_like(x))


def _size(x: Array) -> int:
    size = 1
    for length in x.shape:
        size *= int(length)
    return size
