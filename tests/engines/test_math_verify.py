"""The mathematical verifier: verdicts, killable children, hostile answers, agreement with a public grader's tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from multiprocessing import active_children
from pathlib import Path

import pytest

from papo.core.answers import MAX_ANSWER_CHARS, MAX_DIGITS
from papo.engines.protocols import Verdict, VerifyItem
from papo.engines.verifiers import make_verifier
from papo.engines.verifiers.math_verify import (
    MAX_GOLD_CHARS,
    MathVerifier,
    Pair,
    compare,
    in_children,
    unreadable_golds,
)
from papo.params import ScoreOrmParams
from papo.schemas import Grading

ROOT = Path(__file__).parents[2]


def verified(*items: tuple[str, str], timeout_s: float = 20.0, workers: int = 1) -> list[Verdict]:
    return MathVerifier(timeout_s=timeout_s, workers=workers).verify(
        [VerifyItem(*item) for item in items], lambda _: None
    )


def box(answer: str) -> str:
    return f"so \\boxed{{{answer}}}"


class Recorder:
    """A checker that finds everything wrong, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Pair] = []

    def __call__(self, pairs: Sequence[Pair]) -> Generator[tuple[Pair, str], None, None]:
        for pair in pairs:
            self.asked.append(pair)
            yield pair, "wrong"


# ---- without children ----


@pytest.mark.parametrize(
    ("gold", "completion", "verdict"),
    [
        ("6", "3+5=8\n8-2=6\n\\boxed{6}", Verdict(1.0, "6", "ok")),
        ("6", "\\boxed{7}", Verdict(0.0, "7", "ok")),
        ("6", "the answer is 6", Verdict(0.0, None, "no_answer")),
        ("6", "\\boxed{6} or \\boxed{7}", Verdict(0.0, "7", "ok")),
        ("6", "\\boxed{7} or \\boxed{6", Verdict(0.0, None, "no_answer")),
        ("6", "\\boxed{ }", Verdict(0.0, " ", "no_answer")),
        ("6", "\\boxed{3+5-2}", Verdict(0.0, "3+5-2", "ok")),
        ("6", "\\boxed{6=?}", Verdict(0.0, "6=?", "ok")),
        ("x+1", "\\boxed{x + 1}", Verdict(1.0, "x + 1", "ok")),
        ("6", "\\boxed{" + "6" * (MAX_DIGITS + 1) + "}", Verdict(0.0, "6" * (MAX_DIGITS + 1), "ok")),
        ("6", "\\boxed{" + "6" * (MAX_ANSWER_CHARS + 1) + "}", Verdict(0.0, None, "no_answer")),
        ("6", "\\boxed{" + "6" * 10**6 + "}", Verdict(0.0, None, "no_answer")),
        ("6", "\\boxed{1" + " " * 10_000 + "2}", Verdict(0.0, None, "no_answer")),
        ("6", "\\boxed{\u200f6\x00}", Verdict(1.0, "\u200f6\x00", "ok")),
        ("", "\\boxed{6}", Verdict(None, "6", "unparsable_gold")),
        (" ", "no box", Verdict(None, None, "unparsable_gold")),
        ("x" * (MAX_GOLD_CHARS + 1), "\\boxed{6}", Verdict(None, "6", "unparsable_gold")),
    ],
)
def test_settled_without_a_child(gold: str, completion: str, verdict: Verdict) -> None:
    recorder = Recorder()
    assert MathVerifier(checker=recorder).verify([VerifyItem(gold, completion)], lambda _: None) == [verdict]
    assert recorder.asked == []


def test_each_distinct_pair_is_judged_once_and_progress_counts_all_items() -> None:
    recorder, done = Recorder(), list[int]()
    items = [("x+1", box("1+x")), ("5", box("5")), ("x+1", box("y")), ("x+1", box("1+x")), ("x+2", box("1+x"))]
    verdicts = MathVerifier(checker=recorder).verify([VerifyItem(*item) for item in items], done.append)
    assert recorder.asked == [("x+1", "1+x", Grading()), ("x+1", "y", Grading()), ("x+2", "1+x", Grading())]
    assert [verdict.extracted for verdict in verdicts] == ["1+x", "5", "y", "1+x", "1+x"]
    assert [verdict.score for verdict in verdicts] == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert done == [1, 2, 1, 1]


def test_no_items() -> None:
    assert verified() == []


def test_the_factory_passes_the_params_on_and_versions_are_told() -> None:
    verifier = make_verifier(ScoreOrmParams(timeout_s=1.5, workers=2))
    assert verifier.versions()["math-verify"]
    assert set(verifier.versions()) == {"math-verify", "latex2sympy2_extended", "sympy"}


def test_ten_thousand_integers_need_neither_a_child_nor_a_second_second() -> None:
    start = time.process_time()
    verdicts = verified(*[(str(number % 90), f"1+1=2\n\\boxed{{{number % 70}}}") for number in range(10_000)])
    assert time.process_time() - start < 2.0
    assert active_children() == []
    assert sum(verdict.score or 0.0 for verdict in verdicts) > 1_000


# ---- with children ----

COMPARED = [
    (r"\frac{1}{2}", "0.5", 1.0),
    ("0.5", "0.51", 0.0),
    (r"2\sqrt{2}", r"\sqrt{8}", 1.0),
    ("(x+1)^2", "x^2+2x+1", 1.0),
    ("(x+1)^2", "x^2+2x", 0.0),
    ("6", "x=6", 1.0),
    ("6", r"6\text{ cm}", 1.0),
    ("6", r"\approx 6", 0.0),
    ("6", "4 or 6", 0.0),
    ("6", r"\text{either } 4 \text{ or } 6", 0.0),
    ("6", "$4$, $6$", 0.0),
    (r"\{4,6\}", r"6,4", 1.0),
    ("(4,6)", "(6,4)", 0.0),
    ("32349", "32, 349", 0.0),
    ("28%", r"28\%", 1.0),
    ("0.28", r"28\%", 1.0),
    ("$x \\in [-2,7]$", r"[-2,7]", 1.0),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 1.0),
    (r"\text{(C)}", "C", 1.0),
    (r"\text{(C)}", "D", 0.0),
    ("7", "\u202e\\frac{14}{2}\x00", 1.0),
    ("7", "\\frac{14}{2}\ud800", 1.0),  # math-verify passes over a sign that it does not know
    ("7", r"\frac{", 0.0),
    ("7", "\u0667 \U0001f600", 0.0),
]


def test_verdicts_of_algebra() -> None:
    verdicts = verified(*[(gold, box(answer)) for gold, answer, _ in COMPARED])
    found = [(gold, answer, verdict.score) for (gold, answer, _), verdict in zip(COMPARED, verdicts, strict=True)]
    # \frac{ never closes its box; the rest is `ok`.
    assert found == COMPARED
    assert {verdict.status for verdict in verdicts} == {"ok", "no_answer"}
    assert active_children() == []


GRADED = [
    (r"\frac{1}{2}, \sqrt{8}", r"2\sqrt{2}, 0.5", Grading(several=True), 1.0),
    (r"\frac{1}{2}, \sqrt{8}", r"2\sqrt{2}", Grading(several=True), 0.0),
    (r"\frac{1}{2}, \sqrt{8}", r"2\sqrt{2}, 0.5", Grading(several=True, ordered=True), 0.0),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, \sqrt{19}+1", Grading(several=True), 1.0),
    (r"(\sqrt{4},x), (1,2x)", r"(1,x+x), (2,x)", Grading(several=True), 1.0),
    (r"(\sqrt{4},x), (1,2x)", r"(x+x,1), (2,x)", Grading(several=True), 0.0),
    (r"f(n)=n, g(n)=1", r"g(n)=1, f(n)=n", Grading(several=True), 1.0),
    (r"f(n)=n, g(n)=1", r"g(n)=n, f(n)=1", Grading(several=True), 0.0),
    (r"\frac{600}{7}", r"\frac{1200}{14}\text{ km/h}", Grading(unit="km/h"), 1.0),
    (r"\frac{600}{7}", r"\frac{1200}{14}\text{ m/s}", Grading(unit="km/h"), 0.0),
    (r"10\sqrt{2}\text{ cm}", r"\sqrt{200}", Grading(unit="cm"), 1.0),
    (r"\sqrt{2}", "1.41", Grading(tolerance=0.01), 1.0),
    (r"\sqrt{2}", "1.40", Grading(tolerance=0.01), 0.0),
    (r"(\sqrt{2},\frac{8}{3}]", "(1.41,2.67]", Grading(tolerance=0.01), 1.0),
    (r"(\sqrt{2},\frac{8}{3}]", "[1.41,2.67]", Grading(tolerance=0.01), 0.0),
    (
        r"\begin{pmatrix}\frac{1}{3}\\2\end{pmatrix}",
        r"\begin{pmatrix}0.33\\2\end{pmatrix}",
        Grading(tolerance=0.01),
        1.0,
    ),
    (
        r"\begin{pmatrix}\frac{1}{3}\\2\end{pmatrix}",
        r"\begin{pmatrix}0.35\\2\end{pmatrix}",
        Grading(tolerance=0.01),
        0.0,
    ),
    ("x", "y", Grading(tolerance=0.01), 0.0),
]


def test_verdicts_by_grading() -> None:
    items = [VerifyItem(gold, box(answer), how) for gold, answer, how, _ in GRADED]
    verdicts = MathVerifier(timeout_s=20.0).verify(items, lambda _: None)
    found = [(*row[:3], verdict.score) for row, verdict in zip(GRADED, verdicts, strict=True)]
    assert found == GRADED


def test_a_stated_answer_counts_only_where_the_grading_says_so() -> None:
    items = [
        VerifyItem("5", "The answer is 5."),
        VerifyItem("5", "The answer is 5.", Grading(extraction="answer_is")),
        VerifyItem("5", "The answer is 5, or \\boxed{6}", Grading(extraction="answer_is")),
    ]
    verdicts = MathVerifier(checker=Recorder()).verify(items, lambda _: None)
    assert verdicts == [Verdict(0.0, None, "no_answer"), Verdict(1.0, "5", "ok"), Verdict(0.0, "6", "ok")]


def test_the_same_pair_is_judged_once_for_each_grading() -> None:
    recorder, several = Recorder(), Grading(several=True)
    items = [VerifyItem("x, y", box("y, 1x"), how) for how in (Grading(), several, several)]
    MathVerifier(checker=recorder).verify(items, lambda _: None)
    assert [how for _, _, how in recorder.asked] == [Grading(), several]


def test_a_wrong_answer_to_a_named_gold_answer_is_wrong_and_not_missing() -> None:
    assert verified((r"$m_{\max }=n^{2}-n-1$", box("n"))) == [Verdict(0.0, "n", "ok")]


def test_a_gold_answer_that_cannot_be_read_is_missing_unless_it_is_repeated() -> None:
    gold = r"\frac{1}{"
    assert verified((gold, box("5")), (gold, box("x"))) == [
        Verdict(None, "5", "unparsable_gold"),
        Verdict(None, "x", "unparsable_gold"),
    ]


HOSTILE = [
    "9^{9^{9^9}}",
    "1000000!",
    "((9!)!)!",
    "(x+y+z+w)^{200}",
    "(" * 400 + "7" + ")" * 400,
    "\\frac{1}{" * 90 + "7" + "}" * 90,
    "\\sqrt{" * 120 + "7" + "}" * 120,
    "*".join(f"(x+{number % 10})" for number in range(150)),
    "1 " * 490 + "x",
    "\\int_0^{10^9} x^{x^x} dx",
    "\\sum_{i=1}^{10^{12}} \\frac{1}{i!}",
    "10^{10^{10}} \\bmod 7",
    "7" * 10**7,
    "1" + " " * 10_000 + "2",
    "\x00" * 900,
    "\u202e\u2067" * 400 + "x^{999}",
    "\ud800" * 900,
    "\\binom{10^9}{10^8}",
    ", ".join(f"\\sqrt{{{number}}}" for number in range(49)),
]


def test_hostile_answers_are_bounded_and_never_right() -> None:
    start = time.perf_counter()
    items = [(gold, box(answer)) for answer in HOSTILE for gold in ("8", "x+8")]
    verdicts = verified(*items, timeout_s=0.5, workers=2)
    elapsed = time.perf_counter() - start
    assert elapsed < 5.0 + len(items) * 2.0
    found = {(verdict.score, verdict.status) for verdict in verdicts}
    assert found <= {(0.0, "ok"), (0.0, "no_answer"), (None, "timeout"), (None, "error")}
    assert verdicts[0].status == "ok"  # by its looks, without a child
    assert verdicts[items.index(("x+8", box("(x+y+z+w)^{200}")))].status == "timeout"
    assert active_children() == []


def test_a_killed_child_costs_only_its_own_pair() -> None:
    powers = [("x+8", box(f"(x+y+z+w+{number})^{{200}}")) for number in range(8, 11)]
    rights = [(f"{number}x", box(f"x*{number}")) for number in range(2, 12)]
    items = [powers[0], *rights[:4], powers[1], *rights[4:], powers[2]]
    statuses = [verdict.status for verdict in verified(*items, timeout_s=2.0)]
    assert statuses == ["timeout", *["ok"] * 4, "timeout", *["ok"] * 6, "timeout"]


def _misbehave(gold: str, answer: str, grading: Grading) -> str:
    if answer == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "raise":
        raise ValueError(gold)
    if answer == "eat":
        return str(len(bytearray(4 * 2**30)))
    if answer == "sleep":
        time.sleep(60)
    return "right"


def test_what_can_happen_to_a_child_becomes_an_outcome() -> None:
    answers = ["fine", "die", "fine again", "raise", "eat", "sleep", "fine at last"]
    outcomes = dict(in_children(_misbehave, [("g", answer, Grading()) for answer in answers], timeout_s=1.0, workers=1))
    expected = ["right", "error", "right", "error", "error", "timeout", "right"]
    assert outcomes == {("g", answer, Grading()): one for answer, one in zip(answers, expected, strict=True)}


def test_a_pair_that_takes_long_does_not_hold_up_the_other_children() -> None:
    pairs = [("g", answer, Grading()) for answer in ("sleep", *map(str, range(40)))]
    checked = in_children(_misbehave, pairs, timeout_s=2.0, workers=2)
    assert [outcome for _, outcome in checked] == [*["right"] * 40, "timeout"]


def test_children_that_cannot_live_stop_the_stage(tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken installation')\n")
    code = (
        "from papo.engines.protocols import VerifyItem\n"
        "from papo.engines.verifiers.math_verify import MathVerifier\n"
        "MathVerifier().verify([VerifyItem('x+1', '\\\\boxed{1+x}')], print)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "StageError: the child processes that compare answers keep dying" in result.stderr


def test_closing_early_ends_the_children() -> None:
    checked = in_children(_misbehave, [("g", "fine", Grading()), ("g", "sleep", Grading())], timeout_s=60.0, workers=2)
    assert next(checked) == (("g", "fine", Grading()), "right")
    assert active_children()
    start = time.perf_counter()
    checked.close()
    assert time.perf_counter() - start < 5.0
    assert active_children() == []


BUSY = """
from papo.engines.protocols import VerifyItem
from papo.engines.verifiers.math_verify import MathVerifier, unreadable_golds

def told(count):
    print(count, flush=True)

items = [VerifyItem("2x", "\\\\boxed{{x*2}}"), VerifyItem("x+8", "\\\\boxed{{(x+y+z+w)^{{200}}}}")]
MathVerifier(timeout_s={timeout_s}).verify(items, told)
"""


def _busy_process(timeout_s: float) -> subprocess.Popen[str]:
    """A process that has compared one pair and is at the second, which never ends; in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY.format(timeout_s=timeout_s)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["0", "1"]
    time.sleep(0.3)
    return process


def _group_ends(group: int, within_s: float) -> bool:
    limit = time.monotonic() + within_s
    while time.monotonic() < limit:
        if not any(_group_of(entry) == group for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            return True
        time.sleep(0.1)
    return False


def _group_of(entry: Path) -> int | None:
    """Process group of a live process; None for one that has just gone, or is dead and not yet waited for."""
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[2])


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_ctrl_c_ends_parent_and_children() -> None:
    with _busy_process(timeout_s=300.0) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=15) != 0
        assert _group_ends(process.pid, within_s=10)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_child_whose_parent_was_killed_ends_by_its_cpu_limit() -> None:
    with _busy_process(timeout_s=1.0) as process:
        process.kill()
        process.wait(timeout=5)
        assert _group_ends(process.pid, within_s=30)


def test_compare_runs_in_this_process_too() -> None:
    assert compare("2x", "x+x", Grading()) == "right"
    assert compare("2x", "x", Grading()) == "wrong"


def test_gold_answers_that_cannot_be_read_are_found_once_each() -> None:
    golds = ["4", "\\frac{1}{2}", "x^2+1", "(1,2)", "", "1" * 20_000, "\\frac{", "4", "\\frac{", "2:3, 5"]
    assert unreadable_golds(golds, timeout_s=20.0) == {
        "": "unparsable_gold", "1" * 20_000: "unparsable_gold", "\\frac{": "unparsable_gold",
    }  # fmt: skip
    assert unreadable_golds(["1", "2.5", "-3/4"]) == {}  # no child is started for numbers
