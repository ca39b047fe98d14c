"""The one-pass forward: one backward serves the probe, the first-order gaps and the update.

The engine of groups' gradients (`pairgrads`) records the clean forward and propagates once, seeded with dM_i. The probe
is then a weighted sum over pairs, the first-order gap an inner product, the update another weighted sum. A pair is a
group of two rows, its chosen answer and its rejected one.

At the first step of a function and a module its gradients are compared with MLX's own, under another weight for each
pair, on arrays that stand in for the module's: within `mx.compile` those cannot be read. Where the engine refuses, or
the two differ, this is an `MlxForward`, which is right for every model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from gapo.backends.base import LeafRule, MarginFn, Update, gradients, outputs_of
from gapo.backends.mlx.mlx_forward import MlxForward, random_state
from gapo.backends.mlx.mlx_verdicts import MlxVerdicts, basis
from gapo.backends.mlx.pairgrads import (
    GroupGradients,
    Recorder,
    Refused,
    disagreement,
    stand_in_batch,
    stand_ins,
)

logger = logging.getLogger(__name__)

_SIGNS = (1, -1)  # dM_i by the chosen answer's log-probability, and by the rejected one's


class OnePassMlxForward(MlxForward):
    """A clean forward that a recorder follows.

    Args:
        margin_fn, module, batch: as `MlxForward` has them.
        verdicts: what is proved so far; None to take the engine's word.
        by_side: whether the two rows of a pair may be weighted apart, as an objective with a term of the chosen answer
            does.
    """

    def __init__(
        self,
        margin_fn: MarginFn,
        module: nn.Module,
        batch: Any,
        verdicts: MlxVerdicts | None,
        *,
        by_side: bool = False,
    ) -> None:
        self._verdicts, self._by_side = verdicts, by_side
        self._grads: GroupGradients | None = None
        super().__init__(margin_fn, module, batch, anchor=verdicts is not None)

    @property
    def one_pass(self) -> bool:
        """Whether the engine serves this forward."""
        return self._grads is not None

    def _run_clean(self) -> tuple[mx.array, ...]:
        try:
            recorder = Recorder(self._module, self.parameters)
            with self._watched(self._module) as self._calls:
                outputs, self._grads, calls = recorder.run(self._outputs, _SIGNS, self._by_side)
            self._require_agreement(calls)
        except Refused as refusal:
            if self._verdicts is None:
                raise
            self._grads = None
            self._before.put_back()
            random_state()[:] = self._random_state
            self._tell(str(refusal))
            return super()._run_clean()
        return outputs

    def _outputs(self) -> tuple[mx.array, ...]:
        return outputs_of(self._margin_fn(self._module, self._batch))

    def pullback(self, cotangents: Sequence[mx.array], names: Iterable[str] | None = None) -> dict[str, mx.array]:
        if self._grads is None:
            return super().pullback(cotangents, names)
        return self._grads.weighted(self._weights(cotangents), self.parameters if names is None else names)

    def directional(self, delta: LeafRule, names: Iterable[str]) -> mx.array:
        if self._grads is None:
            return super().directional(delta, names)
        by_group = self._grads.along(delta, names)
        return mx.sum(by_group.reshape(-1, self.outputs[0].shape[0]), axis=0)

    def as_loss(self, value: mx.array, update: Update) -> mx.array:
        return super().as_loss(value, update if self._grads is None else gradients(self, update))

    def _weights(self, cotangents: Sequence[mx.array]) -> mx.array:
        """The weight of each pair, or of each row where the cotangents are not (w, -w)."""
        if self._by_side and len(cotangents) == 2:
            return mx.concatenate([cotangents[0], -cotangents[1]])
        return cotangents[0]

    def _require_agreement(self, calls: Any) -> None:
        """Raise Refused unless the engine's gradients are MLX's own, which is found out once."""
        if self._verdicts is None:
            return
        several = self._grads is not None and self._grads.groups > 1
        key = basis(self._margin_fn, self._module), calls, self._by_side, several
        why = self._verdicts.get(self._module, key)
        if why is None:
            why = self._compare()
            self._verdicts.keep(self._module, key, why)
        if why:
            raise Refused(why)

    def _compare(self) -> str:
        """Why the engine's gradients cannot be used; "" where they are MLX's own."""
        after = mx.array(random_state())
        try:
            with stand_ins(self._module):
                random_state()[:] = mx.random.key(0)
                batch = stand_in_batch(self._batch, self._module)
                stand_in = OnePassMlxForward(self._margin_fn, self._module, batch, None, by_side=self._by_side)
                n = stand_in.outputs[0].shape[0]
                weights = mx.random.uniform(0.5, 1.5, (2, n) if self._by_side else (1, n), key=mx.random.key(1))
                by_output = zip(_SIGNS, (weights[0], weights[-1]), stand_in.outputs, strict=False)
                cotangents = [sign * w.astype(output.dtype) for sign, w, output in by_output]
                name = disagreement(stand_in.pullback(cotangents), MlxForward.pullback(stand_in, cotangents))
        except Refused as refusal:
            return str(refusal)
        except Exception as error:  # of the model, on arrays that are not its own
            return f"it cannot be proved right, since the model fails on random arrays: {error!r:.200}"
        finally:
            random_state()[:] = after
        return f"on random arrays the gradient of {name} is not MLX's own" if name else ""

    def _tell(self, why: str) -> None:
        if self._verdicts is not None and self._verdicts.first(self._module, why):
            logger.warning(
                "the one-pass step does not apply to this model (%s): the slower step is used, which propagates for "
                "each of probe, update and first-order gaps",
                why,
            )
