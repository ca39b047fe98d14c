"""What every run of a study starts from: the pairs, and the policy with what it says of them at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gapo.data import read_pairs
from gapo.data.flip import true_labels
from gapo.data.streams import stream
from gapo.runs.errors import ConfigError
from gapo.runs.held_out import hold_out_prompts, in_both, read_both, report_in_both
from gapo.runs.models.tiny import answer_texts, plain_text, tiny_model
from gapo.runs.policy.aside import SEQUENCE, perplexity
from gapo.runs.policy.pair_batches import Row
from gapo.runs.policy.policy import Policy
from gapo.runs.policy.states import digest_of
from gapo.study.study_config import StudyConfig

_PIECES = 32  # of plain text


@dataclass(frozen=True)
class Split:
    """The pairs of a study by use: to train on (`pool`), to choose settings on, to test on. Labels as given: true.

    `transfer` are pairs of another kind to test on, `text` is plain text.
    """

    pool: list[Row]
    validation: list[Row]
    test: list[Row]
    summary: str
    transfer: list[Row] = field(default_factory=list)
    text: str = ""


def load_split(config: StudyConfig) -> Split:
    """Read the pairs and hold out validation pairs by prompt, so that none of their prompts is trained on."""
    pairs, tested = read_both(config, generated=config.test_pairs, most=config.test_pairs)
    rows, validation = hold_out_prompts(pairs.rows, config.validation_pairs, stream(config.seed, "study validation"))
    if tested is not None:
        test, source = tested.rows[: config.test_pairs], Path(tested.source).name
    else:
        rows, test = hold_out_prompts(rows, config.test_pairs, stream(config.seed, "study test"))
        test, source = test[: config.test_pairs], "held out by prompt from the same file"
    if len(rows) < config.train_pairs:
        raise ConfigError(f"train_pairs={config.train_pairs}, but only {len(rows)} pairs are left to train on")
    lines = [
        pairs.summary(),
        f"{len(rows)} pairs to draw training pairs from, {len(validation)} validation pairs (held out by prompt), "
        f"{len(test)} test pairs ({source})",
        *_warnings(rows, validation, test),
    ]
    pool, validation, test = (list(true_labels(part)) for part in (rows, validation, test))
    transfer = []
    if config.transfer_pairs is not None:
        other = read_pairs(config.transfer_pairs, limit=config.check_pairs)
        transfer = list(true_labels(other.rows))
        lines.append(f"{len(transfer)} pairs of another kind to test on ({Path(other.source).name})")
    return Split(pool, validation, test, "\n".join(lines), transfer, plain_text("plain_text", config.plain_text))


def _warnings(rows: Sequence[Row], validation: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """Lines on labels that are flipped in their file, and on test pairs that are trained or tuned on."""
    every = [*rows, *validation, *test]
    lines = []
    if came_flipped := sum(bool(row.get("is_flipped")) for row in every):
        lines.append(
            f"{came_flipped} of the {len(every)} pairs came flipped (is_flipped); the study takes all by their true "
            "labels, and flips its own"
        )
    if shared := in_both(test, [*rows, *validation]):
        lines.append(report_in_both(shared, len(test), "test"))
    return lines


class Material(Policy):
    """The policy and the pairs, made once and read in every worker.

    Attributes:
        split: the pairs.
        tokens: tokenised pairs of "pool", "validation", "test" and, where there are some, "transfer", with the
            log-probabilities of their answers under the policy at the start: the columns `gapo.pairs.REFERENCE`,
            summed, nats.
        start: for each of them (n, 2), the same per token.
        text: pieces of plain text, and `plain` the perplexity that the policy has on them at the start.
        fingerprint: of policy and pairs.
    """

    def __init__(self, config: StudyConfig, split: Split) -> None:
        self.split = split
        tiny = tiny_model(config, answer_texts(split.pool)) if config.model == "tiny" else None
        super().__init__(tiny or config.model, cache=config.cache_dir, train_layers=config.train_layers)
        parts = {"pool": split.pool, "validation": split.validation, "test": split.test}
        if split.transfer:
            parts["transfer"] = split.transfer
        self.tokens = {name: self.tokenized(rows, config.max_length) for name, rows in parts.items()}
        tokens = digest_of(self.tokens)
        self.start = self.prepare(self.tokens, tiny)
        name = tiny.name if tiny is not None and config.train_layers is None else f"policy-{self.weights}"
        self.fingerprint = f"{name}-{tokens}"
        if split.text:
            self.fingerprint += f"-{digest_of(split.text)}"
        self.text = self.pieces(split.text, _PIECES, SEQUENCE) if split.text else []
        self.plain = perplexity(self, self.text) if self.text else None
