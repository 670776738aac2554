"""A judge that reads one response at a time, here, without asking anybody."""

from __future__ import annotations

from collections.abc import Sequence

from papo.engines.protocols import JudgeItem, Judgement, Progress


class EachItem:
    """Implements `Judge.judge` for those who say what one response is worth."""

    name: str
    rubric: str
    digest = ""
    apart = True

    def check(self) -> None:
        """Nothing is needed."""

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        """One judgement an item, in order; those that are not `ok` are `unparsable`: the problem is none that this judge reads."""
        judgements = []
        for item in items:
            judgements.append(self._judge(item))
            progress(1)
        return judgements

    def metrics(self, not_asked: int) -> dict[str, float]:
        return {}

    def versions(self) -> dict[str, str]:
        """None: the rubric carries the version."""
        return {}

    def _judge(self, item: JudgeItem) -> Judgement:
        raise NotImplementedError
