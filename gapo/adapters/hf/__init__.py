"""GAPO in Hugging Face's `Trainer`: a collator for preference pairs, a callback, and a trainer in TRL's shape."""

from gapo._extras import missing

try:
    from gapo.adapters.hf.arguments import GAPOConfig
    from gapo.adapters.hf.callback import GAPOCallback
    from gapo.adapters.hf.collator import PreferenceCollator
    from gapo.adapters.hf.drift import DriftCallback
    from gapo.adapters.hf.reference_model import with_reference_logps
    from gapo.adapters.hf.trainer import GAPOTrainer
except ModuleNotFoundError as error:
    raise missing("gapo.adapters.hf", "hf", error) from error

__all__ = [
    "DriftCallback",
    "GAPOCallback",
    "GAPOConfig",
    "GAPOTrainer",
    "PreferenceCollator",
    "with_reference_logps",
]
