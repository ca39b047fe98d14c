"""The rules of the house: directions of imports, sizes of rooms and files, names, words. Read from the source alone.

Each rule is a function from the sources to the faults it finds, and is shown a fault of its own kind at the end.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())

# What each room may import beside itself. The core and the objectives are one layer of two folders.
BELOW = {
    "core": {"objectives"},
    "objectives": {"core"},
    "data": {"core", "objectives"},
    "pairgrads": set(),
    "backends": {"core", "objectives", "pairgrads"},
    "adapters": {"core", "objectives", "data", "backends"},
    "runs": {"core", "objectives", "data", "adapters"},
    "audit": {"core", "objectives", "data", "adapters", "runs"},
    "study": {"core", "objectives", "data", "adapters", "runs", "audit"},
    "commands": {"core", "objectives", "data", "runs", "audit", "study"},
    "examples": {"core", "objectives", "data", "adapters"},  # scripts as users write them
}
FRAMEWORKS = {"torch", "jax", "mlx", "numpy", "transformers", "flax"}
LONGEST_FILE = 310  # about 300
BANNED_NAMES = {"found", "given", "kept", "made", "told", "known", "at", "one"}
# Each exception has its reason; one that is no longer needed fails too.
CIRCLES_ALLOWED: dict[tuple[str, str], str] = {}
LONG_FILES = {
    "gapo/backends/torch/pairgrads/tape.py": "one class, whose phases share the record of one forward",
}
SAME_NAMES = {
    "registry.py": "the engine of pairs' gradients stands alone: its rules are registered as the objectives are",
}
PHRASES = re.compile(
    r"\b(whichever way|what came\b|may stand under|stands? under jax|lines? says? so|without a word|whence|lest|thereof"
    r"|whosoever|be it)\b".replace(" ", r"\s+"),
    re.IGNORECASE,
)

Sources = dict[str, str]
Faults = list[str]


def package() -> Sources:
    """The text of each Python file of the package, by its path from the root."""
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(ROOT.glob("gapo/**/*.py"))}


@cache
def nodes_of(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def module_of(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def room_of(path: str) -> str:
    """The room of a file.

    The protocol of a backend, and the lookup of a backend by its name, stand beside the backends but belong to the
    core: the step and every backend are written against them. The engines of pairs' gradients know nothing of GAPO.
    The audit is built on the other runs.
    """
    parts = path.split("/")
    if "pairgrads" in parts or "jaxrows" in parts:
        return "pairgrads"
    if path.startswith("gapo/runs/audit/"):
        return "audit"
    if path in ("gapo/backends/__init__.py", "gapo/backends/base.py"):
        return "core"
    if len(parts) == 2:
        return "commands" if parts[1] in ("cli.py", "__main__.py") else "core"
    if parts[1] == "experiments":  # until it is gone, and for what stays importable from there
        return "study" if parts[2] == "study" else "runs"
    return parts[1]


def imports_of(path: str, sources: Sources) -> Iterator[tuple[str, str, int]]:
    """(module, name or "", line) of each import in a file, wherever it stands: in functions, under TYPE_CHECKING."""
    package_parts = path.split("/")[:-1]
    modules = {module_of(other) for other in sources}
    for node in nodes_of(sources[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package_parts[: len(package_parts) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner, "", node.lineno) if inner in modules else (base, alias.name, node.lineno)


def texts_of(source: str) -> Iterator[tuple[int, str]]:
    """The texts in a file, each with its line: strings (docstrings and messages) and comments."""
    for node in nodes_of(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def imports_upward(sources: Sources) -> Faults:
    rooms = {module_of(path): room_of(path) for path in sources}
    faults = [
        f"{path}:{line}: {room_of(path)} imports {module} of {rooms[module]}"
        for path in sources
        for module, _, line in imports_of(path, sources)
        if module in rooms and rooms[module] not in BELOW[room_of(path)] | {room_of(path)}
    ]
    return list(dict.fromkeys(faults))


def names_upward(sources: Sources) -> Faults:
    """Texts of the core and of data, docstrings apart, that name what is built on them: advice that belongs there."""
    faults = []
    pattern = re.compile(r"gapo\.(adapters|experiments|runs|study|commands)\b")
    for path, source in sources.items():
        if room_of(path) not in ("core", "objectives", "data"):
            continue
        statements = (node.value for node in nodes_of(source) if isinstance(node, ast.Expr))
        docstrings = {id(value) for value in statements}
        faults += [
            f"{path}:{node.lineno}: names {match[0]}"
            for node in nodes_of(source)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
            if (match := pattern.search(node.value))
        ]
    return faults


def private_imports(sources: Sources) -> Faults:
    return [
        f"{path}:{line}: imports {name} from {module}"
        for path in sources
        for module, name, line in imports_of(path, sources)
        if module.startswith("gapo") and name.startswith("_") and not name.endswith("__")
    ]


def frameworks_in_core(sources: Sources) -> Faults:
    return [
        f"{path}:{line}: imports {module}"
        for path in sources
        for module, _, line in imports_of(path, sources)
        if room_of(path) in ("core", "objectives") and module.split(".")[0] in FRAMEWORKS
    ]


def circles(sources: Sources) -> Faults:
    """Files that import each other, directly or round several corners (Tarjan's strongly connected components)."""
    modules = {module_of(path): path for path in sources}
    graph = {
        module: {target for target, _, _ in imports_of(path, sources) if target in modules and target != module}
        for module, path in modules.items()
    }
    for first, second in CIRCLES_ALLOWED:
        graph.get(first, set()).discard(second)
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    faults: Faults = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in order:
                visit(target)
            if target in stack:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == order[module]:
            members = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(members) > 1:
                faults.append(f"these import each other: {', '.join(sorted(members))}")

    for module in graph:
        if module not in order:
            visit(module)
    return faults


def big_rooms(sources: Sources) -> Faults:
    lines: Counter[str] = Counter()
    for path, source in sources.items():
        lines[room_of(path)] += source.count("\n")
    return [
        f"{room} has {count} of {lines.total()} lines" for room, count in lines.items() if 4 * count >= lines.total()
    ]


def long_files(sources: Sources) -> Faults:
    return [
        f"{path} has {source.count(chr(10))} lines"
        for path, source in sources.items()
        if source.count("\n") > LONGEST_FILE and path not in LONG_FILES
    ]


def same_names(sources: Sources) -> Faults:
    """Files of one name. A command is called as what it runs, and may share its name with that."""
    paths: dict[str, list[str]] = defaultdict(list)
    for path in sources:
        name = path.rpartition("/")[2]
        if not name.startswith("__") and not path.startswith("gapo/commands/"):
            paths[name].append(path)
    return [", ".join(group) for name, group in paths.items() if len(group) > 1 and name not in SAME_NAMES]


def banned_names(sources: Sources) -> Faults:
    """Variables, attributes and parameters whose name is no noun of the domain."""

    def bound(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            return node.id
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            return node.attr
        if isinstance(node, ast.arg):
            return node.arg
        return node.name if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) else None

    return [
        f"{path}:{getattr(node, 'lineno', 0)}: {name}"
        for path, source in sources.items()
        for node in nodes_of(source)
        if (name := bound(node)) is not None and name.strip("_") in BANNED_NAMES
    ]


def formulas_outside_the_core(sources: Sources) -> Faults:
    """A log-sigmoid above the core is a second copy of an objective."""
    functions = {"logsigmoid", "log_sigmoid", "softplus", "logaddexp", "LogSigmoid", "log1p", "log_expit"}
    faults = []
    for path, source in sources.items():
        for node in nodes_of(source):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            if isinstance(node, ast.alias):
                name = node.name
            if name in functions and room_of(path) in ("adapters", "runs", "study", "commands", "data"):
                faults.append(f"{path}:{node.lineno}: {name}")  # type: ignore[attr-defined]
    return faults


def branches_by_name(sources: Sources) -> Faults:
    """Comparisons with the name "gapo": the step runs every objective the same way. The study has such an arm."""

    def compares(node: ast.AST, room: str) -> bool:
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if room == "study" and not any("objective" in ast.unparse(side) for side in sides):
            return False
        sides = [node.value] if isinstance(node, ast.MatchValue) else sides
        parts = [part for side in sides for part in [side, *getattr(side, "elts", [])]]
        return any(isinstance(part, ast.Constant) and part.value == "gapo" for part in parts)

    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]
        for path, source in sources.items()
        for node in nodes_of(source)
        if compares(node, room_of(path))
    ]


def archaic_phrases(sources: Sources) -> Faults:
    """Phrases that no technical writer uses; of Python files in strings and comments, of others anywhere."""
    faults = []
    for path, source in sources.items():
        for line, text in texts_of(source) if path.endswith(".py") else [(1, source)]:
            for match in PHRASES.finditer(text):
                faults.append(f"{path}:{line + text.count(chr(10), 0, match.start())}: {' '.join(match[0].split())}")
    return faults


def test_the_package_keeps_the_rules() -> None:
    sources = package()
    faults = [f"{rule.__name__}: {fault}" for rule in RULES for fault in rule(sources)]
    patterns = ("docs/*.md", "README.md", "CONTRIBUTING.md", "benchmarks/*.py")
    pages = [page for pattern in patterns for page in sorted(ROOT.glob(pattern))]
    texts = {str(page.relative_to(ROOT)): page.read_text("utf-8") for page in pages}
    faults += [f"archaic_phrases: {fault}" for fault in archaic_phrases(texts)]
    assert not faults, "\n".join(["", *faults])


def test_no_exception_outlives_its_need(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = package()
    for exceptions, rule in ((CIRCLES_ALLOWED, circles), (LONG_FILES, long_files), (SAME_NAMES, same_names)):
        for exception in list(exceptions):
            monkeypatch.delitem(exceptions, exception)
            assert rule(sources), f"{exception} is listed without need"
            monkeypatch.undo()


# A package that keeps every rule: each room has as many lines as the others.
SOUND = {f"gapo/{room}/{room}.py": "x = 1\n" * 10 for room in BELOW if room != "core"}
SOUND["gapo/core.py"] = "x = 1\n" * 10
BROKEN: list[tuple[Callable[[Sources], Faults], dict[str, str]]] = [
    (imports_upward, {"gapo/core.py": "from gapo.data import data"}),
    (imports_upward, {"gapo/core.py": "def f():\n    import gapo.runs.runs"}),
    (imports_upward, {"gapo/data/data.py": "if TYPE_CHECKING:\n    from ..adapters import adapters"}),
    (imports_upward, {"gapo/runs/runs.py": "from gapo.study.study import x"}),
    (imports_upward, {"gapo/adapters/hf/new.py": "import gapo.cli", "gapo/cli.py": ""}),
    (names_upward, {"gapo/data/data.py": "def f(n):\n    raise ValueError(f'{n}: use gapo.adapters.hf')"}),
    (private_imports, {"gapo/runs/runs.py": "from gapo.core import _secret"}),
    (frameworks_in_core, {"gapo/objectives/objectives.py": "def f():\n    from torch import nn"}),
    (circles, {"gapo/a.py": "import gapo.b", "gapo/b.py": "import gapo.c", "gapo/c.py": "def f():\n    import gapo.a"}),
    (big_rooms, {"gapo/data/data.py": "x = 1\n" * 40}),
    (long_files, {f"gapo/{room}/long.py": "x = 1\n" * (LONGEST_FILE + 1) for room in BELOW}),
    (same_names, {"gapo/data/report.py": "", "gapo/study/report.py": ""}),
    *(
        (banned_names, {"gapo/core.py": text})
        for text in (
            "found = 1",
            "self._told = 1",
            "for i, one in x: pass",
            "with x as given: pass",
            "(made := 1)",
            "[at for at in x]",
            "def f(*, known): pass",
            "kept: int",
        )
    ),
    (formulas_outside_the_core, {"gapo/adapters/adapters.py": "from torch.nn.functional import logsigmoid"}),
    (formulas_outside_the_core, {"gapo/study/study.py": "loss = jax.nn.softplus(-x)"}),
    (branches_by_name, {"gapo/study/study.py": "x = objective != 'gapo'"}),
    (branches_by_name, {"gapo/adapters/adapters.py": "x = name in ('gapo', 'simpo')"}),
    (branches_by_name, {"gapo/runs/runs.py": "match objective:\n    case 'gapo': pass"}),
    (archaic_phrases, {"gapo/core.py": "raise ValueError('a' f'{x}, whichever way' ' it fell')"}),
    (archaic_phrases, {"gapo/core.py": "x = 1  # what came"}),
    (archaic_phrases, {"docs/a.md": "It may stand\nunder `jax.jit`."}),
]
RULES = list(dict.fromkeys(rule for rule, _ in BROKEN))


def test_a_sound_package_has_no_fault() -> None:
    assert [fault for rule in RULES for fault in rule(SOUND)] == []


@pytest.mark.parametrize(("rule", "change"), BROKEN, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(BROKEN)])
def test_each_rule_sees_its_fault(rule: Callable[[Sources], Faults], change: dict[str, str]) -> None:
    assert len(rule(SOUND | change)) >= 1
