"""Verifiers: is the final answer of a completion equal to the gold answer?"""

from __future__ import annotations

from papo.engines.protocols import Verifier
from papo.params import ScoreOrmParams


def make_verifier(params: ScoreOrmParams) -> Verifier:
    """The verifier that `score_orm.verifier` names."""
    if params.verifier == "math-verify":
        from papo.engines.verifiers.math_verify import MathVerifier

        return MathVerifier(timeout_s=params.timeout_s, workers=params.workers)
    raise AssertionError(params.verifier)
