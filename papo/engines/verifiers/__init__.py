"""Verifiers: is the final answer of a completion equal to the gold answer, does its program pass the tests?"""

from __future__ import annotations

from papo.engines.protocols import Verifier
from papo.params import ScoreOrmParams


def make_verifier(params: ScoreOrmParams) -> Verifier:
    """The verifiers of all kinds; that of mathematics is the one that `score_orm.verifier` names.

    What a kind needs of this machine is looked for when a problem of the kind occurs; code comes first, as it needs most.
    """
    if params.verifier == "math-verify":
        from papo.engines.sandbox import Sandbox
        from papo.engines.verifiers.by_kind import VerifierByKind
        from papo.engines.verifiers.choice import ChoiceVerifier
        from papo.engines.verifiers.code import CodeVerifier
        from papo.engines.verifiers.math_verify import MathVerifier

        return VerifierByKind(
            {
                "code": CodeVerifier(Sandbox(params.sandbox), workers=params.workers),
                "choice": ChoiceVerifier(),
                "math": MathVerifier(timeout_s=params.timeout_s, workers=params.workers),
            }
        )
    raise AssertionError(params.verifier)
