"""Judges: how good is the reasoning of a response?"""

from __future__ import annotations

from pathlib import Path

from papo.engines.judges.model import Purpose
from papo.engines.protocols import Judge
from papo.params import ScorePrmParams
from papo.store.layout import Workspace
from papo.store.verdicts import default_store


def make_judge(params: ScorePrmParams, purpose: Purpose | None = None) -> Judge:
    """The judge that `score_prm.judge` names; `purpose`: what a paid one is asked for, and where its verdicts are stored.

    Raises:
        ParamsError: there is no such rubric, or it cannot be used.
    """
    from papo.engines.judges.noisy import NoisyJudge
    from papo.engines.judges.steps import GullibleStepsJudge, StepsJudge

    if params.noise is not None:
        return NoisyJudge(make_judge(params.model_copy(update={"noise": None})), params.noise)
    if params.judge == "steps":
        return StepsJudge()
    if params.judge == "steps-gullible":
        return GullibleStepsJudge()
    if params.judge == "readability":
        from papo.engines.judges.readability import ReadabilityJudge

        return ReadabilityJudge()
    if params.judge == "model":
        from papo.engines.judges.model import ModelJudge

        return ModelJudge(params, purpose or Purpose(store_of(params, Workspace(Path()))))
    raise AssertionError(params.judge)


def store_of(params: ScorePrmParams, workspace: Workspace) -> Path:
    """The store of verdicts that a judge uses."""
    return Path(params.store) if params.store is not None else default_store(workspace)
