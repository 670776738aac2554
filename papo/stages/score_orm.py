"""score_orm: the outcome of each response, 1 or 0, or missing with a status that says why.

Where a model is asked for a second opinion on wrong answers, what it says stands in columns of its own and changes no outcome.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from papo.engines.protocols import Opinion, Question, SecondOpinion, Verdict, Verifier, VerifyItem
from papo.params import ScoreOrmParams
from papo.schemas import OK, ORM, ROLLOUTS, Grading
from papo.stages.rows import check_failures, gradings_of, of_problems
from papo.store.faults import reached
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import codes, read_parts, read_table, write_parts

CODE = (
    "stages/score_orm.py",
    "stages/rows.py",
    "engines/verifiers",
    "engines/sandbox.py",
    "engines/in_sandbox.py",
    "engines/second_opinion.py",
    "engines/chat.py",
    "core/answers.py",
    "core/code.py",
    "core/fence.py",
)

NOT_ASKED = Opinion(None, "not_asked")


@dataclass(frozen=True)
class Inputs:
    round: int
    rollouts: Path
    problems: Path


def run(
    params: ScoreOrmParams,
    inputs: Inputs,
    out: Path,
    *,
    engine: Verifier,
    second_opinion: SecondOpinion | None = None,
    context: Context = Context(),
) -> Manifest:
    """Writes one outcome a response to `out`, and beside it the second opinion where there is one to ask.

    Raises:
        FailedRowsError: more than `max_failed_share` of the rows have no score.
        SetupError: this machine lacks what the verifier or the second opinion takes.
    """
    task = Task("score_orm", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    if second_opinion is not None:
        second_opinion.check()
    found = _Found(Counter(), Counter(), [])
    parts = _verified(params, inputs, engine, found, context)
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    versions: dict[str, str] = {}
    if second_opinion is not None:
        # A question is asked once in a round, so that it takes the round as a whole.
        held = [scored for part in parts for scored in part]
        opinions = _ask(second_opinion, _questions(held), inputs.round, context)
        rows = write_parts(out, ORM, [_rows(inputs.round, held, opinions)])
        counts, metrics = _opinion_counts(opinions), _opinion_metrics(opinions)
        versions = second_opinion.versions()
    else:
        rows = write_parts(out, ORM, (_rows(inputs.round, part, [NOT_ASKED] * len(part)) for part in parts))
    counts = dict(found.statuses) | found.details | counts
    if found.known:
        metrics = {"accuracy": sum(found.known) / len(found.known)} | metrics
    return task.finish(rows=rows, counts=counts, metrics=metrics, versions=engine.versions() | versions)


class _Scored(NamedTuple):
    """A response, what the verifier was asked about it, and what it said."""

    row: Mapping[str, Any]
    item: VerifyItem
    verdict: Verdict


class _Found(NamedTuple):
    """Of all responses so far: how many have each status and detail, and how many are right and known."""

    statuses: Counter[str]
    details: Counter[str]
    known: list[float]


def _verified(
    params: ScoreOrmParams, inputs: Inputs, engine: Verifier, found: _Found, context: Context
) -> Iterator[list[_Scored]]:
    """The responses in parts, each with its verdict; `found` counts them.

    Raises:
        FailedRowsError: after the last.
    """
    of_round = read_table(inputs.rollouts, ROLLOUTS, "problem_id")
    ids = codes(of_round, "problem_id")[1]
    answers, gradings = of_problems(inputs.problems, "answer", ids), gradings_of(inputs.problems, ids)
    with context.progress(f"score_orm {inputs.round}", len(of_round)) as progress:
        for part in read_parts(inputs.rollouts, ROLLOUTS, "problem_id", "sample_index", "prompt", "completion"):
            rows = part.to_pylist()
            items = _items(rows, answers, gradings)
            reached("verify")
            verdicts = engine.verify(items, progress)
            reached("verified")
            found.statuses.update(verdict.status for verdict in verdicts)
            found.details.update(f"program {verdict.detail}" for verdict in verdicts if verdict.detail)
            found.known.extend(verdict.score for verdict in verdicts if verdict.score is not None)
            yield [_Scored(*each) for each in zip(rows, items, verdicts, strict=True)]
    check_failures("score_orm", found.statuses, params.max_failed_share)


def _rows(round_: int, scored: Sequence[_Scored], opinions: Sequence[Opinion]) -> list[dict[str, Any]]:
    return [
        {
            "round": round_,
            "problem_id": row["problem_id"],
            "sample_index": row["sample_index"],
            "orm_score": verdict.score,
            "extracted": verdict.extracted,
            "status": verdict.status,
            "detail": verdict.detail,
            "second_opinion": opinion.score,
            "second_opinion_status": opinion.status,
        }
        for (row, _, verdict), opinion in zip(scored, opinions, strict=True)
    ]


def _items(
    rollouts: Sequence[Mapping[str, Any]], answers: Mapping[str, str], gradings: Mapping[str, Grading]
) -> list[VerifyItem]:
    return [VerifyItem(answers[row["problem_id"]], row["completion"], gradings[row["problem_id"]]) for row in rollouts]


def items_of(rollouts: Sequence[Mapping[str, Any]], problems: Path) -> list[VerifyItem]:
    """What the verifier is asked about each response."""
    ids = {row["problem_id"] for row in rollouts}
    answers, gradings = of_problems(problems, "answer", ids), gradings_of(problems, ids)
    return _items(rollouts, answers, gradings)


def _questions(scored: Sequence[_Scored]) -> list[Question | None]:
    """What is asked about each response: only about mathematics that could be compared and was found wrong."""
    questions: list[Question | None] = []
    for row, item, verdict in scored:
        wrong = verdict.score == 0.0 and verdict.status == OK and item.grading.kind == "math"
        if wrong and verdict.extracted is not None:
            questions.append(Question(row["prompt"], item.gold, verdict.extracted, item.grading))
        else:
            questions.append(None)
    return questions


def _ask(
    second_opinion: SecondOpinion, questions: Sequence[Question | None], round_: int, context: Context
) -> list[Opinion]:
    """An opinion a response; each distinct question is asked once. That most have failed is said, and stops nothing."""
    distinct = list(dict.fromkeys(question for question in questions if question is not None))
    if not distinct:
        return [NOT_ASKED] * len(questions)
    with context.progress(f"second_opinion {round_}", len(distinct)) as progress:
        reached("ask")
        found = dict(zip(distinct, second_opinion.ask(distinct, progress), strict=True))
        reached("asked")
    failed = [opinion for opinion in found.values() if opinion.status != OK]
    if len(failed) > len(distinct) / 2:
        causes = Counter(f"{opinion.status} ({opinion.cause})" for opinion in failed)
        listed = ", ".join(f"{count} {cause}" for cause, count in causes.most_common(3))
        context.warn(
            f"second opinion in round {round_}: {len(failed)} of {len(distinct)} questions got no answer: {listed}; "
            "the outcomes do not depend on it"
        )
    return [NOT_ASKED if question is None else found[question] for question in questions]


def _opinion_counts(opinions: Sequence[Opinion]) -> dict[str, int]:
    """Responses: asked about, those of them that the model calls equivalent, and those without an opinion by cause."""
    statuses = Counter(opinion.status for opinion in opinions if opinion is not NOT_ASKED)
    disagreed = sum(opinion.score == 1.0 for opinion in opinions)
    counts = {"asked": statuses.total(), "disagreed": disagreed}
    counts |= {status: count for status, count in statuses.items() if status != OK}
    return {f"second_opinion/{name}": count for name, count in counts.items()}


def _opinion_metrics(opinions: Sequence[Opinion]) -> dict[str, float]:
    """Share of the opinions that disagree with the verifier; none where there is no opinion."""
    scores = [opinion.score for opinion in opinions if opinion.score is not None]
    return {"second_opinion/disagreed_share": sum(scores) / len(scores)} if scores else {}
