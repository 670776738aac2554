"""Why each response of a group got the advantage it has, in words made from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from papo.core.advantages import (
    ONE_REWARD,
    VARIANTS,
    component_weights,
    compute_advantages,
    count_inversions,
    lam_max,
)
from papo.core.groups import BoolArray, FloatArray
from papo.core.process_reward import Rule


class Settings(NamedTuple):
    """How the advantages were computed; as in `compute_advantages`, or variant `capo`. `overlong`: buffer and factor.

    `reward`: where the process rewards are not the judge's scores.
    """

    variant: str
    lam: float
    scale: str
    eps: float
    guard: str
    overlong: tuple[int, float] | None = None
    reward: Rule | None = None

    def words(self, *names: str) -> str:
        """`variant=papo lam=1 ...`: the settings named, or all; `overlong` and `reward` of all only if there is one."""
        wanted = names or [
            name for name in self._fields if name not in ("overlong", "reward") or getattr(self, name) is not None
        ]
        return " ".join(self._words(name) for name in self._fields if name in wanted)

    def _words(self, name: str) -> str:
        value = getattr(self, name)
        if name == "overlong" and value is not None:
            return f"overlong.buffer={value[0]} overlong.factor={value[1]:g}"
        if isinstance(value, Rule):
            return str(value)
        return f"{name}={value:g}" if isinstance(value, float) else f"{name}={'null' if value is None else value}"


class Group(NamedTuple):
    """The G responses to one prompt: (G,) float64 arrays with NaN for a missing score, and the status of each score.

    `outcome`, `process` and `total` are A_out, A_proc and A as they were computed; with token-level credit their means over the tokens.
    `penalties`: as given to `compute_advantages`.
    """

    orm: FloatArray
    prm: FloatArray
    outcome: FloatArray
    process: FloatArray
    total: FloatArray
    orm_statuses: Sequence[str]
    prm_statuses: Sequence[str]
    penalties: FloatArray | None = None

    @property
    def penalty(self) -> FloatArray:
        """(G,), 0 where there is none."""
        return np.zeros(self.orm.size) if self.penalties is None else self.penalties

    @property
    def correct(self) -> BoolArray:
        correct: BoolArray = self.orm == 1.0
        return correct

    @property
    def wrong(self) -> BoolArray:
        wrong: BoolArray = self.orm == 0.0
        return wrong


class Why(NamedTuple):
    """A sentence a response, in the order given, and the sentences about the group as a whole."""

    responses: list[str]
    group: list[str]


class _Compared(NamedTuple):
    """What A_proc normalises in a variant: its values, over which responses, and words for both."""

    scores: FloatArray
    among: BoolArray
    score: str
    those: str


def explain(group: Group, settings: Settings) -> Why:
    """Why each response is pushed up, down or not at all, and what holds for the group."""
    if settings.variant == "capo":
        # Means over tokens: where the tokens cancel, what remains is rounding.
        group = group._replace(
            outcome=_cleaned(group.outcome), process=_cleaned(group.process), total=_cleaned(group.total)
        )
    compared = _compared(group, settings.variant)
    return Why([_response(group, settings, compared, row) for row in range(group.orm.size)], _group(group, settings))


def _response(group: Group, settings: Settings, compared: _Compared, row: int) -> str:
    if math.isnan(group.orm[row]):
        return f"no verdict ({group.orm_statuses[row]}): it leaves the statistics of its group, A = 0"
    right = bool(group.correct[row])
    answered = group.orm_statuses[row] != "no_answer"
    verdict = "correct" if right else "wrong" if answered else "wrong (no answer)"
    penalty = float(group.penalty[row])
    costs = [f"its length costs {-penalty:.3g} of its reward"] if penalty else []
    parts = [verdict, *costs, *_process(group, settings, compared, row), _sum(group, settings, row)]
    return "; ".join(parts) + _push(right, float(group.total[row]))


def _process(group: Group, settings: Settings, compared: _Compared, row: int) -> list[str]:
    """The clause about A_proc; none where the variant or the verdict leaves nothing to say."""
    variant, process = settings.variant, float(group.process[row])
    if variant == "orm" or (variant in ("papo", "convex") and group.wrong[row]):
        return []
    if variant == "capo":
        return [f"the wrong steps in the group give A_proc = {_number(process)}"] if process else []
    if not group.process.any():
        return [f"A_proc = 0, as {_inactive(group, variant, compared)}"]
    if not compared.among[row]:
        return [f"its process score is missing ({group.prm_statuses[row]}), so A_proc = 0"]
    score, mean = float(compared.scores[row]), float(compared.scores[compared.among].mean())
    side = "is" if process == 0.0 else "is below" if process < 0.0 else "is above"
    named = f"its {compared.score} {score:.3g}"
    return [f"{named} {side} the mean {mean:.3g} of the {compared.those}, so A_proc = {_number(process)}"]


def _sum(group: Group, settings: Settings, row: int) -> str:
    outcome, process, total = (_number(float(part[row])) for part in (group.outcome, group.process, group.total))
    variant, lam = settings.variant, settings.lam
    if variant in ("prm", "mult"):
        return f"A = A_proc = {total}"
    if variant == "capo":
        return f"in the mean over its tokens A = {outcome} + {process} = {total}"
    if variant == "convex":
        return f"A = {lam:g} x {outcome} + {1.0 - lam:g} x {process} = {total}"
    if variant == "gdpo":
        return f"A = ({outcome} + {lam:g} x {process}) / {_whitening(group, lam):.3g} = {total}"
    return f"A = A_out = {total}" if group.process[row] == 0.0 else f"A = {outcome} + {lam:g} x {process} = {total}"


def _push(right: bool, total: float) -> str:
    if total == 0.0:
        return ": it teaches nothing"
    sign = "> 0" if total > 0.0 else "< 0"
    expected = right == (total > 0.0)
    who = "" if expected else f"a {'correct' if right else 'wrong'} response is "
    return f" {sign}: {who}pushed {'up' if total > 0.0 else 'down'}"


def _group(group: Group, settings: Settings) -> list[str]:
    size, right, wrong = group.orm.size, int(group.correct.sum()), int(group.wrong.sum())
    unknown = f", {size - right - wrong} without a verdict" if right + wrong < size else ""
    sentences = [f"{size} responses: {right} correct, {wrong} wrong{unknown}"]
    penalised = int((group.penalty[group.correct | group.wrong] < 0.0).sum())
    if penalised:
        sentences.append(
            f"{penalised} of {right + wrong} lose some of their reward for their length; their verdicts stay"
        )
    sentences += _outcome(group, penalised > 0)
    sentences.append(_activity(group, settings))
    if settings.guard == "rank" and (factor := _guarded(group, settings)) < 1.0:
        sentences.append(
            f"guard rank multiplied A_proc by {factor:.3g}, so that no correct response falls below a wrong one"
        )
    if settings.variant == "papo" and settings.scale == "std" and right + wrong:
        sentences.append(_bound(right + wrong, settings, penalised > 0))
    if settings.variant == "gdpo" and group.total.any():
        sentences.append(f"{_whitening(group, settings.lam):.3g} is the standard deviation over the round")
    if right and wrong:
        found = count_inversions(group.total, group.orm, [0] * size)
        said = f"{found} of the correct responses do not outrank every wrong one" if found else "none"
        sentences.append(f"inversions: {said}")
    return sentences


def _outcome(group: Group, penalised: bool) -> list[str]:
    """What is to be said where A_out tells no correct response from a wrong one."""
    if group.correct.any() and group.wrong.any():
        if penalised and not group.outcome.any():
            return ["A_out is 0 throughout: the penalties leave no difference between right and wrong"]
        return []
    equal = "the known verdicts are all equal" if group.correct.any() or group.wrong.any() else "no verdict is known"
    if group.outcome.any():
        return [f"A_out is of the penalties alone: {equal}"]
    return [f"A_out is 0 throughout: {equal}"]


def _activity(group: Group, settings: Settings) -> str:
    if settings.variant == "orm":
        return "A_proc is not used by the variant orm"
    compared = _compared(group, settings.variant)
    if not group.process.any():
        return f"A_proc is 0 throughout: {_inactive(group, settings.variant, compared)}"
    if settings.variant == "capo":
        return "A_proc is active: the tokens of steps that the judge calls wrong are debited"
    scores = compared.scores[compared.among]
    return f"A_proc is active: the {compared.those} have scores from {scores.min():.3g} to {scores.max():.3g}"


def _inactive(group: Group, variant: str, compared: _Compared) -> str:
    """Why no response of the group has a process advantage."""
    if variant in ("papo", "convex", "capo") and group.correct.sum() < 2:
        return "fewer than two responses are correct"
    if variant == "capo":
        return "the judge calls no more of one response wrong than of another"
    present = int(compared.among.sum())
    if present == 0:
        return "no process score is there"
    if present == 1:
        return "only one process score is there"
    equal = "all correct scores" if variant in ("papo", "convex") else "all scores"
    return f"{equal} are equal"


def _bound(known: int, settings: Settings, penalised: bool) -> str:
    bound, lam = lam_max(known), settings.lam
    held = "; guard rank keeps the order" if settings.guard == "rank" else ""
    if penalised:
        return f"lam_max is no bound where a penalty narrows the gap between right and wrong{held}"
    if math.isinf(bound):
        return f"of {known} responses a correct one stays above a wrong one with any lam"
    if lam < bound:
        return f"lam {lam:g} is below lam_max {bound:.3f}: no score puts a correct one of {known} responses below a wrong one"
    return f"lam {lam:g} is not below lam_max {bound:.3f}: a score can put a correct one of {known} responses below a wrong one{held}"


def _guarded(group: Group, settings: Settings) -> float:
    """The factor that guard `rank` put on the process part of this group."""
    if settings.variant not in VARIANTS or not group.process.any():
        return 1.0
    free = compute_advantages(
        group.orm, group.prm, [0] * group.orm.size,
        variant=settings.variant, lam=settings.lam, scale=settings.scale, eps=settings.eps,
    )  # fmt: skip
    factor = float(np.abs(group.process).max() / np.abs(free.process).max())
    return factor if factor < 1.0 - 1e-6 else 1.0  # the stored ones are float32


def _whitening(group: Group, lam: float) -> float:
    """What `gdpo` divided by, found again from the sums that it gave."""
    weights = component_weights("gdpo", lam)
    before = np.abs(weights[0] * group.outcome + weights[1] * group.process).sum()
    after = np.abs(group.total).sum()
    return float(before / after) if after else 1.0


def _compared(group: Group, variant: str) -> _Compared:
    judged = ~np.isnan(group.prm)
    penalty = group.penalty if variant in ONE_REWARD else np.zeros(group.orm.size)
    less = " with its penalty" if penalty.any() else ""
    if variant in ("mult", "fullnorm"):
        among = group.wrong | (group.correct & judged)
        product = np.where(group.correct, group.prm, 0.0)
        return _Compared(
            product + penalty, among, f"product of verdict and process score{less}", f"{among.sum()} responses"
        )
    if variant in ("prm", "gdpo"):
        among = judged & (group.correct | group.wrong)
        those = f"{among.sum()} responses that have one"
        return _Compared(group.prm + penalty, among, f"process score{less}", those)
    among = judged & group.correct
    partly = " that have one" if among.sum() < group.correct.sum() else ""
    return _Compared(group.prm, among, "process score", f"{among.sum()} correct responses{partly}")


def _cleaned(values: FloatArray) -> FloatArray:
    return np.where(np.abs(values) < 1e-6, 0.0, values)


def _number(value: float) -> str:
    """Two decimals; 0 only for exactly 0."""
    return f"{value:.2f}" if value else "0"
