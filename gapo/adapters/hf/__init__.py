"""GAPO in Hugging Face's `Trainer`: a collator for preference pairs, and a callback that turns training into GAPO."""

from gapo.adapters.hf.callback import GAPOCallback
from gapo.adapters.hf.collator import PreferenceCollator

__all__ = ["GAPOCallback", "PreferenceCollator"]
