"""The one-pass forward: one backward serves the probe, the first-order gaps and the update.

The per-pair gradient engine (`pairgrads`) records the clean forward and propagates once, seeded with dM_i. The probe
is then a weighted sum over pairs, the first-order gap an inner product, and the update another weighted sum. None of
them propagates again, and the gap needs no perturbed forward. A pair is a group of two rows, its chosen answer and its
rejected one.

Where the engine refuses a model, this is a `TorchForward`, whose two backwards are right for every model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gapo.backends.base import LeafRule, MarginFn, Update, gradients
from gapo.backends.torch.deposit import deposited
from gapo.backends.torch.forward import TorchForward
from gapo.backends.torch.pairgrads import GroupGradients, Refused, Tape, Verdicts
from gapo.config import GAPOConfig

logger = logging.getLogger(__name__)


class OnePassForward(TorchForward):
    """A clean forward that a tape records.

    With `by_side` the two rows of a pair may be weighted apart, as an objective with a term of the chosen answer does.
    """

    def __init__(
        self,
        margin_fn: MarginFn,
        module: nn.Module,
        batch: Any,
        config: GAPOConfig,
        verdicts: Verdicts | None = None,
        wrapper: nn.Module | None = None,
        *,
        by_side: bool = False,
    ) -> None:
        self._tape: Tape | None = None
        self._by_side = by_side
        self._grads: GroupGradients | None = None
        try:
            super().__init__(margin_fn, module, batch, config, verdicts, wrapper)
        except BaseException:
            self._close()
            raise

    @property
    def one_pass(self) -> bool:
        """Whether the tape serves this forward; False once it has refused."""
        return self._tape is not None

    def _run_clean(self) -> tuple[Tensor, ...]:
        # Of the head, which no probe asks for, A and G are kept: no more than the logits and their gradient were.
        once = set(self.head) - set(self._moved)
        tape = Tape(
            self._module, blocks=2, by_row=self._by_side, verdicts=self._verdicts, key=self._margin_fn, once=once
        )
        try:
            with tape:
                outputs = super()._run_clean()
        except Refused as refusal:
            self._refuse(refusal)
            return super()._run_clean()
        self._tape = tape
        return outputs

    def pullback(self, cotangents: Sequence[Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        try:
            if (gradients := self._gradients_by_pair()) is not None:
                return gradients.weighted(self._weights(cotangents), names, release=names is None)
        except Refused as refusal:
            self._refuse(refusal)
        return super().pullback(cotangents, names)

    def directional(self, delta: LeafRule, names: Iterable[str]) -> Tensor:
        try:
            if (gradients := self._gradients_by_pair()) is not None:
                return gradients.along(delta, names)
        except Refused as refusal:
            self._refuse(refusal)
        return super().directional(delta, names)

    def as_loss(self, value: Tensor, update: Update) -> Tensor:
        if self._tape is None:
            return super().as_loss(value, update)
        return deposited(value, gradients(self, update), self.parameters)

    def _gradients_by_pair(self) -> GroupGradients | None:
        """The one backward, at the first call; None where the tape has refused."""
        if self._tape is not None and self._grads is None:
            # dM_i: +1 by the chosen answer's log-probability, -1 by the rejected one's.
            seeds = [torch.ones_like(output) * sign for output, sign in zip(self.outputs, (1, -1), strict=False)]
            self._grads = self._tape.backward(self.outputs, seeds, again=self._outputs_again)
            self._spent = True
        return self._grads

    def _weights(self, cotangents: Sequence[Tensor]) -> Tensor:
        """The weight of each pair, or of each row where the cotangents are not (w, -w)."""
        if self._by_side and len(cotangents) == 2:
            return torch.stack([cotangents[0], -cotangents[1]])
        return cotangents[0]

    def _close(self) -> None:
        if self._tape is not None:
            self._tape.close()

    def _outputs_again(self) -> tuple[Tensor, ...]:
        self._run_again()
        return self.outputs

    def _refuse(self, refusal: Refused) -> None:
        self._tape = self._grads = None
        self._spent = self._spent or refusal.spent
        why = str(refusal)  # not the error itself, whose traceback a log record would keep alive
        if refusal.lasting and self._verdicts.first("told", self._module, why):
            logger.warning(
                "the one-pass step does not apply to this model (%s): the slower step is used, which propagates twice, "
                'and for anchor="first_order" once for each pair',
                why,
            )
