"""A judge that is wrong, or silent, as often as it is told to: how much noise of a judge does training bear?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from papo.engines.protocols import Judge, JudgeItem, Judgement, Progress
from papo.params import NoiseParams


class NoisyJudge:
    """The verdicts of another judge, some of which are turned around or lost. A test bench, like the judges of the embedded world.

    A verdict that is turned around is 1 - score; one of 0.5 becomes 0 or 1. One that is lost is a call that failed. Which ones is drawn
    by problem and response, so that one text has one verdict, whenever and wherever it is asked for.
    """

    apart = True

    def __init__(self, judge: Judge, noise: NoiseParams) -> None:
        self._judge, self._noise = judge, noise
        self.name, self.digest = judge.name, judge.digest
        self.rubric = f"{judge.rubric}, flipped {noise.flipped:g}, missing {noise.missing:g}"

    def check(self) -> None:
        self._judge.check()

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        """One judgement an item, in order."""
        found = self._judge.judge(items, progress)
        return [self._disturbed(item, one) for item, one in zip(items, found, strict=True)]

    def metrics(self, not_asked: int) -> dict[str, float]:
        return self._judge.metrics(not_asked)

    def versions(self) -> dict[str, str]:
        return self._judge.versions()

    def _disturbed(self, item: JudgeItem, one: Judgement) -> Judgement:
        if one.score is None:
            return one
        digest = hashlib.sha256(f"{item.problem}\0{item.response}".encode()).digest()
        lost, turned, half = (int.from_bytes(digest[at : at + 8], "big") / 2**64 for at in (0, 8, 16))
        if lost < self._noise.missing:
            return Judgement(None, "error", "noise of the test bench: this verdict is lost")
        if turned >= self._noise.flipped:
            return one
        score = float(half < 0.5) if one.score == 0.5 else 1.0 - one.score
        wrong = None if one.wrong_steps is None else [1.0 - step for step in one.wrong_steps]
        reason = f"noise of the test bench: turned around from {one.score:g} ({one.reason})"
        return replace(one, score=score, votes=[score], wrong_steps=wrong, reason=reason)
