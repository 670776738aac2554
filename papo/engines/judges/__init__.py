"""Judges: how good is the reasoning of a response?"""

from __future__ import annotations

from papo.engines.protocols import Judge
from papo.params import ScorePrmParams


def make_judge(params: ScorePrmParams) -> Judge:
    """The judge that `score_prm.judge` names."""
    from papo.engines.judges.steps import GullibleStepsJudge, StepsJudge

    if params.judge == "steps":
        return StepsJudge()
    if params.judge == "steps-gullible":
        return GullibleStepsJudge()
    if params.judge == "readability":
        from papo.engines.judges.readability import ReadabilityJudge

        return ReadabilityJudge()
    raise AssertionError(params.judge)
