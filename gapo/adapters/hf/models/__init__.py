"""Questions to a transformers model, and what is changed on it for the time of a training.

`architecture`: what the forward takes and returns. `peft_models`: learned prompts and adapters. `causal`: whether the
model sees its answer. `prepared`: dropout, kernels and checkpointing of a model in training.
"""

from gapo.adapters.hf.models.architecture import (
    end_tokens,
    forward_parameters,
    innermost,
    learned_positions,
    most_positions,
    padding_may_stand_left,
    placeholders,
    require_decoder,
    text_config,
    vocabulary,
)
from gapo.adapters.hf.models.causal import require_causal
from gapo.adapters.hf.models.peft_models import adapters_off, has_virtual_tokens, peft_model
from gapo.adapters.hf.models.prepared import (
    REENTRANT,
    PreparedModel,
    has_wide_weights,
    require_graph,
    stay_differentiable,
    undo,
)

__all__ = [
    "REENTRANT",
    "PreparedModel",
    "adapters_off",
    "end_tokens",
    "forward_parameters",
    "has_virtual_tokens",
    "has_wide_weights",
    "innermost",
    "learned_positions",
    "most_positions",
    "padding_may_stand_left",
    "peft_model",
    "placeholders",
    "require_causal",
    "require_decoder",
    "require_graph",
    "stay_differentiable",
    "text_config",
    "undo",
    "vocabulary",
]
