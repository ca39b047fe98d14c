"""Fuzz one target of `fuzz_targets` by coverage, with Atheris: pip install "gapo[fuzz]".

    python tests/fuzz/fuzz.py pairs --minutes 5
    python tests/fuzz/fuzz.py config --minutes 5 --seed 3

What is found is told once for each place it comes from, made as small as it can be, and saved under --findings; after
it is mended, put it into the corpus, which tests/test_fuzz.py replays.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 2  # of computing: no input may take longer. One that never ends is stopped after ten times as many
_TRIES = 2000  # of making a finding smaller


def main() -> None:
    """Fuzz; the process ends when the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("pairs", "config"))
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (default: 1)")
    parser.add_argument("--corpus", type=Path, help="folder of inputs to start from (default: the project's)")
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"), help="folder for what is found")
    options = parser.parse_args()
    import atheris

    sys.path.insert(0, str(HERE))
    with atheris.instrument_imports(include=["gapo"]):
        import fuzz_targets
    options.findings.mkdir(parents=True, exist_ok=True)
    run = Run(fuzz_targets.TARGETS[options.target], options.target, options.findings)
    grown = Path(tempfile.mkdtemp(prefix="corpus-"))  # the project's own is only read
    dictionary = grown.with_suffix(".dict")
    escaped = ("".join(f"\\x{b:02x}" for b in word.encode()) for word in fuzz_targets.words(options.target))
    dictionary.write_text("".join(f'"{word}"\n' for word in escaped))
    arguments = [
        sys.argv[0], f"-max_total_time={round(60 * options.minutes)}", f"-seed={options.seed}", "-max_len=4096",
        f"-timeout={10 * SECONDS}", "-rss_limit_mb=4096", f"-dict={dictionary}", "-report_slow_units=1000",
        f"-artifact_prefix={options.findings}/{options.target}-", str(grown),
        str(options.corpus or HERE / "corpus" / options.target),
    ]  # fmt: skip
    atheris.Setup(arguments, run)
    faulthandler.enable()
    atheris.Fuzz()


class Run:
    """Calls a target, counts its outcomes, and keeps one input for each place that a finding comes from."""

    def __init__(self, target: Callable[[bytes], str], name: str, findings: Path) -> None:
        self._target, self._name, self._folder = target, name, findings
        self._outcomes: Counter[str] = Counter()
        self._found: dict[str, str] = {}
        self._began = self._told = time.monotonic()
        self._slowest = 0.0

    def __call__(self, raw: bytes) -> None:
        outcome = self._place(raw)
        if outcome.startswith("FOUND"):
            if outcome not in self._found:
                self._keep(outcome, raw)
        else:
            self._outcomes[outcome] += 1
        if time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            self._tell()

    def _place(self, raw: bytes) -> str:
        """The outcome, or of a finding what was raised and the line of this project that it came through last."""
        began = time.process_time()
        try:
            outcome = self._target(raw)
            took = time.process_time() - began
            self._slowest = max(self._slowest, took)
            return outcome if took < SECONDS else f"FOUND more than {SECONDS} s, {outcome}"
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
            own = [f for f in frames if "gapo" in f.filename or "fuzz_targets" in f.filename]
            return f"FOUND {type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}"

    def _keep(self, outcome: str, raw: bytes) -> None:
        small = smaller(raw, lambda tried: self._place(tried) == outcome)
        path = self._folder / f"{self._name}-{len(self._found):02d}"
        path.write_bytes(small)
        self._found[outcome] = path.name
        print(f"{outcome}: {path}, {small[:200]!r}", flush=True)
        try:
            self._target(small)
        except Exception:
            traceback.print_exc(limit=-4)

    def _tell(self) -> None:
        told = {
            "seconds": round(time.monotonic() - self._began),
            "inputs": sum(self._outcomes.values()),
            "computing": round(time.process_time()),
            "slowest": round(self._slowest, 2),
            "outcomes": dict(sorted(self._outcomes.items())),
            "findings": self._found,
        }
        (self._folder / f"{self._name}.json").write_text(json.dumps(told, indent=1) + "\n")
        print(f"{told['seconds']} s, {told['inputs']} inputs, {len(self._found)} findings", flush=True)


def smaller(raw: bytes, same: Callable[[bytes], bool]) -> bytes:
    """`raw` with whatever is not needed left out: halves, quarters, ... single bytes, as long as `same` holds."""
    size, tries = len(raw) // 2, 0
    while size and tries < _TRIES:
        at = 0
        while at < len(raw) and tries < _TRIES:
            tried, tries = raw[:at] + raw[at + size :], tries + 1
            if same(tried):
                raw = tried
            else:
                at += size
        size //= 2
    return raw


if __name__ == "__main__":
    main()
