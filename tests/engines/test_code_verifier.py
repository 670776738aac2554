"""Programs as outcomes: what is taken from a completion, verdicts, routing by kind, HumanEval."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papo.core.code import MAX_CODE_CHARS, extract_code
from papo.engines.protocols import Progress, Verdict, VerifyItem
from papo.engines.sandbox import Program, Ran, Sandbox
from papo.engines.verifiers import make_verifier
from papo.engines.verifiers.by_kind import VerifierByKind
from papo.engines.verifiers.code import CodeVerifier
from papo.errors import DataError, SetupError
from papo.params import SandboxParams, ScoreOrmParams
from papo.schemas import Grading

HUMANEVAL = Path(__file__).parents[2].parent / "shared" / "data" / "humaneval.jsonl.gz"
PREFIX = "from math import pi\n\n\ndef double(x):\n    '''Twice x.'''\n"
TESTS = "def check(candidate):\n    assert candidate(2) == 4\n"
CODE = Grading(kind="code", entry_point="double", prefix=PREFIX)


class Scripted(Sandbox):
    """Finds what a program says in its first line, and keeps what it ran; "broken" is a sandbox that fails."""

    def __init__(self, *, usable: bool = True) -> None:
        super().__init__()
        self.usable, self.checks, self.programs = usable, 0, list[Program]()

    def check(self) -> None:
        self.checks += 1
        if not self.usable:
            raise SetupError("bwrap is not installed", fix="apt install bubblewrap")

    def run_many(self, programs: Sequence[Program], workers: int) -> Generator[Ran | None, None, None]:
        for program in programs:
            self.programs.append(program)
            verdict = program.code.strip().splitlines()[0].strip("# ")
            yield None if verdict == "broken" else Ran(verdict, "", "", 0.1)

    def versions(self) -> dict[str, str]:
        return {"bubblewrap": "1"}


def items(*completions: str, gold: str = TESTS, grading: Grading = Grading(kind="code")) -> list[VerifyItem]:
    return [VerifyItem(gold, completion, grading) for completion in completions]


# ---- what is taken from a completion ----


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("    return 2 * x\n", "    return 2 * x\n"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("```python\nx = 1\n```\nBetter:\n```py\nx = 2\ny = 3\n```", "x = 2\ny = 3"),
        ("```Python3\nx = 1\n```\nIt prints:\n```\n1\n```\n```text\n1\n```", "x = 1"),
        ("```\nx = 1\n```\nor\n```\nx = 2\n```", "x = 2"),
        ("```js\nlet x\n```", "```js\nlet x\n```"),
        ("```python\nx = 1\n```\n```python\nx = 2", "x = 2"),
        ("``` python title=a.py\r\nx = 1\r\n```\r\n", "x = 1\r"),
        ("  ```python\n  x = 1\n  ```", "  x = 1"),
        ("```python\n```", None),
        ("```python\n\n```\n```python", None),
        ("", None),
        (" \n\t", None),
        ("x" * MAX_CODE_CHARS, "x" * MAX_CODE_CHARS),
        ("x" * (MAX_CODE_CHARS + 1), None),
        ("a `x` and ```y``` inline", "a `x` and ```y``` inline"),
    ],
)
def test_the_last_block_of_python_is_the_code(completion: str, code: str | None) -> None:
    assert extract_code(completion) == code


@given(st.text(alphabet="`python \nx=1", max_size=60))
def test_any_text_gives_a_part_of_it_or_nothing(completion: str) -> None:
    code = extract_code(completion)
    assert code is None or (code.strip() and code in completion)


FENCE = "```python\n{}\n```"


@pytest.mark.parametrize(
    ("completion", "grading", "program"),
    [
        ("    return 2 * x", CODE, PREFIX + "    return 2 * x"),
        (FENCE.format("    return 2 * x"), CODE, PREFIX + "    return 2 * x"),
        (FENCE.format("def double(x):\n    return 2 * x"), CODE, "from math import pi\n\n\ndef double(x):\n    return 2 * x"),
        ("    return doubled(x)\n\ndef doubled(x): ...", CODE, PREFIX + "    return doubled(x)\n\ndef doubled(x): ..."),
        ("    def double(y): ...\n    return 1", CODE, PREFIX + "    def double(y): ...\n    return 1"),
        ("x = 1", Grading(kind="code", prefix="y = 2\n"), "y = 2\nx = 1"),
        ("def f(): ...", Grading(kind="code", entry_point="f", prefix="import re\n"), "def f(): ..."),
        ("x = 1", Grading(kind="code"), "x = 1"),
    ],
)  # fmt: skip
def test_what_only_goes_on_gets_its_prefix_and_a_whole_function_what_stands_before(
    completion: str, grading: Grading, program: str
) -> None:
    sandbox = Scripted()
    CodeVerifier(sandbox).verify(items(completion, grading=grading), lambda _: None)
    assert sandbox.programs == [Program(program, TESTS, grading.entry_point)]


# ---- verdicts ----


def test_verdicts_and_what_became_of_the_program() -> None:
    completions = ["# passed", "# failed", "# timeout", "# memory", "# killed", "# blocked", "# broken", "  "]
    assert CodeVerifier(Scripted()).verify(items(*completions), lambda _: None) == [
        Verdict(1.0, "# passed", "ok", "passed"),
        *[Verdict(0.0, f"# {name}", "ok", name) for name in ("failed", "timeout", "memory", "killed", "blocked")],
        Verdict(None, "# broken", "error"),
        Verdict(0.0, None, "no_answer"),
    ]


def test_a_problem_without_tests_has_no_verdict() -> None:
    assert CodeVerifier(Scripted()).verify(items("# passed", "", gold=" \n"), lambda _: None) == [
        Verdict(None, "# passed", "unparsable_gold"),
        Verdict(None, None, "unparsable_gold"),
    ]


def test_each_distinct_program_runs_once_and_all_are_counted() -> None:
    sandbox, done = Scripted(), list[int]()
    asked = items("# passed", "", "# failed", FENCE.format("# passed"), "# passed") + items("# passed", gold="pass")
    verdicts = CodeVerifier(sandbox).verify(asked, done.append)
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert [(program.code, program.tests) for program in sandbox.programs] == [
        ("# passed", TESTS), ("# failed", TESTS), ("# passed", "pass"),
    ]  # fmt: skip
    assert done == [1, 3, 1, 1]


def test_the_sandbox_is_looked_for_once_and_only_for_programs() -> None:
    sandbox = Scripted(usable=False)
    verifier = CodeVerifier(sandbox)
    assert verifier.verify([], lambda _: None) == []
    assert verifier.verify(items(""), lambda _: None) == [Verdict(0.0, None, "no_answer")]
    assert (sandbox.checks, verifier.versions()) == (0, {})
    with pytest.raises(SetupError, match="bwrap"):
        verifier.verify(items("# passed"), lambda _: None)
    sandbox.usable = True
    for _ in range(3):
        verifier.verify(items("# passed"), lambda _: None)
    assert (sandbox.checks, verifier.versions()) == (2, {"bubblewrap": "1"})


# ---- by kind ----


class Echo:
    """Finds everything right, with its own name as what it extracted."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, list[list[str]]()

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        self.asked.append([item.completion for item in items])
        progress(len(items))
        return [Verdict(1.0, f"{self.name} {item.completion}", "ok") for item in items]

    def versions(self) -> dict[str, str]:
        return {self.name: "1"}


def mixed(*kinds: Any) -> list[VerifyItem]:
    return [VerifyItem("gold", str(row), Grading(kind=kind)) for row, kind in enumerate(kinds)]


def test_each_kind_goes_to_its_verifier_in_order() -> None:
    maths, code, done = Echo("maths"), Echo("code"), list[int]()
    verifier = VerifierByKind({"code": code, "math": maths})
    verdicts = verifier.verify(mixed("math", "code", "math", "math", "code"), done.append)
    assert [verdict.extracted for verdict in verdicts] == ["maths 0", "code 1", "maths 2", "maths 3", "code 4"]
    assert (code.asked, maths.asked, done) == ([["1", "4"]], [["0", "2", "3"]], [2, 3])
    assert verifier.versions() == {"code": "1", "maths": "1"}


def test_a_kind_that_does_not_occur_is_not_asked() -> None:
    maths, code = Echo("maths"), Echo("code")
    verifier = VerifierByKind({"code": code, "math": maths})
    assert verifier.verify(mixed("math"), lambda _: None)
    assert verifier.verify([], lambda _: None) == []
    assert code.asked == []


def test_a_kind_without_a_verifier_is_named_before_anything_runs() -> None:
    maths = Echo("maths")
    with pytest.raises(DataError, match="of the kind choice, code") as caught:
        VerifierByKind({"math": maths}).verify(mixed("math", "code", "choice"), lambda _: None)
    assert "math" in caught.value.fix
    assert maths.asked == []


def test_mathematics_needs_no_sandbox_and_code_is_refused_without_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    verifier = make_verifier(ScoreOrmParams())
    sum_ = VerifyItem("6", "\\boxed{6}")
    letter = VerifyItem("B", "\\boxed{B}", Grading(kind="choice"))
    assert [verdict.score for verdict in verifier.verify([sum_, letter], lambda _: None)] == [1.0, 1.0]
    assert "bubblewrap" not in verifier.versions()
    with pytest.raises(SetupError, match="bwrap is not installed"):
        verifier.verify([sum_, *items("x = 1")], lambda _: None)


# ---- in the sandbox ----


@pytest.fixture(scope="module")
def verifier() -> CodeVerifier:
    sandbox = Sandbox(SandboxParams(wall_s=10.0))
    try:
        sandbox.check()
    except SetupError as error:
        pytest.skip(f"no sandbox here: {error}")
    return CodeVerifier(sandbox, workers=2)


def test_programs_run(verifier: CodeVerifier) -> None:
    right, wrong, early = "    return 2 * x", "    return x", "    import os; os._exit(0)"
    verdicts = verifier.verify(items(right, wrong, early, grading=CODE), lambda _: None)
    assert [(verdict.score, verdict.detail) for verdict in verdicts] == [
        (1.0, "passed"),
        (0.0, "failed"),
        (0.0, "failed"),
    ]
    plain = verifier.verify(items("double = lambda x: 2 * x", gold="assert double(2) == 4\n"), lambda _: None)
    assert plain == [Verdict(1.0, "double = lambda x: 2 * x", "ok", "passed")]


@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="HumanEval is not beside this checkout")
def test_every_canonical_solution_of_humaneval_passes_and_an_empty_one_fails(verifier: CodeVerifier) -> None:
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    gradings = [Grading(kind="code", entry_point=row["entry_point"], prefix=row["prompt"]) for row in rows]
    solutions = [
        VerifyItem(row["test"], row["canonical_solution"], how) for row, how in zip(rows, gradings, strict=True)
    ]
    whole = [
        VerifyItem(row["test"], f"Here:\n{FENCE.format(row['prompt'] + row['canonical_solution'])}\nDone.", how)
        for row, how in zip(rows, gradings, strict=True)
    ]
    empty = [VerifyItem(row["test"], "    return None\n", how) for row, how in zip(rows, gradings, strict=True)]
    found = verifier.verify([*solutions, *whole, *empty], lambda _: None)
    counts = Counter((number // 164, verdict.score, verdict.detail) for number, verdict in enumerate(found))
    assert counts == {(0, 1.0, "passed"): 164, (1, 1.0, "passed"): 164, (2, 0.0, "failed"): 164}
