"""One form for all objectives: what a caller hands in, and what each objective takes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gapo.objective
from gapo._namespace import Array, namespace
from gapo.config import GAPOConfig
from gapo.objective import require_choice
from gapo.objectives import robust, symmetric, with_reference, without_reference
from gapo.objectives.checks import check_settings, log_ratio_margins

_SIDES = ("chosen", "rejected")
_REFERENCE = ("ref_chosen", "ref_rejected")
_ANCHOR = ("anchor_chosen", "anchor_rejected")
_CALL = ("reduction", "backend")  # arguments of how a function is called, not of which loss it is


@dataclass(frozen=True, kw_only=True, eq=False)
class LogProbs:
    """What a batch of N pairs says to any objective. Log-probabilities are SUMMED over the response's tokens, nats.

    Attributes:
        chosen: (N,) of each chosen response under the policy.
        rejected: (N,) of each rejected response under the policy.
        chosen_lengths: (N,) number of tokens of each chosen response, >= 1; integers or floats.
        rejected_lengths: (N,) the same of each rejected response.
        ref_chosen: (N,) of each chosen response under the reference; None where there is none.
        ref_rejected: (N,) of each rejected response under the reference.
        anchor_chosen: (N,) of each chosen response under the anchor, which GAPO alone needs.
        anchor_rejected: (N,) of each rejected response under the anchor.
    """

    chosen: Array
    rejected: Array
    chosen_lengths: Array
    rejected_lengths: Array
    ref_chosen: Array | None = None
    ref_rejected: Array | None = None
    anchor_chosen: Array | None = None
    anchor_rejected: Array | None = None

    @classmethod
    def from_averages(
        cls,
        chosen: Array,
        rejected: Array,
        lengths: Array,
        ref_chosen: Array | None = None,
        ref_rejected: Array | None = None,
    ) -> LogProbs:
        """From length-normalised log-probabilities under the policy.

        Args:
            chosen: (N,) nats per token.
            rejected: (N,) nats per token.
            lengths: (2N,) numbers of tokens, those of the chosen responses first.
            ref_chosen: (N,) summed, nats, as the columns of a data set hold them; None without a reference.
            ref_rejected: (N,) likewise.
        """
        n = chosen.shape[0]
        xp = namespace(chosen=chosen, lengths=lengths)
        counts = xp.astype(lengths, chosen.dtype)
        return cls(
            chosen=chosen * counts[:n],
            rejected=rejected * counts[n:],
            chosen_lengths=lengths[:n],
            rejected_lengths=lengths[n:],
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
        )

    def log_ratio_margins(self) -> Array | None:
        """z (N,), the policy's margin minus the reference's, summed, nats; None without a reference."""
        if self.ref_chosen is None or self.ref_rejected is None:
            return None
        return log_ratio_margins(self.chosen, self.rejected, self.ref_chosen, self.ref_rejected, None)[1]

    def per_token(self) -> LogProbs:
        """The same with every log-probability divided by its response's length: nats per token."""
        divided = {}
        for name in (*_SIDES, *_REFERENCE, *_ANCHOR):
            sums = getattr(self, name)
            lengths = self.chosen_lengths if name.endswith("chosen") else self.rejected_lengths
            divided[name] = None if sums is None else _per_token(sums, lengths)
        return replace(self, **divided)


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """One objective, and what it needs.

    Attributes:
        name: its key in `OBJECTIVES`, which is also the `loss` of `gapo train`.
        function: the function of log-probabilities, of `gapo.objectives` (or `gapo.loss`).
        paper: where it comes from.
        needs_reference: whether it compares with a reference policy: `LogProbs.ref_chosen`, `LogProbs.ref_rejected`.
        needs_anchor: whether it compares with an anchor (GAPO alone), which the step makes.
        needs_lengths: whether the function takes the chosen lengths besides summed log-probabilities.
        average: whether its log-probabilities are length-normalised; otherwise they are sums.
        batch_statistics: whether the loss of a pair depends on the other pairs of its batch.
        defaults: its settings by name, with their defaults.
    """

    name: str
    function: Callable[..., Array]
    paper: str
    needs_reference: bool = False
    needs_anchor: bool = False
    needs_lengths: bool = False
    average: bool = False
    batch_statistics: bool = False
    defaults: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        options = inspect.signature(self.function).parameters.values()
        found = {p.name: p.default for p in options if p.kind is p.KEYWORD_ONLY and p.name not in _CALL}
        object.__setattr__(self, "defaults", found)

    def settings(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All settings: `given` ones over the defaults.

        Raises:
            ValueError: one is not this objective's, or out of its range.
        """
        given = dict(given or {})
        for name in given:
            if name not in self.defaults:
                accepted = ", ".join(f"{key} ({value!r})" for key, value in self.defaults.items())
                raise ValueError(f"objective {self.name!r} has no setting {name!r}; it takes {accepted}")
        settings = {**self.defaults, **given}
        check_settings(**settings)
        return settings

    def losses(self, logps: LogProbs, **settings: Any) -> Array:
        """Loss of each pair, (N,), float32 or wider; its mean over the batch is what training minimises.

        Differentiable in `logps.chosen` and `logps.rejected` alone.

        Args:
            logps: the batch; sums, which are divided by the lengths here where the objective is of averages.
            settings: as `defaults`, whose values stand for those left out.

        Raises:
            TypeError, ValueError: what the objective needs is missing, does not fit, or a setting is not accepted.
        """
        return self.function(*self._arguments(logps), **self.settings(settings), reduction="none")

    def _arguments(self, logps: LogProbs) -> list[Array]:
        names = _SIDES + _REFERENCE * self.needs_reference + _ANCHOR * self.needs_anchor
        for name in names:
            if getattr(logps, name) is None:
                needed = ", ".join(f"{missing}=..." for missing in names[2:])
                raise ValueError(f"objective {self.name!r} needs LogProbs({needed}), got {name}=None")
        taken = logps.per_token() if self.average else logps
        arrays = [getattr(taken, name) for name in names]
        return [*arrays, logps.chosen_lengths] if self.needs_lengths else arrays


def _per_token(sums: Array, lengths: Array) -> Array:
    """`sums` divided by `lengths`, in the dtype of `sums`."""
    xp = namespace(sums=sums, lengths=lengths)
    return sums / xp.astype(lengths, sums.dtype)


def find(name: str) -> Objective:
    """The objective called `name`, or ValueError that names them all."""
    require_choice("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


def without_anchor(
    name: str, config: GAPOConfig, given: Mapping[str, Any] | None = None
) -> tuple[Objective, dict[str, Any]]:
    """The loss that objective `name` is evaluated by, and all but "gapo" are trained by, with its settings.

    For "gapo" it is the probe's, SimPO's. These two take their settings from `config`, the others `given` ones.

    Raises:
        ValueError: an unknown name, or settings that are not accepted.
    """
    objective = find(name)
    if name in ("gapo", "simpo"):
        if given:
            raise ValueError(
                f"objective {name!r} takes beta and gamma from gapo.GAPOConfig, not from settings of its own; "
                f"got {dict(given)}"
            )
        return OBJECTIVES["simpo"], {"beta": config.beta, "gamma": config.gamma}
    return objective, objective.settings(given)


_LIST = (
    Objective(
        name="gapo",
        function=gapo.objective.loss,
        paper="Cho, Kim, Kim, arXiv 2602.04909",
        needs_anchor=True,
        average=True,
    ),
    Objective(name="simpo", function=without_reference.simpo, paper="Meng, Xia, Chen, arXiv 2405.14734", average=True),
    Objective(
        name="amapo",
        function=without_reference.amapo,
        paper="Deng, Feng, Lei, arXiv 2511.09385",
        average=True,
        batch_statistics=True,
    ),
    Objective(name="dpo", function=with_reference.dpo, paper="Rafailov et al., arXiv 2305.18290", needs_reference=True),
    Objective(
        name="cdpo",
        function=robust.cdpo,
        paper="Mitchell, A note on DPO with noisy preferences (2023)",
        needs_reference=True,
    ),
    Objective(
        name="rdpo",
        function=robust.rdpo,
        paper="Chowdhury, Kini, Natarajan, arXiv 2403.00409",
        needs_reference=True,
    ),
    Objective(
        name="dr_dpo",
        function=robust.dr_dpo,
        paper="Wu et al., arXiv 2407.07880",
        needs_reference=True,
        batch_statistics=True,
    ),
    Objective(
        name="ipo",
        function=with_reference.ipo,
        paper="Azar et al., arXiv 2310.12036",
        needs_reference=True,
        average=True,
    ),
    Objective(name="ropo", function=robust.ropo, paper="Liang et al., arXiv 2404.04102", needs_reference=True),
    Objective(name="hypo", function=with_reference.hypo, paper="Yuan et al., arXiv 2602.11902", needs_reference=True),
    Objective(
        name="rpo",
        function=with_reference.rpo,
        paper="Liu et al., arXiv 2405.16436",
        needs_reference=True,
        needs_lengths=True,
    ),
    *(
        Objective(
            name=name,
            function=getattr(symmetric, name),
            paper="Nishimori et al., arXiv 2505.24709",
            needs_reference=True,
        )
        for name in ("sigmoid_loss", "ramp", "unhinged")
    ),
)
OBJECTIVES: dict[str, Objective] = {objective.name: objective for objective in _LIST}
