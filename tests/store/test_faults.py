"""The points of faults: nothing while nobody watches, and one at everything in the package that writes, is dear or divides stages."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.matrix import points_of_code, shown_points
from faults.world import STAGES

import papo
from papo.pipeline import CODE
from papo.store import faults
from papo.store.faults import reached, watched, watching

PACKAGE = Path(papo.__file__).parent

# Calls that change the disk, by the last part of their name.
WRITING = {
    "write_text", "write_bytes", "write_table", "write_feather", "ParquetWriter", "rename", "mkdir", "makedirs", "rmtree", "unlink",
    "rmdir", "copytree", "copy", "copy2", "copyfile", "move", "link", "symlink", "symlink_to", "hardlink_to", "touch", "truncate", "fsync",
    "save_pretrained", "save_file", "save_model", "savefig", "savetxt", "savez", "save", "dump", "to_csv", "to_parquet",
    "TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "mkstemp", "connect", "FileLock",
}  # fmt: skip
# Methods of engines that take time or money, and what records a run.
DEAR = {
    "sample", "sample_shards", "verify", "judge", "fit", "train", "ask", "logprobs", "commit", "start", "stage", "finish"
}  # fmt: skip
ENGINES = {"engine", "sampler", "verifier", "recomputer", "second_opinion", "_verifier", "_judge", "_tracker", "_dvc"}
CALLERS = ("stages/", "ahead.py", "session.py", "pipeline.py")

# Functions that write without a point of their own, and why none is needed.
ELSEWHERE = {
    "engines/in_sandbox.py": "the process of a sandbox, whose disk is gone with it",
    "engines/serving.py": "logs of servers, from which nothing is read back",
    "engines/watched.py": "logs of servers, from which nothing is read back",
    "engines/training/launch.py": "the folder of the processes of one start, made anew by the next",
    "engines/training/jobs.py": "orders to the processes of one start, in that folder",
    "engines/tracking": "the journal of a record, no result: tests/test_track.py kills its deliveries anywhere",
    "engines/versioning.py:git_worktree": "a scratch folder that the next start does not look for",
    "engines/versioning.py:Dvc._copy": "for _bring of a reproduction",
    "lineage/reproduce.py:reproduce": "params.yaml of the reproduction, written anew by each start of it",
    "lineage/reproduce.py:_bring": "a copy whose digest is compared with the recorded one, and which is made again if it differs",
    "store/database.py:_connect": "opened for writing at the point of Database._prepare",
    "store/tables.py:_write": "into the new file of who calls it, which `replacing` puts in place",
    "store/verdict_rows.py": "into the new file of VerdictStore.export, which `replacing` puts in place",
    "engines/warmstart.py:SftWarmStarter.fit": "a scratch folder beside the points of what is kept",
}


class _Function(ast.NodeVisitor):
    """Calls by the function that they are in."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self.calls: dict[str, list[ast.Call]] = {}

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._within(node.name, node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._within(node.name, node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._within(node.name, node)

    def _within(self, name: str, node: ast.AST) -> None:
        self._names.append(name)
        self.generic_visit(node)
        self._names.pop()

    def visit_Call(self, node: ast.Call) -> None:
        self.calls.setdefault(".".join(self._names), []).append(node)
        self.generic_visit(node)


def functions() -> Iterator[tuple[str, str, list[ast.Call]]]:
    """File, function and its calls, of the whole package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        visitor = _Function()
        visitor.visit(ast.parse(path.read_text()))
        for name, calls in visitor.calls.items():
            yield path.relative_to(PACKAGE).as_posix(), name, calls


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def owner(call: ast.Call) -> str:
    """The last name before the dot."""
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    return value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", "")


def writes(call: ast.Call) -> bool:
    name, texts = (
        called(call),
        [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)],
    )
    if name == "open":
        return any(set(text) <= set("rwaxbt+") and set(text) & set("wax+") for text in texts)
    if name == "replace":  # Path.replace takes one argument, str.replace two, dataclasses.replace names
        return len(call.args) == 1 and not call.keywords
    if name == "copy":  # of shutil; arrays have one, too
        return owner(call) == "shutil"
    if name == "write_table":  # of pyarrow; papo's own goes by way of `replacing`
        return bool(owner(call))
    return name in WRITING


def dear(call: ast.Call) -> bool:
    return called(call) in DEAR and owner(call) in ENGINES


def points_of(calls: list[ast.Call]) -> list[str]:
    return [ast.literal_eval(call.args[0]) for call in calls if called(call) == "reached" and owner(call) == ""]


def excused(file: str, function: str) -> bool:
    return any(
        file.startswith(name.partition(":")[0]) and name.partition(":")[2] in ("", function) for name in ELSEWHERE
    )


@pytest.mark.parametrize("kind", [writes, dear], ids=["writes", "engines"])
def test_everything_that_writes_or_is_dear_has_a_point(kind: object) -> None:
    assert callable(kind)
    found = list(functions())
    # What is written inside `with replacing(...)` has the points of that.
    missing = [
        f"{file}: {name} calls {called(call)} in line {call.lineno}"
        for file, name, calls in found
        for call in calls
        if kind(call)
        and (kind is writes or file.startswith(CALLERS))
        and not points_of(calls)
        and not any(called(other) == "replacing" for other in calls)
        and not excused(file, name)
    ]
    assert not missing, "\n".join(missing)
    assert sum(kind(call) for file, _, calls in found for call in calls if file.startswith((*CALLERS, "store/"))) > 10


def test_every_excuse_is_needed() -> None:
    for name in ELSEWHERE:
        file, _, function = name.partition(":")
        assert any(
            found.startswith(file) and function in ("", where) and any(map(writes, calls))
            for found, where, calls in functions()
        ), f"nothing writes in {name}"


def test_the_page_has_the_stages_and_points_of_the_code() -> None:
    page = (PACKAGE.parent / "docs/faults.md").read_text()
    points = {point for _, _, calls in functions() for point in points_of(calls)}
    assert shown_points(page) == (set(STAGES), points) == (set(CODE), points_of_code())


def test_nothing_in_the_package_watches() -> None:
    callers = [(file, name) for file, name, calls in functions() for call in calls if called(call) == "watching"]
    assert callers == []
    assert not watched()


def test_no_variable_of_the_environment_switches_it_on() -> None:
    tree = ast.parse(Path(faults.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "collections.abc", "contextlib", "pathlib"}
    environment = os.environ | dict.fromkeys(("PAPO_FAULT", "PAPO_FAULTS", "FAULT"), "kill")
    code = "import papo.pipeline, papo.session; from papo.store.faults import watched; print(watched())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_watcher_is_told_of_each_point_until_it_is_taken_away() -> None:
    told: list[tuple[str, Path | None, str]] = []
    reached("before")
    with watching(lambda point, path, detail: told.append((point, path, detail))):
        assert watched()
        reached("write", Path("x"))
        reached("sampled", detail="2 rows")
    reached("after")
    assert told == [("write", Path("x"), ""), ("sampled", None, "2 rows")]
    assert not watched()


def test_what_a_watcher_raises_is_raised_at_the_point_and_ends_with_it() -> None:
    def full(point: str, path: Path | None, detail: str) -> None:
        raise OSError(28, "full")

    with pytest.raises(OSError, match="full"), watching(full):
        reached("write")
    reached("write")


def test_a_point_that_nobody_watches_costs_less_than_a_microsecond() -> None:
    assert min(timeit.repeat(lambda: reached("write"), number=10_000, repeat=5)) / 10_000 < 1e-6
