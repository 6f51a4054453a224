"""The rooms of the package: which imports which, how large files and functions are, and that every pass is named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from nnfuze_tvm import passes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nnfuze_tvm"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# What a room may import besides itself, `errors` and `reading`. The command line and the public face: everything.
MAY_IMPORT = {
    "errors": set(),
    "reading": set(),
    "graph": set(),
    "devices": set(),
    "frontend": {"graph"},
    "passes": {"graph"},
    "training": {"graph", "passes"},
    "schedules": {"graph", "devices"},
    "deploy": {"graph", "passes", "schedules", "devices"},
    "analysis": {"graph", "schedules", "devices", "deploy"},
    "jobs": {"graph", "frontend", "passes", "training", "schedules", "devices", "deploy", "analysis", "report"},
    # The records that it shows, not the code that makes them.
    "report": {"analysis", "jobs", "devices"},
}
EVERYTHING = {"__init__", "__main__", "cli"}

LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60


@lru_cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def room(module: str) -> str:
    """Return the first part below the package; the package itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the package's modules that a module imports, also late or for types only, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            source = node.module or ""
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                name = inner if inner in MODULES else source
                if name in MODULES:
                    yield name, node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)


def test_every_room_is_known() -> None:
    assert {room(module) for module in MODULES} <= MAY_IMPORT.keys() | EVERYTHING


def test_imports_go_one_way() -> None:
    wrong = []
    for module, tree in trees().items():
        own = room(module)
        if own in EVERYTHING:
            continue
        allowed = MAY_IMPORT[own] | {own, "errors", "reading"}
        wrong += [f"{module}:{line} imports {name}" for name, line in imported(tree) if room(name) not in allowed]
    assert not wrong, "\n".join(wrong)


def for_types_only(tree: ast.Module) -> set[int]:
    """Return the lines that only a type checker reads."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {line for block in blocks for line in range(block.lineno, (block.end_lineno or 0) + 1)}


def test_no_module_needs_itself() -> None:
    """Late imports count, those for types don't; nor do those of a package's ``__init__`` for its own modules."""
    needs = {}
    for module, tree in trees().items():
        unread = for_types_only(tree)
        names = {name for name, line in imported(tree) if line not in unread and name != module}
        needs[module] = {name for name in names if not module.startswith(f"{name}.")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(needs[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in sorted(needs):
        visit(module, ())


SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])


def test_files_are_small() -> None:
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {path: count for path, count in lines.items() if count > LINES_OF_A_FILE}


def test_functions_are_small() -> None:
    """Docstrings don't count."""
    large = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text, end = node.body[0], node.end_lineno or 0
            has_docstring = ast.get_docstring(node, clean=False) is not None
            documented = (text.end_lineno or 0) - text.lineno + 1 if has_docstring else 0
            if (count := end - node.lineno + 1 - documented) > LINES_OF_A_FUNCTION:
                large.append(f"{path}: {node.name}: {count} lines")
    assert not large, "\n".join(large)


def declared_passes(below: Path) -> set[str]:
    """Return the classes that are made passes by TVM's decorator."""
    found = set()
    for path in below.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("_pass(" in ast.unparse(each) for each in node.decorator_list):
                found.add(node.name)
    return found


def test_all_passes_are_exported() -> None:
    found = declared_passes(PACKAGE / "passes")
    assert found and found == set(passes.__all__)


def test_the_documentation_names_every_pass() -> None:
    named = re.findall(r"^\| `(\w+)", (ROOT / "docs/passes.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared_passes(PACKAGE) == set(named)


def test_what_is_said_of_security_is_tested() -> None:
    """The tests that its page names are there."""
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    named = re.findall(r"((?:`test_\w+`,? ?)+)in `(tests/[\w/]+\.py)`", text)
    missing = [
        f"{file}: {test}"
        for tests, file in named
        for test in re.findall(r"test_\w+", tests)
        if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    assert len(named) > 10 and not missing, missing


def test_tests_mirror_the_package() -> None:
    """Beside them are those of what isn't the package, of whole networks, of bad input, and on emulated boards."""
    own = {"arm", "benchmarks", "hostile"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [
        str(folder)
        for folder in folders
        if folder.parts and folder.parts[0] not in own and not (PACKAGE / folder).is_dir()
    ]
