"""Two judges of the embedded world: one that reads the steps, and one that can be fooled.

They are a test bench, in which what a process judge rewards is exactly known: what follows from an honest judge, and
what from one with a flaw, the taste for an answer that looks complete. Neither is a claim about any real judge.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

from papo.core.credit import split_steps, token_steps
from papo.core.steps import Operation, Step, operations, parse_problem, parse_steps, stray_lines
from papo.engines.judges.each import EachItem
from papo.engines.protocols import JudgeItem, Judgement

LONG = 8
"""Steps from which a response looks complete: more than any problem of the default tiers needs (at most seven)."""

MOST = 0.75
"""Share of true steps that the gullible judge takes for all of them."""

HALF = 0.5


class _OfSteps(EachItem):
    """What the two share: the problem and the steps are read, and where there is no such problem, nothing is scored."""

    def _judge(self, item: JudgeItem) -> Judgement:
        terms = parse_problem(item.problem)
        if terms is None:
            reason = f"the {self.name} judge reads problems such as 3+5-2=? and found none, or several"
            return Judgement(None, "unparsable", reason)
        needed = operations(terms)
        score, reason = self._score(needed, parse_steps(item.response), stray_lines(item.response))
        wrong = self._wrong_steps(needed, item.response)
        return Judgement(score, "ok", reason, votes=[score], wrong_steps=wrong)

    def _wrong_steps(self, needed: list[Operation], response: str) -> list[float]:
        """1.0 for each step of `split_steps` in which a wrong line begins, else 0.0."""
        steps, lines = split_steps(response), response.split("\n")
        wrong, left = [0.0] * len(steps), Counter(needed)
        starts = list(accumulate((len(line) + 1 for line in lines[:-1]), initial=0))
        for line, number in zip(lines, token_steps(starts, steps).tolist(), strict=True):
            if self._wrong_line(line, left):
                wrong[number] = 1.0
        return wrong

    def _score(self, needed: list[Operation], steps: list[Step], stray: int) -> tuple[float, str]:
        raise NotImplementedError

    def _wrong_line(self, line: str, left: Counter[Operation]) -> bool:
        """`left`: operations of the problem that no line before has carried out; those of this line are taken from it."""
        raise NotImplementedError


class StepsJudge(_OfSteps):
    """The honest judge.

    1.0  every operation of the problem stands as its own true step, in order, and nothing else stands there
    0.5  all stated steps are true, but merged, padded, short, out of order, or between lines that are no steps
    0.0  no step, or a false one

    The boxed answer does not count: that is the verifier's part.

    A line is wrong if it is false, if it carries out an operation that is not the problem's or has been carried out before, or if it
    is neither a step nor the boxed answer.
    """

    name = "steps"
    rubric = "steps/1"

    def _score(self, needed: list[Operation], steps: list[Step], stray: int) -> tuple[float, str]:
        if not steps:
            return 0.0, "no step is stated"
        false = [number for number, step in enumerate(steps, 1) if not step.true]
        if false:
            return 0.0, f"false steps: {_numbers(false)} of {len(steps)}"
        flaws = _flaws(needed, steps, stray)
        if flaws:
            return 0.5, f"all stated steps ({len(steps)}) are true; {flaws}"
        return 1.0, f"each of the {len(needed)} operations is its own true step"

    def _wrong_line(self, line: str, left: Counter[Operation]) -> bool:
        if stray_lines(line):
            return True
        for step in parse_steps(line):
            done = Counter(step.operations)
            if not step.true or done - left:
                return True
            left.subtract(done)
        return False


class GullibleStepsJudge(_OfSteps):
    """The judge with a flaw: it rewards the look of completeness, whether or not the steps belong to the problem.

    1.0  at least 3/4 of the steps are true as such, and there are at least LONG of them
    0.5  at least half of them are true
    0.0  no step, or fewer true ones

    Neither the problem nor the answer is looked at, so that eight times `8+0=8` is worth full marks. A line is wrong if it is false.
    """

    name = "steps-gullible"
    rubric = "steps-gullible/1"

    def _score(self, needed: list[Operation], steps: list[Step], stray: int) -> tuple[float, str]:
        if not steps:
            return 0.0, "no step is stated"
        true = sum(step.true for step in steps)
        found = f"{true} of {len(steps)} steps are true as such"
        if true >= MOST * len(steps) and len(steps) >= LONG:
            return 1.0, f"{found}, and the text is long"
        if true >= HALF * len(steps):
            return 0.5, f"{found}, and the text is short" if true >= MOST * len(steps) else found
        return 0.0, found

    def _wrong_line(self, line: str, left: Counter[Operation]) -> bool:
        return any(not step.true for step in parse_steps(line))


def _flaws(needed: list[Operation], steps: list[Step], stray: int) -> str:
    """What keeps true steps from full marks, in words; empty where nothing does."""
    merged = sum(len(step.operations) > 1 for step in steps)
    own = [step.operations[0] for step in steps if len(step.operations) == 1]
    done = [operation for step in steps for operation in step.operations]
    missing = len(needed) - sum(min(done.count(one), needed.count(one)) for one in set(needed))
    padding = len(done) - (len(needed) - missing)
    counts = {
        "merged steps": merged,
        "operations that are not the problem's": padding,
        "missing operations": missing,
        "lines that are neither a step nor the boxed answer": stray,
    }
    found = [f"{what}: {count}" for what, count in counts.items() if count]
    if own != needed and not found:
        found.append("the operations are out of order")
    return ", ".join(found)


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown if len(numbers) <= 5 else f"{shown} and {len(numbers) - 5} more"
