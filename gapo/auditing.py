"""`gapo.audit`: which labels of preference pairs are probably wrong. The work is done above the core."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from os import PathLike
from typing import Any

from gapo._extras import named_extra


def audit(pairs: str | PathLike[str] | Iterable[Mapping[str, Any]], *, model: str = "tiny", **settings: Any) -> Any:
    """Rank preference pairs by the probability that their label is wrong, as `gapo audit` does.

    Small policies are tuned on folds of the pairs, and each pair is judged by those that did not train on its prompt.
    Nothing needs to be known of which labels are wrong. Models are run by PyTorch, on the CPU.

    Args:
        pairs: a file or a data set's name, as for `gapo.data.read_pairs`; or the pairs themselves: a list of dicts, a
            `datasets.Dataset` or a `pandas.DataFrame`.
        model: "tiny" for a small model that is made on the spot, or the folder or Hub name of a causal language model,
            whose last layers are tuned.
        settings: other options of `gapo audit`, by their names, such as `folds=10`, or `tokenizer` for a model whose
            folder has none. Without `output` no file stays.
            `workers` is 1 unless set; more need the `if __name__ == "__main__"` of `multiprocessing`.

    Returns:
        `gapo.runs.audit.AuditResult`: a sequence of one dict for each pair, the most suspicious first, with "p_wrong",
        "row" (the place among the usable pairs, from 0), "margin" and "gap" (nats per token), and more; `summary`, a
        dict with the "share" of wrong labels and its interval; and `to_pandas()`.

    Raises:
        ModuleNotFoundError: a library of the extra `gapo[cli]` is not installed.
        TypeError: `pairs` are no pairs, such as a dict of splits.
        ValueError: a setting is not accepted, or the pairs cannot be read.
        FloatingPointError: a policy's log-probabilities are not finite.
    """
    with named_extra("gapo.audit", "cli"):
        engine = import_module(".runs.audit", __package__).audit
    return engine(pairs if not isinstance(pairs, PathLike) else str(pairs), model=model, **settings)
