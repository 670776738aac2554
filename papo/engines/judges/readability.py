"""A judge of programs: how well a person can read them, whether or not they pass their tests."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Sequence

from papo.core.code import Code, find_code, missing_prefix
from papo.core.credit import split_steps, token_steps
from papo.core.readability import KINDS, Flaw, defines, flaws, parse_program
from papo.engines.judges.each import EachItem
from papo.engines.protocols import JudgeItem, Judgement

_LINE_END = re.compile(r"\r\n|\r|\n")


class ReadabilityJudge(EachItem):
    """Reads the syntax tree of the last fenced block of Python, or of the whole response; nothing is run.

    1.0  no flaw
    0.5  flaws of one kind
    0.0  flaws of several kinds; or no program: no Python, nothing but words, or the function that is asked for is not there

    The kinds, as papo.core.readability defines them: names of one letter, lines of several statements and statements of several
    operations, idle code, names that hide others. What the problem itself gives (the head of a function to go on with) is not held
    against the response.

    A step is wrong if a flaw stands in it; all of them are where there is no program.
    """

    name = "readability"
    rubric = "readability/1"

    def versions(self) -> dict[str, str]:
        """The Python whose grammar is read."""
        return {"python": platform.python_version()}

    def _judge(self, item: JudgeItem) -> Judgement:
        if item.grading.kind != "code":
            reason = f"the {self.name} judge reads programs, and the problem is of the kind {item.grading.kind}"
            return Judgement(None, "unparsable", reason)
        code = find_code(item.response)
        found = _flaws(code, item) if code else "there is no program, or too long a one"
        if code is None or isinstance(found, str):
            return Judgement(0.0, "ok", str(found), votes=[0.0], wrong_steps=[1.0] * len(split_steps(item.response)))
        counts = Counter(flaw.kind for flaw in found)
        score = max(0.0, 1.0 - 0.5 * len(counts))
        return Judgement(
            score, "ok", _reason(found), votes=[score], wrong_steps=_wrong_steps(found, code, item.response)
        )


def _flaws(code: Code, item: JudgeItem) -> list[Flaw] | str:
    """The flaws, their lines counted from the first of the code; or why it is no program."""
    prefix = missing_prefix(code.text, item.grading.prefix, item.grading.entry_point)
    tree = parse_program(prefix + code.text)
    if tree is None:
        return "it is no Python, or nothing but words"
    if item.grading.entry_point and not defines(tree, item.grading.entry_point):
        return f"it does not define {item.grading.entry_point[:80]}"
    before = len(_LINE_END.findall(prefix))
    found = flaws(tree, item.grading.entry_point)
    return [flaw._replace(line=flaw.line - before) for flaw in found if flaw.line > before]


def _reason(found: Sequence[Flaw]) -> str:
    """The kinds with their number and the first of each."""
    parts = []
    for kind in KINDS:
        of_kind = [flaw for flaw in found if flaw.kind == kind]
        if of_kind:
            parts.append(f"{kind}: {len(of_kind)}, first in line {of_kind[0].line}: {of_kind[0].what[:80]}")
    return "; ".join(parts) if parts else "no flaw"


def _wrong_steps(found: Sequence[Flaw], code: Code, response: str) -> list[float]:
    """1.0 for each step of `split_steps` in which a line with a flaw begins, else 0.0."""
    steps = split_steps(response)
    lines = [code.start, *(code.start + end.end() for end in _LINE_END.finditer(code.text))]
    starts = sorted({lines[flaw.line - 1] for flaw in found if flaw.line <= len(lines)})
    wrong = [0.0] * len(steps)
    for number in token_steps(starts, steps).tolist():
        wrong[number] = 1.0
    return wrong
