"""Mutation check: do the tests see a small fault in the core or in a backend?

The check makes one fault (a "mutant") at a time in a copy of the repository, by the operators of cosmic-ray and by one
that drops a statement. Then it runs the tests of that module; a mutant survives if they all pass. Each run is a fork of
a process that has already imported the frameworks, so that only the tests themselves take time.

    pip install cosmic-ray==8.7.0
    python benchmarks/mutation.py                               # everything
    python benchmarks/mutation.py geometry step --sample 100    # 100 mutants drawn from each of two modules
    python benchmarks/mutation.py step --again                  # only what survived before, after new tests

Results are appended to runs/mutation.jsonl at once; an interrupted run continues from there.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import parso
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator, operator_names
from mutation_tests import TESTS
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]

# The replacements of each operator: one of its kind; for a comparison, its neighbour and its opposite. Others would be
# no harder to find.
BECOMES = {
    "Add": "Sub",
    "Sub": "Add",
    "Mul": "Div",
    "Div": "Mul",
    "FloorDiv": "Mul",
    "Pow": "Mul",
    "Eq": "NotEq",
    "NotEq": "Eq",
    "Lt": "LtE GtE",
    "GtE": "Gt Lt",
    "Gt": "GtE LtE",
    "LtE": "Lt Gt",
    "Is": "IsNot",
    "IsNot": "Is",
    "Delete": "USub Not",
}


class DropStatement(Operator):
    """Replace by `pass` a call whose value is unused, a raise, or an assignment to an attribute or item."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type != "simple_stmt":
            return
        statement = node.children[0]
        stored = statement.type == "expr_stmt" and statement.children[0].type in ("atom_expr", "power")
        if stored or statement.type in ("atom_expr", "power", "raise_stmt"):
            yield statement.start_pos, statement.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        prefix = node.children[0].get_first_leaf().prefix
        node.children[0] = parso.parse(f"{prefix}pass")
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("f(x)\n", "pass\n"), Example("x[0] = y\n", "pass\n"))


@dataclass(frozen=True)
class Mutant:
    """One fault: the text of the module that has it, and its place."""

    module: str
    operator: str
    line: int
    diff: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha1(f"{self.module}\n{self.source}".encode()).hexdigest()[:12]


def all_operators() -> dict[str, Operator]:
    """Each operator by its name: cosmic-ray's, as far as `BECOMES` has them, and `DropStatement`."""
    operators: dict[str, Operator] = {"DropStatement": DropStatement()}
    for path in operator_names():
        name, kind = path.rpartition("/")[2], get_operator(path)
        _, before, after = (*name.split("_"), "", "")[:3]
        if not kind.arguments() and (not before or after in BECOMES.get(before, "").split()):
            operators[name] = kind()
    return operators


def meaning(source: str) -> str | None:
    """The executed part of `source`: its tree without annotations and kinds of parameters; None if invalid."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            node.args, node.posonlyargs, node.kwonlyargs = [*node.posonlyargs, *node.args, *node.kwonlyargs], [], []
            node.defaults, node.kw_defaults = [*node.defaults, *filter(None, node.kw_defaults)], []
        for part in ("annotation", "returns"):
            if getattr(node, part, None) is not None:
                setattr(node, part, ast.Constant(None))
    return ast.dump(tree)


def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module whose executed code differs from the module's and from the other mutants'."""
    source = (ROOT / module).read_text(encoding="utf-8")
    seen = {meaning(source), None}
    distinct = []
    for name, operator in all_operators().items():
        positions = [start for node in ast_nodes(get_ast(source)) for start, _ in operator.mutation_positions(node)]
        for occurrence, (line, _) in enumerate(positions):
            mutated = mutate_code(source, operator, occurrence)
            if mutated is None or meaning(mutated) in seen:
                continue
            seen.add(meaning(mutated))
            lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), n=0, lineterm="")
            diff = "\n".join(text for text in lines if text[:3] not in ("---", "+++") and text[:2] != "@@")
            distinct.append(Mutant(module, name, line, diff, mutated))
    return distinct


class LikeliestFirst:
    """A pytest plugin: first the tests that found most mutants, then the quick ones; failing examples do not shrink."""

    def __init__(self, record: Path) -> None:
        self._path = record
        self._record: dict[str, list[float]] = json.loads(record.read_text()) if record.exists() else {}

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", parent=settings.get_profile("ci"), phases=phases)
        settings.load_profile("mutation")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self._record.get(item.nodeid, [0, 0.0]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._record.setdefault(report.nodeid, [0, 0.0])  # minus the mutants that it found, seconds
        test[0] -= int(report.failed)
        test[1] = max(test[1], report.duration)

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._record))
        self._path.with_suffix(".warm").write_text(json.dumps([dict(os.environ), sorted(sys.modules)]))


class Copy:
    """A copy of the repository in which one module at a time is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record.json"
        hidden = shutil.ignore_patterns("__pycache__", ".*")
        outputs = shutil.ignore_patterns("__pycache__", ".*", "runs", "site", "docs")  # at the top; gapo/runs is code
        shutil.copytree(
            ROOT,
            folder,
            ignore=lambda path, names: (outputs if Path(path) == ROOT else hidden)(path, names),
            dirs_exist_ok=True,
            symlinks=True,
        )
        sys.path[:0] = [str(folder), str(folder / "tests" / "support")]
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        sys.dont_write_bytecode = True
        os.chdir(folder)

    def warm(self, arguments: list[str]) -> float:
        """Run the unchanged tests, which must pass; import the modules that they imported; return their seconds."""
        self.record.unlink(missing_ok=True)
        for _ in range(2):
            outcome, seconds = self.outcome(arguments, limit=600)
            if outcome != "survived":
                raise SystemExit(f"the tests fail without a mutant:\n{(self.folder / 'output.txt').read_text()}")
            theirs = {path.stem for path in (self.folder / "tests").rglob("*.py")} | {"gapo", "tests"}
            environment, modules = json.loads(self.record.with_suffix(".warm").read_text())
            os.environ |= environment | dict(os.environ)  # frameworks read the environment on import
            for name in modules:
                if name.partition(".")[0] not in theirs:
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)
            gc.collect()
            gc.freeze()  # a fork then does not search all of it for garbage
        return seconds

    def outcome(self, arguments: list[str], limit: float) -> tuple[str, float]:
        """("survived" | "killed" | "timeout", seconds of CPU) of the tests in a process of their own.

        `limit` is in seconds of CPU. By the clock it is ten times that, since other work on the machine must not count.
        """
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
            self._test(arguments)
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            if time.monotonic() - start > 10 * limit:
                os.killpg(child, signal.SIGKILL)
                ended = os.wait4(child, 0)
                break
            time.sleep(0.02)
        code, seconds = os.waitstatus_to_exitcode(ended[1]), ended[2].ru_utime + ended[2].ru_stime
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise RuntimeError(f"pytest found no tests: {' '.join(arguments)}")
        return {0: "survived", -signal.SIGKILL: "timeout", -signal.SIGXCPU: "timeout"}.get(code, "killed"), seconds

    def _test(self, arguments: list[str]) -> None:
        code = 70
        try:
            with open(self.folder / "output.txt", "wb") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            code = int(pytest.main(arguments, plugins=[LikeliestFirst(self.record)]))
        finally:
            sys.stdout.flush()
            os._exit(code)


def pytest_arguments(module: str) -> list[str]:
    files, expression = TESTS[module]
    options = ["-x", "-q", "--assert=plain", "--tb=line", "-p", "no:cacheprovider"]
    options += ["-o", "addopts=--import-mode=importlib", "-k", expression]
    paths = [path for name in files.split() for path in (ROOT / "tests").rglob(f"test_{name}.py")]
    return [*(str(path.relative_to(ROOT)) for path in paths), *options]


def check(copy: Copy, chosen: list[Mutant], results: Path) -> None:
    """Run the tests on each mutant of one module, and append the outcomes to `results`."""
    module = chosen[0].module
    arguments, whole = pytest_arguments(module), (ROOT / module).read_text(encoding="utf-8")
    seconds = copy.warm(arguments)
    counts: Counter[str] = Counter()
    with results.open("a", encoding="utf-8") as file, tqdm(chosen, desc=f"{module} ({seconds:.1f} s)") as progress:
        for mutant in progress:
            (copy.folder / module).write_text(mutant.source, encoding="utf-8")
            outcome, seconds_taken = copy.outcome(arguments, limit=10 + 4 * seconds)
            row = {**asdict(mutant), "key": mutant.key, "outcome": outcome, "seconds": round(seconds_taken, 2)}
            del row["source"]
            file.write(json.dumps(row) + "\n")
            file.flush()
            counts[outcome] += 1
            progress.set_postfix(counts)
    (copy.folder / module).write_text(whole, encoding="utf-8")


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The last result of each mutant by its key."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def report(modules: list[str], by_module: dict[str, list[Mutant]], results: dict[str, dict[str, Any]]) -> None:
    """Survivors, then a table."""
    for module in modules:
        for mutant in by_module[module]:
            if results.get(mutant.key, {}).get("outcome") == "survived":
                print(f"\n{module}:{mutant.line} {mutant.operator} {mutant.key}\n{mutant.diff}")
    print("\n| module | mutants | run | killed | survived | score |\n|---|---|---|---|---|---|")
    total: Counter[str] = Counter()
    for name in [*modules, "all"]:
        counts = (
            total if name == "all" else Counter(results[m.key]["outcome"] for m in by_module[name] if m.key in results)
        )
        if name != "all":
            counts["mutants"] = len(by_module[name])
            total += counts
        survived, killed = counts["survived"], counts["killed"] + counts["timeout"]
        score = f"{killed / (killed + survived):.1%}" if killed + survived else "-"
        print(f"| `{name}` | {counts['mutants']} | {killed + survived} | {killed} | {survived} | {score} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="parts of paths, such as geometry or torch/rules; default: all")
    parser.add_argument("--sample", type=int, help="mutants of each module, drawn at random; default: all of them")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--again", action="store_true", help="run only the mutants that survived before")
    parser.add_argument("--report", action="store_true", help="print the results so far, and run nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "mutation.jsonl", help="(default: %(default)s)")
    options = parser.parse_args()
    modules = [m for m in TESTS if not options.modules or any(part in m for part in options.modules)]
    if not modules:
        parser.error(f"no module contains {' or '.join(options.modules)}; there are {', '.join(TESTS)}")
    results = options.results.resolve()
    results.parent.mkdir(parents=True, exist_ok=True)
    by_module = {module: mutants(module) for module in modules}
    if not options.report:
        earlier = read(results)
        with tempfile.TemporaryDirectory() as folder:
            copy = Copy(Path(folder).resolve())
            for module in modules:
                drawn = by_module[module].copy()
                random.Random(options.seed).shuffle(drawn)  # a larger sample holds the smaller one
                drawn = drawn[: options.sample]
                wanted = "survived" if options.again else None
                todo = [m for m in drawn if earlier.get(m.key, {}).get("outcome") == wanted]
                if todo:
                    check(copy, todo, results)
            os.chdir(ROOT)
    report(modules, by_module, read(results))


if __name__ == "__main__":
    main()
