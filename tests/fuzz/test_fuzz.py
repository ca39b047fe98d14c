"""Every input of the corpus again, among them all that fuzzing has found; and that a finding would be seen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import fuzz
import fuzz_targets
import pytest

from gapo import data

FOLDER = Path(__file__).parent
INPUTS = sorted(path for path in (FOLDER / "corpus").rglob("*") if path.is_file())


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    """Libraries that the first input would load, within its time."""
    import datasets  # noqa: F401

    fuzz_targets.config(b"C")


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_corpus_has_accepted_outcomes(path: Path) -> None:
    began = time.process_time()
    outcome = fuzz_targets.TARGETS[path.parent.name](path.read_bytes())
    assert outcome[:1] in {*fuzz_targets.PAIR_FILES, *fuzz_targets.CONFIGS}
    assert time.process_time() - began < fuzz.SECONDS


def test_the_corpus_is_small_and_holds_every_kind() -> None:
    assert sum(path.stat().st_size for path in INPUTS) < 100_000
    for target, kinds in (("pairs", fuzz_targets.PAIR_FILES), ("config", fuzz_targets.CONFIGS)):
        first = {path.read_bytes()[:1].decode() for path in INPUTS if path.parent.name == target}
        assert first == set(kinds)


@pytest.mark.parametrize("what", ["raises", "other rows", "unnamed", "slow"])
def test_a_finding_is_seen_and_made_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    plain = data.read_pairs

    def broken(path: Any, **options: Any) -> Any:
        if b"!" not in Path(path).read_bytes():
            return plain(path, **options)
        if what == "raises":
            raise TypeError("no document says this")
        if what == "unnamed":
            raise data.PairError("something is wrong")
        if what == "slow":
            monkeypatch.setattr(fuzz, "SECONDS", -1)
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
        return data.Pairs([{**row, "prompt": None} if what == "other rows" else row])

    monkeypatch.setattr(data, "read_pairs", broken)
    run = fuzz.Run(fuzz_targets.pairs, "pairs", tmp_path)
    for raw in (b"l{}", b"lsome text, and ! in it", b"lother ! text"):
        run(raw)
    (found,) = run._found
    names = {"raises": "TypeError at ", "other rows": "Finding at ", "unnamed": "Finding at ", "slow": "more than "}
    assert found.startswith(f"FOUND {names[what]}")
    small = (tmp_path / "pairs-00").read_bytes()
    assert small.endswith(b"!")
    assert len(small) == 2  # the kind and the character
    assert found in capsys.readouterr().out


def test_smaller() -> None:
    assert fuzz.smaller(b"xxxAxxBxxxxxC", lambda raw: b"A" in raw and b"C" in raw) == b"AC"
    assert fuzz.smaller(b"", lambda raw: True) == b""
