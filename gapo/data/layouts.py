"""Names and layouts of other people's tables, brought into "prompt", "chosen", "rejected"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gapo.data.pair_rows import RowFault
from gapo.pairs import SIDES

_OUTPUTS = ("output_a", "output_b")
_OPTIONAL = ("is_flipped", "tools", "chat_template_kwargs")
_TIES = ("tie", "tied", "draw", "equal", "both", "both good", "both bad", "tie bothbad", "tie (bothbad)", "bothbad")
_ACCEPTED = "a or b, model_a or model_b, output_a or output_b, the names of the two columns, 1 or 2, tie"
_MOST_LISTED, _MOST_LAYOUTS = 20, 1000


class Layout:
    """How the columns of one source become those of a pair. It counts what it saw: one object for each reading.

    Args:
        columns: the source's name of a column, by the name that it gets: prompt, chosen, rejected, is_flipped, tools,
            chat_template_kwargs; with `preference`, output_a and output_b in place of chosen and rejected.
        preference: the column that says which of two outputs is preferred.

    Attributes:
        preference: as passed.
        ties: number of rows without a preference, which have no pair.

    Raises:
        ValueError: a name is not accepted, or two of them have the same column.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, preference: str | None = None) -> None:
        self.answers = SIDES if preference is None else _OUTPUTS
        self._columns, self.preference = dict(columns or {}), preference
        accepted = ("prompt", *self.answers, *_OPTIONAL)
        for name, source in self._columns.items():
            if name not in accepted:
                raise ValueError(f"columns has the key {name!r}; accepted are {', '.join(accepted)}")
            if not isinstance(source, str) or not source:
                raise ValueError(f"columns must give {name!r} the name of a column, got {source!r}")
        sources = [source.lower() for source in self._columns.values()]
        if len(set(sources)) < len(sources):
            raise ValueError(f"columns gives two names the same column: {_listed(self._columns.values())}")
        self._names = accepted if preference is None else (*accepted, preference)
        self._renamed: dict[tuple[str, ...], dict[str, str]] = {}
        self._other: set[tuple[str, ...]] = set()  # those of which a name changes
        self._numbers: set[float] = set()
        self.ties = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that the source must not have twice."""
        return tuple(self._columns.get(name, name) for name in self._names if name not in _OPTIONAL)

    @property
    def needed(self) -> set[str]:
        """The columns that every row must have, in lower case."""
        names = [*self.answers, *([] if self.preference is None else [self.preference])]
        return {self._columns.get(name, name).lower() for name in names}

    def pair(self, row: Any) -> Any:
        """`row` with the columns of a pair; None for a tie. What is no object with columns is returned unchanged.

        Raises:
            RowFault: the row lacks a column that was named.
            ValueError: the columns, or what the preference says, can be understood in two ways. No row can be used.
        """
        if not isinstance(row, dict):
            return row
        keys = tuple(row)
        renamed = self._renamed.get(keys)
        if renamed is None:
            if len(self._renamed) > _MOST_LAYOUTS:
                self._renamed.clear()
                self._other.clear()
            renamed = self._renamed[keys] = self._sources(keys)
            if any(name != source for name, source in renamed.items()):
                self._other.add(keys)
        if keys in self._other:
            taken = {*renamed, *renamed.values()}
            row = {k: v for k, v in row.items() if k not in taken} | {k: row[v] for k, v in renamed.items()}
        return row if self.preference is None else self._of_preference(row, renamed)

    def finish(self) -> None:
        """Raise ValueError if the numbers of all preferences could count from 0 as well as from 1."""
        if self._numbers == {1.0}:
            raise ValueError(
                f"column {self.preference!r} has the number 1 and never 2, so that it may count from 0: write a and b"
            )

    def _sources(self, keys: tuple[str, ...]) -> dict[str, str]:
        """{name of a pair's column: name in the source}, of the columns that are there."""
        found_names = {}
        for name in self._names:
            wanted = self._columns.get(name, name)
            matches = [wanted] if wanted in keys else [k for k in keys if str(k).lower() == wanted.lower()]
            if len(matches) > 1:
                raise ValueError(
                    f"columns {' and '.join(map(repr, matches))} can both be {wanted!r}: say which, columns "
                    f"{name}={matches[0]}"
                )
            if matches:
                found_names[name] = matches[0]
            elif name in self._columns or name == self.preference or (self.preference and name in self.answers):
                wanted_for = "" if wanted == name else f", named for {name!r},"
                raise RowFault(f"column {wanted!r}{wanted_for} is missing; the row has {listed_columns(keys)}")
        return found_names

    def _of_preference(self, row: dict[str, Any], renamed: Mapping[str, str]) -> dict[str, Any] | None:
        if clash := next((name for name in SIDES if name in row), None):
            raise ValueError(
                f"column {clash!r} is there already, beside the preference {self.preference!r}: leave preference "
                "out, or rename that column"
            )
        side = self._preferred(row[str(self.preference)], [renamed[name] for name in _OUTPUTS])
        if side is None:
            self.ties += 1
            return None
        a, b = (row[name] for name in _OUTPUTS)
        chosen, rejected = (a, b) if side == "a" else (b, a)
        return {k: v for k, v in row.items() if k not in _OUTPUTS} | {"chosen": chosen, "rejected": rejected}

    def _preferred(self, value: Any, outputs: list[str]) -> str | None:
        """ "a", "b", or None for a tie."""
        if value is None or value != value or (isinstance(value, str) and not value.strip()):  # NaN differs from itself
            raise RowFault(f"column {self.preference!r} is empty")
        if str(value) in outputs:
            return "ab"[outputs.index(str(value))]
        text = str(value).strip().lower().replace("_", " ")
        if text in ("1", "2", "1.0", "2.0"):
            self._numbers.add(float(text))
            return "ab"[int(float(text)) - 1]
        for side in "ab":
            if text in {side, *(f"{kind} {side}" for kind in ("model", "output", "response", "answer"))}:
                return side
        if text in _TIES:
            return None
        if text in ("0", "true", "false", "0.0"):
            raise ValueError(
                f"column {self.preference!r} has {value!r}, which does not say which output is preferred: write a and "
                f"b; accepted are {_ACCEPTED}"
            )
        raise ValueError(f"column {self.preference!r} has {value!r}; accepted are {_ACCEPTED}")


def parse_columns(columns: Mapping[str, str] | str | None) -> dict[str, str] | None:
    """`prompt=question,chosen=good` as a mapping; a mapping is returned as it is.

    Raises:
        ValueError: a part of the text is no `name=column`, or a name comes twice.

    >>> parse_columns("prompt=question, chosen=good")
    {'prompt': 'question', 'chosen': 'good'}
    """
    if columns is None or not isinstance(columns, str):
        return None if columns is None else dict(columns)
    parsed: dict[str, str] = {}
    for part in columns.split(","):
        name, equals, source = (word.strip() for word in part.partition("="))
        if not (name and equals and source):
            raise ValueError(f"columns must be name=column, several with commas between them; got {columns!r}")
        if name in parsed:
            raise ValueError(f"columns names {name!r} twice: {columns!r}")
        parsed[name] = source
    return parsed


def listed_columns(keys: Any) -> str:
    """The names of columns for an error, as many as can be read."""
    names = list(map(str, keys))
    more = f", ... ({len(names)} in all)" if len(names) > _MOST_LISTED else ""
    return (", ".join(names[:_MOST_LISTED]) + more) or "none"


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
