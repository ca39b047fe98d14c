"""`StepResult`: what one step measured. `Step`: the function that returns it, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from gapo._namespace import ArrayT

GradsT = TypeVar("GradsT", covariant=True)


@dataclass(frozen=True, kw_only=True)
class StepResult(Generic[ArrayT]):
    """What one step measured. Arrays of the backend, float32 or wider, without gradient.

    The fields of the anchor are None for an objective without one.

    Attributes:
        loss: scalar, the mean over the pairs, with the SFT term if there is one.
        margins: (N,) M_i at the policy, nats per token.
        weights: (N,) w_i = -N dL/dM_i, at a fixed log-probability of the chosen response, so that an SFT term does not
            count. The update of GAPO is `-(1/N) sum_i w_i grad M_i`.
        anchor_margins: (N,) M_i at the anchor; for a first-order anchor their first-order estimate.
        anchor_gaps: (N,) margins minus anchor margins.
        grad_norm: scalar, L2 norm of the probe's gradient over the perturbed parameters.
        rho: scalar, the radius that was asked for: the config's, or the one found for its `target_gap`.
        radius: scalar, norm of the applied delta in the chosen geometry: `rho` up to rounding, 0 for a gradient of 0.
        changed_fraction: scalar, share of the selected weights that the perturbation really changed; 1.0 for a
            first-order anchor.
        first_order_ratio: scalar, the measured drop over the predicted one, `sum_i |c_i| gap_i / (rho * ||T g||)` with
            c the probe's cotangents. Near 1 for a small rho; far from it where rounding ate or enlarged the
            perturbation. None for direction="gaussian".
        chosen_logps: (N,) at the policy, nats per token, where `margin_fn` returns them, else None.
        rejected_logps: (N,) likewise.
        log_ratio_margins: (N,) z_i, the policy's margin minus the reference's on summed log-probabilities, nats, where
            the batch holds a reference, else None.
        running: the objective's running statistics after this step, scalars by name, for the next step's `running`;
            None for an objective without them.
    """

    loss: ArrayT
    margins: ArrayT
    weights: ArrayT
    anchor_margins: ArrayT | None = None
    anchor_gaps: ArrayT | None = None
    grad_norm: ArrayT | None = None
    rho: ArrayT | None = None
    radius: ArrayT | None = None
    changed_fraction: ArrayT | None = None
    first_order_ratio: ArrayT | None = None
    chosen_logps: ArrayT | None = None
    rejected_logps: ArrayT | None = None
    log_ratio_margins: ArrayT | None = None
    running: Mapping[str, ArrayT] | None = None


class Step(Protocol[ArrayT, GradsT]):
    """What `gapo.value_and_grad` returns; its docstring says what goes in and comes out."""

    def __call__(
        self,
        params: Any,
        batch: Any,
        *,
        gamma: float | ArrayT | None = None,
        rng: Any = None,
        running: Mapping[str, ArrayT] | None = None,
    ) -> tuple[StepResult[ArrayT], GradsT]:
        """One step: the result and the gradients. The parameters stay as they are."""
