"""What stored rounds say beyond their advantages: alarms, other variants from the same scores, one problem in every detail.

Reads tables and writes none; no model, verifier or judge is asked.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from papo.core.advantages import VARIANTS, compute_advantages, count_inversions, process_needed
from papo.core.alarms import Alarm, Limits, fired, trained
from papo.core.compare import Comparison, compare
from papo.core.explain import Group, Settings, Why, explain
from papo.core.groups import BoolArray, FloatArray, IndexArray
from papo.core.overlong import overlong_penalties
from papo.core.peers import trl_gdpo, verl_gdpo
from papo.core.process_reward import Rule, process_rewards
from papo.engines.tokenizer import TokenizerAligner
from papo.errors import DataError, MissingInputError, ParamsError, UserError
from papo.params import AdvantageParams, AlarmsParams, Variant
from papo.schemas import ADVANTAGES, ORM, PRM, ROLLOUTS
from papo.stages.advantage import by_tokens, completion_lengths, penalties_of, rule_of
from papo.stages.rows import check_same_rows, of_problems
from papo.store.layout import Workspace, manifest_path
from papo.store.manifest import Manifest
from papo.store.tables import codes, numbers, read_table, values

STORED = 1e-6
"""Relative distance below which advantages stored as float32 are one value."""

ALIKE = ("lam", "scale", "eps", "guard", "overlong", "reward")
"""Settings that variants are compared under."""

# What `explain` shows beside the stored advantage.
PEER_VARIANTS = ("orm", "mult", "fullnorm")


@dataclass(frozen=True)
class ScoredRound:
    """The scores and advantages of a round, one row a response, and how the advantages were computed.

    `groups` numbers the problems of the rows, whose ids are `names`.
    """

    number: int
    orm: pa.Table
    prm: pa.Table
    advantages: pa.Table
    settings: Settings

    @cached_property
    def groups(self) -> IndexArray:
        return codes(self.orm, "problem_id")[0]

    @cached_property
    def names(self) -> list[str]:
        return codes(self.orm, "problem_id")[1]

    @cached_property
    def outcomes(self) -> FloatArray:
        return numbers(self.orm, "orm_score")

    @cached_property
    def processes(self) -> FloatArray:
        return numbers(self.prm, "prm_score")

    def advantage(self, name: str) -> FloatArray:
        """A column of the advantages; `advantage` is the mean over the tokens where they have their own."""
        stored = numbers(self.advantages, name).copy()
        tokens = self.advantages["token_advantages"]
        if name == "advantage" and tokens.null_count < len(tokens):
            for at, own in enumerate(tokens):
                if own.is_valid and len(own):
                    stored[at] = np.mean(own.as_py())
        return stored


@dataclass(frozen=True)
class Rederived:
    """A variant computed anew from the scores of a round, against the stored advantages; counts are of responses.

    `missing` ones lack a process score that the variant would ask for, `not_asked` of them because the judge was not asked.
    """

    round: int
    stored: str
    variant: str
    changes: Comparison
    zero_share: float
    inversions: int
    missing: int
    not_asked: int


@dataclass(frozen=True)
class Rederivation:
    """Every variant of every round that was asked for, and remarks on how to read them."""

    rows: list[Rederived]
    notes: list[str]


@dataclass(frozen=True)
class Response:
    """One response with its scores (NaN: missing, the status says why), and what others would have made of them.

    `disputed`: the verifier calls it wrong, and the second opinion equivalent to the gold answer.
    """

    sample_index: int
    orm: float
    orm_status: str
    extracted: str | None
    disputed: bool
    prm: float
    prm_status: str
    reason: str
    outcome: float
    process: float
    advantage: float
    peers: dict[str, float]
    tokens: int
    text: str


@dataclass(frozen=True)
class Explained:
    """A problem in one round, and why its responses were pushed where they were."""

    problem_id: str
    round: int
    other_rounds: list[int]
    prompt: str
    answer: str
    judge: str
    settings: Settings
    token_level: bool
    responses: list[Response]
    why: Why


def stored_rounds(workspace: Workspace) -> list[int]:
    """Rounds that have advantages, in order.

    Raises:
        MissingInputError: there is none.
    """
    found = workspace.round(0).parent.glob("*/advantages.parquet")
    rounds = sorted(int(path.parent.name) for path in found if path.parent.name.isdecimal())
    if not rounds:
        raise MissingInputError(
            "no round has advantages yet",
            where=str(workspace.round(0).parent),
            fix="run `papo run`, or `papo advantage --round 0`",
        )
    return rounds


def signals_and_alarms(params: AlarmsParams, workspace: Workspace) -> tuple[int, list[Alarm]]:
    """(rounds that have signals, every alarm of theirs).

    Raises:
        MissingInputError: no round has any.
    """
    history: list[dict[str, float]] = []
    while manifest_path(table := workspace.table(len(history), "advantages")).is_file():
        signals, policy = Manifest.read(table).metrics, workspace.policy(len(history))
        training = Manifest.read(policy) if manifest_path(policy).is_file() else None
        history.append(trained(signals, training.metrics, len(training.history)) if training else signals)
    if not history:
        raise MissingInputError(
            "no round has signals yet", where=str(table), fix="run `papo run`, or `papo advantage --round 0`"
        )
    return len(history), fired(history, Limits(**params.model_dump()))


def read_round(workspace: Workspace, number: int) -> ScoredRound:
    """The scores and advantages of a round.

    Raises:
        MissingInputError, DataError: a table is absent, damaged, or has other rows than the verdicts have.
    """
    orm_path, prm_path, advantages_path = (workspace.table(number, name) for name in ("orm", "prm", "advantages"))
    if not advantages_path.is_file():
        raise MissingInputError(
            f"round {number} has no advantages",
            where=str(advantages_path),
            fix=f"run `papo advantage --round {number}`",
        )
    orm, prm, advantages = (
        read_table(path, table) for path, table in ((orm_path, ORM), (prm_path, PRM), (advantages_path, ADVANTAGES))
    )
    check_same_rows(orm, prm, prm_path)
    check_same_rows(orm, advantages, advantages_path)
    settings = _settings(Manifest.read(advantages_path).params)
    return ScoredRound(number, orm, prm, advantages, settings)


def _settings(params: Mapping[str, Any]) -> Settings:
    """Those of a section `advantage`; one that was stored before there was `overlong`, or a rule for rewards, has none."""
    overlong = params.get("overlong")
    return Settings(
        **{name: params[name] for name in Settings._fields if name not in ("overlong", "reward")},
        overlong=(overlong["buffer"], overlong["factor"]) if overlong is not None else None,
        reward=rule_of(**{name: params.get(name, default) for name, default in Rule()._asdict().items()}),
    )


def _rollouts(workspace: Workspace, scored: ScoredRound, *columns: str) -> pa.Table:
    """Columns of the rollouts of a round, in the order of its scores."""
    path = workspace.table(scored.number, "rollouts")
    rollouts = read_table(path, ROLLOUTS, "problem_id", "sample_index", *columns)
    check_same_rows(rollouts, scored.orm, workspace.table(scored.number, "orm"))
    return rollouts


def _lengths(workspace: Workspace, scored: ScoredRound) -> npt.NDArray[np.int64]:
    """(N,) tokens of each response."""
    return completion_lengths(workspace.table(scored.number, "rollouts"))


# ---- other variants from the same scores ----


def check_variant(variant: str, *, comparing: bool) -> None:
    """Refuses a name that `--variant` does not take.

    Raises:
        ParamsError: naming those that it takes.
    """
    known = (*get_args(Variant), "all") if comparing else get_args(Variant)
    if variant not in known:
        hint = "; all needs --compare" if variant == "all" else ""
        raise ParamsError(
            f"unknown variant {variant!r}{hint}", where="--variant", fix=f"choose one of {', '.join(known)}"
        )


def rederive(
    params: AdvantageParams, workspace: Workspace, *, variant: str = "all", round_: int | None = None
) -> Rederivation:
    """One variant, or all, of one round, or all, from the stored scores, with lam, scale, eps, guard and overlong of `params`.

    `capo` is not one of all: it needs the wrong steps by a judge that names them, and is compared by the means over tokens.

    Raises:
        ParamsError: an unknown variant, or one that lam is out of bounds for.
        MissingInputError, DataError: tables are absent or damaged; for `capo`, the judge named no wrong steps.
    """
    check_variant(variant, comparing=True)
    wanted = [variant] if variant != "all" else [name for name in VARIANTS if name != "convex" or params.lam <= 1.0]
    rows, missing, not_asked = [], 0, 0
    for number in stored_rounds(workspace) if round_ is None else [round_]:
        scored = read_round(workspace, number)
        without = np.isnan(scored.processes)
        statuses, words = codes(scored.prm, "status")
        unasked = np.array([word == "not_asked" for word in words], dtype=np.bool_)[statuses]
        lacking = {name: without & process_needed(name, scored.outcomes, scored.groups) for name in wanted}
        totals = {name: _total(params, workspace, scored, name) for name in wanted}
        rows += [_rederived(params, scored, name, totals[name], lacking[name], unasked) for name in wanted]
        by_any = np.logical_or.reduce(list(lacking.values()))
        missing += int(by_any.sum())
        not_asked += int((by_any & unasked).sum())
    return Rederivation(rows, _notes(params, wanted, variant, missing, not_asked))


def _total(params: AdvantageParams, workspace: Workspace, scored: ScoredRound, variant: str) -> FloatArray:
    """(N,) advantages; in `capo` means over the tokens."""
    if variant != "capo":
        penalties = None
        if params.overlong is not None:
            limits = numbers(_rollouts(workspace, scored, "max_new_tokens"), "max_new_tokens")
            penalties = penalties_of(params, _lengths(workspace, scored), limits)
        return compute_advantages(
            scored.outcomes, _rewards(workspace, scored, _settings(params.model_dump()).reward, variant), scored.groups,
            variant=variant, lam=params.lam, scale=params.scale, eps=params.eps, guard=_guard(params, variant),
            penalties=penalties,
        ).total  # fmt: skip
    rollouts = _rollouts(workspace, scored, "completion", "completion_ids", "max_new_tokens").to_pylist()
    orm, prm = scored.orm.to_pylist(), scored.prm.to_pylist()
    aligner = TokenizerAligner(workspace.warmstart / "tokenizer.json")
    return by_tokens(params, rollouts, orm, prm, workspace.table(scored.number, "prm"), aligner).total


def _rewards(workspace: Workspace, scored: ScoredRound, rule: Rule | None, variant: str) -> FloatArray:
    """(N,) process rewards of a round; those of `orm` and `capo`, which have none, are the scores."""
    if rule is None or variant in ("orm", "capo"):
        return scored.processes
    needed = process_needed(variant, scored.outcomes, scored.groups)
    limits = numbers(_rollouts(workspace, scored, "max_new_tokens"), "max_new_tokens")
    lengths = _lengths(workspace, scored)
    return process_rewards(
        scored.processes, scored.outcomes, scored.groups, lengths, limits, needed=needed, **rule._asdict()
    )


def _rederived(
    params: AdvantageParams,
    scored: ScoredRound,
    variant: str,
    total: FloatArray,
    lacking: BoolArray,
    unasked: BoolArray,
) -> Rederived:
    ids, total = scored.groups, total.astype(np.float32)
    return Rederived(
        round=scored.number,
        stored=_described(scored.settings, params),
        variant=variant,
        changes=compare(scored.advantage("advantage"), total, ids, tolerance=STORED),
        zero_share=float(np.mean(total == 0.0)),
        inversions=count_inversions(total, scored.outcomes, ids),
        missing=int(lacking.sum()),
        not_asked=int((lacking & unasked).sum()),
    )


def _guard(params: AdvantageParams, variant: str) -> str:
    return "none" if variant in ("prm", "mult", "capo") else params.guard


def _described(stored: Settings, params: AdvantageParams) -> str:
    """The stored variant, and what else of its settings is not what is compared with it."""
    given = _settings(params.model_dump())
    other = [name for name in ALIKE if getattr(stored, name) != getattr(given, name)]
    return f"{stored.variant} {stored.words(*other)}" if other else stored.variant


def _notes(params: AdvantageParams, variants: Sequence[str], asked: str, missing: int, not_asked: int) -> list[str]:
    used = _settings(params.model_dump())
    notes = [f"computed with {used.words(*(name for name in ALIKE if getattr(used, name) is not None))}"]
    unguarded = [name for name in variants if _guard(params, name) != params.guard]
    if unguarded:
        notes.append(f"{' and '.join(unguarded)}: without the guard, as there is no outcome advantage to rank by")
    if asked == "all" and "convex" not in variants:
        notes.append(f"convex is left out: it needs lam between 0 and 1, and lam is {params.lam:g}")
    if missing:
        notes.append(
            f"responses without a process score that a variant above asks for: {missing} ({not_asked} because the judge was not "
            f"asked, {missing - not_asked} because it failed); in that variant they count as missing, never as 0"
        )
    return notes


# ---- one problem ----


def explain_problem(workspace: Workspace, prefix: str, *, round_: int | None = None) -> Explained:
    """Everything about the problem whose id begins with `prefix`, in round `round_` or the last that has it.

    Raises:
        UserError: no prefix of an id.
        DataError: no problem, or more than one, begins with it.
        MissingInputError: tables are absent.
    """
    known = _ids_by_round(workspace, round_)
    problem = _resolve(prefix, known, round_)
    rounds = [number for number, ids in known.items() if problem in ids]
    number = rounds[-1] if round_ is None else round_
    scored = read_round(workspace, number)
    rollouts = _rollouts(workspace, scored, "prompt", "completion", "max_new_tokens")
    tokens = _lengths(workspace, scored)
    settings = scored.settings
    penalties = _penalties(settings, tokens, numbers(rollouts, "max_new_tokens"))
    rows = np.flatnonzero(scored.groups == scored.names.index(problem)).tolist()
    texts, judged = rollouts.take(rows).to_pylist(), scored.prm.take(rows[:1]).to_pylist()
    return Explained(
        problem_id=problem,
        round=number,
        other_rounds=[other for other in rounds if other != number],
        prompt=texts[0]["prompt"],
        answer=of_problems(workspace.train_problems, "answer", {problem})[problem],
        judge=", ".join(dict.fromkeys(judged[0][name] for name in ("judge", "rubric"))),
        settings=scored.settings,
        token_level=any(scored.advantages["token_advantages"].take(rows).to_pylist()),
        responses=_responses(scored, texts, tokens, rows, penalties),
        why=explain(
            _group(scored, _rewards(workspace, scored, settings.reward, settings.variant), rows, penalties), settings
        ),
    )


def _penalties(settings: Settings, lengths: npt.NDArray[np.int64], limits: FloatArray) -> FloatArray:
    """(N,) penalties for length; 0 without `overlong`."""
    if settings.overlong is None:
        return np.zeros(lengths.size)
    return overlong_penalties(lengths, limits, *settings.overlong)


def _responses(
    scored: ScoredRound,
    texts: list[dict[str, Any]],
    lengths: npt.NDArray[np.int64],
    rows: list[int],
    penalties: FloatArray,
) -> list[Response]:
    peers = _peers(scored, lengths, penalties)
    orm, prm = scored.outcomes, scored.processes
    verdicts, judgements = scored.orm.take(rows).to_pylist(), scored.prm.take(rows).to_pylist()
    parts = [scored.advantage(name) for name in ("outcome_advantage", "process_advantage", "advantage")]
    return [
        Response(
            sample_index=verdict["sample_index"],
            orm=float(orm[at]),
            orm_status=verdict["status"],
            extracted=verdict["extracted"],
            disputed=bool(orm[at] == 0.0 and verdict["second_opinion"] == 1.0),
            prm=float(prm[at]),
            prm_status=judgement["status"],
            reason=judgement["reason"],
            outcome=float(parts[0][at]),
            process=float(parts[1][at]),
            advantage=float(parts[2][at]),
            peers={name: float(made[at]) for name, made in peers.items()},
            tokens=int(lengths[at]),
            text=text["completion"],
        )
        for at, verdict, judgement, text in zip(rows, verdicts, judgements, texts, strict=True)
    ]


def _peers(scored: ScoredRound, lengths: npt.NDArray[np.int64], penalties: FloatArray) -> dict[str, FloatArray]:
    """What the variants of PEER_VARIANTS and two libraries make of the whole round, with the stored settings and no guard.

    The libraries are given the scores alone, without penalties.
    """
    settings, ids = scored.settings, scored.groups
    orm, prm = scored.outcomes, scored.processes
    peers = {
        name: compute_advantages(
            orm, prm, ids, variant=name, lam=settings.lam, scale=settings.scale, eps=settings.eps, penalties=penalties
        ).total
        for name in PEER_VARIANTS
    }  # fmt: skip
    return peers | {
        "GDPO, TRL": trl_gdpo(orm, prm, ids, lam=settings.lam),
        "GDPO, verl": verl_gdpo(orm, prm, ids, lengths, lam=settings.lam),
    }


def _group(scored: ScoredRound, rewards: FloatArray, rows: list[int], penalties: FloatArray) -> Group:
    return Group(
        orm=scored.outcomes[rows],
        prm=rewards[rows],
        outcome=scored.advantage("outcome_advantage")[rows],
        process=scored.advantage("process_advantage")[rows],
        total=scored.advantage("advantage")[rows],
        orm_statuses=values(scored.orm.take(rows), "status"),
        prm_statuses=values(scored.prm.take(rows), "status"),
        penalties=penalties[rows],
    )


def _ids_by_round(workspace: Workspace, round_: int | None) -> dict[int, set[str]]:
    """Round -> ids of its problems; `round_` is there even if it has no advantages, so that reading it says so."""
    rounds = stored_rounds(workspace)
    if round_ is not None and round_ not in rounds:
        read_round(workspace, round_)
    return {
        number: set(codes(read_table(workspace.table(number, "orm"), ORM, "problem_id"), "problem_id")[1])
        for number in rounds
    }


def _resolve(prefix: str, known: dict[int, set[str]], round_: int | None) -> str:
    """The one id that begins with `prefix`, in the round named or in any."""
    wanted = prefix.lower()
    if not re.fullmatch(r"[0-9a-f]{4,16}", wanted):
        raise UserError(
            f"{prefix!r} is no problem_id", where="PROBLEM_ID", fix="give 4 to 16 of its hex digits, from the first on"
        )
    where = defaultdict(list)
    for number, ids in known.items():
        for name in ids:
            if name.startswith(wanted):
                where[name].append(number)
    here = sorted(name for name, numbers in where.items() if round_ is None or round_ in numbers)
    if len(here) == 1:
        return here[0]
    named = "" if round_ is None else f" of round {round_}"
    if here:
        listed = ", ".join(f"{name} (round {_few(where[name])})" for name in here[:4])
        raise DataError(
            f"{len(here)} problems{named} begin with {wanted}", where="PROBLEM_ID", fix=f"give more digits: {listed}"
        )
    elsewhere = "; ".join(f"{name} is in round {_few(numbers)}" for name, numbers in sorted(where.items())[:4])
    shown = list(known.items())[:3] if round_ is None else [(round_, known[round_])]
    hint = "; ".join(f"round {number} has {_few(sorted(ids))}" for number, ids in shown)
    raise DataError(f"no problem{named} begins with {wanted}", where="PROBLEM_ID", fix=elsewhere or hint)


def _few(items: Iterable[object], most: int = 3) -> str:
    shown = [str(item) for item in items]
    return ", ".join(shown[:most]) + (f", ... ({len(shown)})" if len(shown) > most else "")
