"""The floors of the house: a module imports only from floors below it, never sideways between stages."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from checkout import HEAVY

import papo
from papo.pipeline import CODE

PACKAGE = Path(papo.__file__).parent
FLOORS = {
    "errors": 0,
    "params": 0,
    "schemas": 0,
    "secrets": 0,
    "core": 0,
    "store": 1,
    "engines": 2,
    "stages": 3,
}  # the rest is floor 4
FLOOR_0_MAY = {
    "core": {"core", "errors"},
    "params": {"errors", "secrets"},
    "schemas": {"errors"},
    "errors": set(),
    "secrets": set(),
}
# Helpers that stages share; they are no stages.
SHARED = {"papo.stages.rows"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules of papo that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import in {path}"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")}
    return frozenset(name for name in found if name.split(".")[0] == "papo")


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def floor(name: str) -> int:
    parts = name.split(".")
    return FLOORS.get(parts[1], 4) if len(parts) > 1 else 0


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_from_below(name: str, path: Path) -> None:
    if name == "papo":
        return  # offers the names of `__all__`, from wherever they are, when they are asked for
    for imported in imports(path):
        assert floor(imported) <= floor(name), f"{name} imports {imported}, which is above it"
        room = name.split(".")[1] if "." in name else ""
        if floor(name) == 0 and floor(imported) == 0 and imported != "papo":
            assert imported.split(".")[1] in FLOOR_0_MAY.get(room, set()) | {room}, f"{name} imports {imported}"
        if room == "stages" and imported.startswith("papo.stages.") and name != "papo.stages":
            assert imported in SHARED, f"{name} imports {imported} sideways"


def test_nothing_in_the_package_imports_the_flows() -> None:
    for name, path in modules():
        assert "flows" not in path.read_text().split("import flows")[1:], name


@pytest.mark.parametrize(
    "module", ["papo", "papo.params", "papo.schemas", "papo.core", "papo.cli", "papo.pipeline", "papo.core.advantages"]
)
def test_the_base_imports_without_heavy_libraries(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {sorted(HEAVY)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def closure(name: str) -> set[str]:
    """Every module of engines/, stages/ and core/ that `name` reaches."""
    found: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        if module in found or floor(module) == 4 or "." not in module:
            continue
        path = PACKAGE.parent.joinpath(*module.split("."))
        if not (path / "__init__.py").is_file() and not path.with_suffix(".py").is_file():
            continue
        found.add(module)
        todo += imports(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
    return {module for module in found if module.split(".")[1] in ("core", "stages", "engines")}


# Which engine the pipeline hands to a stage; the stage itself knows only the Protocol.
ENGINES = {
    "prepare": ["papo.engines.sources", "papo.engines.verifiers.math_verify"],
    "warmstart": ["papo.engines.warmstart"],
    "rollout": ["papo.engines.samplers"],
    "score_orm": ["papo.engines.verifiers", "papo.engines.second_opinion"],
    "score_prm": ["papo.engines.judges"],
    "advantage": ["papo.engines.tokenizer"],
    "train": ["papo.engines.training"],
    "evaluate": ["papo.engines.samplers", "papo.engines.verifiers"],
    "report": [],
}
# What runs a program and ends it says nothing of what it gives.
NO_RESULT = {"papo.engines.protocols", "papo.core", "papo.engines", "papo.stages"} | {
    "papo.engines.watched",
    "papo.engines.watchdog",
}


@pytest.mark.parametrize("stage", list(CODE))
def test_the_code_of_a_stage_is_all_that_its_result_depends_on(stage: str) -> None:
    named = {PACKAGE / path for path in CODE[stage]}
    assert all(path.exists() for path in named), f"CODE of {stage} names a file that is not there"
    for module in set().union(*(closure(start) for start in [f"papo.stages.{stage}", *ENGINES[stage]])) - NO_RESULT:
        path = PACKAGE.parent.joinpath(*module.split("."))
        path = path if path.is_dir() else path.with_suffix(".py")
        assert named & {path, *path.parents}, f"{module} is missing in CODE of {stage}"
