"""Generated demonstration pairs: small questions whose right answer is certain, without a download.

Each family of questions is a template with its own fillings. A filling serves either training or testing, never both.
The wrong answer is the right answer to another filling of the same family: neither length nor wording shows the label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


_ANIMALS = _words("ant bear camel deer eagle fox goat hare jackal lion mole newt otter panda rabbit seal tiger wolf")
_TOOLS = _words("axe brush chisel drill file hammer knife ladder mallet nail pencil rake saw shovel tongs wrench")
_FOODS = _words("apple bun cake date egg fig grape ham kiwi leek lemon melon nut olive pear pie plum radish turnip")
_KINDS = {"animal": _ANIMALS, "tool": _TOOLS, "food": _FOODS}
_PLACES = _words("barn cave garden kitchen market meadow office river school shop station tower valley village")
_NAMES = _words("Anna Boris Clara David Elena Frank Greta Hugo Irene Jonas Karin Leo Maria Nils Olga Paul Rosa Simon")


def generate_pairs(n: int, *, seed: int = 0, split: str = "train") -> list[dict[str, Any]]:
    """`n` pairs with "id", "family", "prompt", "chosen" (right) and "rejected" (wrong).

    Args:
        n: number of pairs, >= 1.
        seed: of the draw; the split of fillings does not depend on it.
        split: "train" or "test": disjoint fillings.

    Raises:
        ValueError: `n` or `split` is not accepted.

    >>> pair = generate_pairs(1)[0]
    >>> pair["prompt"], pair["chosen"], pair["rejected"]
    ('Which number is greater, 42 or 12?\\n', 'The greater one is 42.', 'The greater one is 12.')
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    questions = {family: _of_split(family, split) for family in _FAMILIES}
    rng = np.random.default_rng([seed, split == "test"])
    rows = []
    for i in range(n):
        family = str(rng.choice(list(questions)))
        prompt, chosen, rejected = questions[family][rng.integers(len(questions[family]))]
        rows.append(
            {"id": f"{split}-{seed}-{i}", "family": family, "prompt": prompt, "chosen": chosen, "rejected": rejected}
        )
    return rows


def warmup_text(n: int, *, seed: int = 0) -> str:
    """`n` lines, each a question of the training split with its right or its wrong answer, drawn with equal chance.

    A model trained on them learns the words and the form, but not which answer is preferred.
    """
    rows = generate_pairs(n, seed=seed + 1)
    sides = np.random.default_rng(seed).integers(2, size=n)
    return "\n".join(row["prompt"] + row[("chosen", "rejected")[side]] for row, side in zip(rows, sides, strict=True))


def _of_split(family: str, split: str) -> list[tuple[str, str, str]]:
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    questions = list(_FAMILIES[family]())
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in questions))
    order = np.random.default_rng(0).permutation(len(prompts))
    held_out = {prompts[i] for i in order[: len(prompts) // 8]}
    return [row for row in questions if (row[0] in held_out) == (split == "test")]


def _kinds() -> Iterator[tuple[str, str, str]]:
    """What kind of thing a word is; the wrong answer names another kind."""
    for kind, words in _KINDS.items():
        for word in words:
            for other in _KINDS:
                for place in _PLACES:
                    if other != kind:
                        prompt = f"There is one {word} in the {place}. What is it?\n"
                        yield prompt, f"The {word} is one kind of {kind}.", f"The {word} is one kind of {other}."


def _owners() -> Iterator[tuple[str, str, str]]:
    """Who has what; the wrong answer names the other person."""
    things = [*_TOOLS, *_FOODS]
    for i, first in enumerate(_NAMES):
        for j, second in enumerate(_NAMES):
            if first != second:
                thing, other = things[(3 * i + j) % len(things)], things[(i + 5 * j + 1) % len(things)]
                if thing != other:
                    prompt = f"{first} holds the {thing} and {second} holds the {other}. Who holds the {thing}?\n"
                    yield prompt, f"It is {first} who holds it.", f"It is {second} who holds it."


def _sums() -> Iterator[tuple[str, str, str]]:
    """Which of two numbers is greater; the wrong answer names the smaller."""
    for a in range(10, 60):
        for b in range(10, 60):
            if a != b:
                high, low = max(a, b), min(a, b)
                yield (
                    f"Which number is greater, {a} or {b}?\n",
                    f"The greater one is {high}.",
                    f"The greater one is {low}.",
                )


_FAMILIES = {"kind": _kinds, "owner": _owners, "greater": _sums}
