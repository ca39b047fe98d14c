"""What an audit returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from gapo._extras import named_extra

Row = dict[str, Any]
_TOLD, _SURE = 0.05, 3.0  # how far from one half a share is worth telling: in points, and in standard errors


@dataclass(frozen=True)
class AuditResult(Sequence[Row]):
    """A sequence of the audited pairs, most suspicious first.

    Attributes:
        rows: one dict for each pair. "rank" counts from 1. "row" is the place among the usable pairs, from 0, "line"
            the line in the source file, from 1, or None; "id" the pair's own, or None. "p_wrong" is the probability
            that the label is wrong. Means over the policies that judged the pair, none of which trained on its prompt:
            "margin" (nats per token), "gap" (the same, at an anchor that training pairs form), "weight" (of the gap, in
            a GAPO update). "against" of the "policies" have a negative margin. "prompt", "chosen", "rejected" are the
            pair's; "is_flipped" too, or None. "mark" is what a person marked, or None.
        summary: figures of the whole. "share" of wrong labels, {"mean", "low", "high"}; "held_out_accuracy" with
            "held_out_low" and "held_out_high"; "learned": whether that lies above chance. Where it does not, "share",
            each "p_wrong" and each "rank" are None, the rows stand in the order of the file, and "advice" says what to
            try. "chosen_longer": the "share" of the "pairs" whose answers differ in length in which the chosen one is
            longer.
    """

    rows: list[Row]
    summary: dict[str, Any]

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        return self.rows[place]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        if not self.summary["learned"]:
            return verdict(self.summary)
        accuracy = f"Held-out accuracy: {_percent(self.summary['held_out_accuracy'])} %."
        return " ".join(filter(None, [verdict(self.summary), accuracy, rule_of_length(self.summary)]))

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`. Raises ModuleNotFoundError without pandas."""
        with named_extra("AuditResult.to_pandas", "study"):
            import pandas
        return pandas.DataFrame(self.rows)


def verdict(summary: Row) -> str:
    """The finding in one sentence: how many labels look wrong, or that nothing can be told, and what to try."""
    if not summary["learned"]:
        accuracy = f"held-out accuracy {_percent(summary['held_out_accuracy'])} %"
        advice = str(summary.get("advice") or "try a larger model or more pairs").rstrip(".")
        return f"Nothing can be told: the policies did not learn these pairs ({accuracy}); {advice}."
    if (wrong := summary.get("share")) is None:
        return "The share of wrong labels cannot be estimated."
    digits = 0 if wrong["high"] - wrong["low"] >= 0.02 else 1
    mean, low, high = (_percent(wrong[name], digits) for name in ("mean", "low", "high"))
    if wrong["mean"] < 0.005:
        return f"Hardly any of your labels looks wrong ({low} to {high} %)."
    return f"About {mean} % of your labels look wrong ({low} to {high} %)."


def rule_of_length(summary: Row) -> str | None:
    """What to know where length goes with the labels beyond chance: what is wrong by a rule becomes the rule."""
    share, pairs = (summary["chosen_longer"][name] for name in ("share", "pairs"))
    if not summary["learned"] or not pairs or abs(share - 0.5) < max(_TOLD, _SURE * (0.25 / pairs) ** 0.5):
        return None
    side = "longer" if share > 0.5 else "shorter"
    return (
        f"The {side} answer is the chosen one in {_percent(max(share, 1 - share))} % of the pairs whose answers differ "
        "in length. The audit takes this for the rule: if length alone decided any label, more are wrong than it tells."
    )


def rounded(value: float) -> float:
    """`value` to six significant digits, as table and cleaned pairs have it."""
    return float(f"{value:.6g}")


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}"
