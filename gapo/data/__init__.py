"""Preference pairs: read and check, flip labels, tokenise, collate, generate. NumPy only, until a source needs more."""

from gapo.data.collate import batches, collate_pairs
from gapo.data.demo import generate_pairs, warmup_text
from gapo.data.flip import flip_pairs
from gapo.data.reading import Pairs, Problem, read_pairs
from gapo.data.reference_columns import with_reference_logps
from gapo.data.text_files import PairError
from gapo.data.tokenize import tokenize_pair, tokenize_pairs
from gapo.files import write_rows

__all__ = [
    "PairError",
    "Pairs",
    "Problem",
    "batches",
    "collate_pairs",
    "flip_pairs",
    "generate_pairs",
    "read_pairs",
    "tokenize_pair",
    "tokenize_pairs",
    "warmup_text",
    "with_reference_logps",
    "write_rows",
]
