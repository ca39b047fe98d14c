"""GAPO in Hugging Face's `Trainer`: a collator for preference pairs, and a callback that turns training into GAPO."""

from gapo.adapters import missing

try:
    from gapo.adapters.hf.callback import GAPOCallback
    from gapo.adapters.hf.collator import PreferenceCollator
    from gapo.adapters.hf.drift import DriftCallback
except ModuleNotFoundError as error:
    raise missing("hf", error) from error

__all__ = ["DriftCallback", "GAPOCallback", "PreferenceCollator"]
