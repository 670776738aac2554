r"""Solutions whose reasoning has been labelled, to hold a judge against: read from a file, or made here.

A label is 1 (right), 0 (wrong) or 0.5 (right, with flaws). Each response may also have the number of its first wrong step and whether
its answer is correct.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from papo.engines.sources.rows import LOADERS, Row, read_rows
from papo.engines.sources.sums import boxed, draw_terms, prompt_of, solution_of
from papo.errors import DataError, ParamsError
from papo.params import GENERATED, Tier

LEVELS = (0.0, 0.5, 1.0)

ROLES: dict[str, tuple[str, ...]] = {
    "problem": ("problem", "question", "prompt"),
    "response": ("response", "steps", "model_output_steps", "completion", "solution"),
    "label": ("label", "process_correct", "process_level", "model_output_solution_correctness"),
    "first_error_step": ("first_error_step", "model_output_solution_first_error_step"),
    "first_error_index": (),
    "answer_correct": ("answer_correct", "final_answer_correct", "model_output_answer_correctness"),
    "reference": ("reference_solution", "reference", "ground_truth_solution"),
    "kind": ("kind", "source", "generator"),
}
"""What a column may hold -> the names by which it is found where none is given; the first that there is counts.

`response` is a text or a list of steps. `first_error_step` counts from 1 and is 0 where no step is wrong, `first_error_index` counts
from 0 and is -1 there.
"""

PROCESS_BENCH = frozenset({"problem", "steps", "label", "final_answer_correct"})
"""Columns by which a data set in the form of ProcessBench is known: its `label` is a first_error_index."""

WORDS = {"true": 1.0, "correct": 1.0, "right": 1.0, "yes": 1.0, "false": 0.0, "wrong": 0.0, "incorrect": 0.0, "no": 0.0}
ABSENT = ("", "n/a", "none", "null")

KINDS = {"full": 1.0, "merged": 0.5, "padded": 0.5, "wrong": 0.0, "bare": 0.0}
"""The responses that are made here, and their labels by construction.

    full     every operation is a true step of its own
    merged   at least one step does two operations at once
    padded   true identities that are not the problem's stand between the steps
    wrong    one step has a wrong result; the later ones go on from it, or from the right one, so that the answer may be right
    bare     no step, only the answer

In each, the answer is as likely to be wrong as in the others where the steps do not force it: it says nothing about the reasoning.
"""

WRONG_ANSWERS = 0.25
TIER = Tier(min_terms=3, max_terms=12, problems=1)
RESPONSES = 500
"""How many are made unless told otherwise."""


@dataclass(frozen=True)
class Labelled:
    """One response with its label; `starts`: the character at which each step starts, None where the steps are not given.

    `first_error`: its first wrong step, from 1; 0 where none is wrong, None where that is not labelled.
    """

    row: int
    problem: str
    response: str
    label: float
    reference: str | None = None
    starts: tuple[int, ...] | None = None
    first_error: int | None = None
    answer_correct: bool | None = None
    kind: str = ""


@dataclass(frozen=True)
class LabelledSet:
    """`levels`: what the labels may be, ascending; `skipped`: rows that give no labelled response, by reason."""

    name: str
    responses: list[Labelled]
    levels: tuple[float, ...]
    skipped: dict[str, int]


def labelled_set(
    data: str, *, columns: Mapping[str, str] | None = None, limit: int | None = None, seed: int = 0
) -> LabelledSet:
    """The labelled responses of `data`.

    Args:
        data: `sums` for responses that are made here, or a file (.jsonl, .json, .parquet, .csv).
        columns: role -> column, for what is not found by its name in ROLES.
        limit: so many of them, drawn by `seed`; None: all, or RESPONSES made here.

    Raises:
        ParamsError: an unknown role, or a limit below 1.
        DataError: no such file, no column for a role, a label that is none, or no labelled response.
    """
    if limit is not None and limit < 1:
        raise ParamsError(f"--max is {limit}", where="papo calibrate-judge", fix="judge at least one response")
    if unknown := [role for role in columns or () if role not in ROLES]:
        raise ParamsError(f"no role {unknown[0]!r}", where="--column", fix=f"name one of {', '.join(ROLES)}")
    if data in GENERATED:
        if columns:
            raise ParamsError(f"{data} has no columns to name", where="--column", fix="leave it out")
        return LabelledSet(data, list(_sums(limit or RESPONSES, seed)), LEVELS, {})
    found = _read(data, columns or {})
    if limit is None or limit >= len(found.responses):
        return found
    drawn = random.Random(f"{seed}/calibration").sample(range(len(found.responses)), limit)
    return replace(found, responses=[found.responses[at] for at in sorted(drawn)])


def _read(data: str, columns: Mapping[str, str]) -> LabelledSet:
    what_it_takes = f"name a file with labelled solutions ({', '.join(LOADERS)}), or sums, with --data"
    if not Path(data).is_file():
        raise DataError("there is no such file", where=data, fix=what_it_takes)
    try:
        rows = read_rows(data, split="train")
    except DataError as error:
        what = "there is no row in it" if error.what.startswith("there are no") else error.what
        raise DataError(what, where=data, fix=what_it_takes) from None
    named = _resolve(rows[0], columns)
    skipped: Counter[str] = Counter()
    responses = []
    for row in rows:
        read = _labelled(row, named)
        if isinstance(read, str):
            skipped[read] += 1
        else:
            responses.append(read)
    if not responses:
        why = ", ".join(f"{reason} {count}" for reason, count in skipped.items())
        raise DataError(f"no row is a labelled response: {why}", where=data, fix=_how_to(rows[0]))
    levels = LEVELS if any(response.label == 0.5 for response in responses) else (0.0, 1.0)
    return LabelledSet(Path(data).name.split(".")[0], responses, levels, dict(skipped))


def _resolve(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    """Role -> column, of those that there are.

    Raises:
        DataError: a column that was named is not there, or there is none for the problem, the response or the label.
    """
    for column in columns.values():
        try:
            row.get(column)
        except DataError:
            raise DataError(f"there is no column {column}", where=row.source, fix=_how_to(row)) from None
    found = {role: next((name for name in names if name in row.values), "") for role, names in ROLES.items()}
    if row.values.keys() >= PROCESS_BENCH and not {"label", "first_error_index"} & columns.keys():
        found |= {"label": "", "first_error_index": "label"}
    found |= columns
    if "first_error_index" in columns and "label" not in columns and found["label"] == columns["first_error_index"]:
        found["label"] = ""
    for role in ("problem", "response"):
        if not found[role]:
            raise DataError(f"there is no column for the {role}", where=row.source, fix=_how_to(row, role))
    if not any(found[role] for role in ("label", "first_error_step", "first_error_index")):
        what = "there is no column for the label, and none for the first wrong step"
        raise DataError(what, where=row.source, fix=_how_to(row, "label"))
    return {role: column for role, column in found.items() if column}


def _how_to(row: Row, role: str = "problem") -> str:
    return f"name it by --column {role}=COLUMN; there are: {', '.join(row.values)}"


def _labelled(row: Row, named: Mapping[str, str]) -> Labelled | str:
    """The response of a row, or why it gives none."""

    def value(role: str) -> Any:
        return row.get(named[role]) if role in named else None

    problem, (response, starts) = str(value("problem") or "").strip(), _response(value("response"), row, named)
    if not problem:
        return "no problem"
    if not response.strip():
        return "no response"
    label, first_error = _level(value("label"), row, named), _first_error(value, row, named)
    if starts is not None and first_error is not None and first_error > len(starts):
        what = f"the first wrong step is number {first_error} of {len(starts)}"
        raise DataError(what, where=row.where, fix="first_error_step counts from 1, first_error_index from 0")
    if label is None and first_error is not None:
        label = 0.0 if first_error else 1.0
    if label is None:
        return "no label"
    if first_error is None and label == 1.0:
        first_error = 0
    if (label == 1.0 and first_error) or (label == 0.0 and first_error == 0):
        return "label against first wrong step"
    correct = _level(value("answer_correct"), row, named, "answer_correct")
    return Labelled(
        row=row.number,
        problem=problem,
        response=response,
        label=label,
        reference=str(value("reference") or "").strip() or None,
        starts=starts,
        first_error=first_error,
        answer_correct=None if correct is None else correct == 1.0,
        kind=str(value("kind") or ""),
    )


def _response(value: Any, row: Row, named: Mapping[str, str]) -> tuple[str, tuple[int, ...] | None]:
    """The text, and where its steps start if they are given one by one."""
    if value is None or isinstance(value, str):
        return value or "", None
    if not isinstance(value, list) or not all(isinstance(step, str) for step in value):
        what = f"column {named['response']} holds neither a text nor a list of them"
        raise DataError(what, where=row.where, fix=_how_to(row, "response"))
    # A step with lines of its own is kept together, as the judge counts paragraphs where there are any.
    between = "\n\n" if any("\n" in step.strip() for step in value) else "\n"
    steps = [step.strip() for step in value]
    starts, at = [], 0
    for step in steps:
        starts.append(at)
        at += len(step) + len(between)
    return between.join(steps), tuple(starts)


def _level(value: Any, row: Row, named: Mapping[str, str], role: str = "label") -> float | None:
    """The level that a label stands for; None where there is none."""
    text = str(value).strip().lower() if value is not None else ""
    if text in ABSENT:
        return None
    levels = LEVELS if role == "label" else (0.0, 1.0)
    level = WORDS.get(text)
    if level is None:
        try:
            level = float(text)
        except ValueError:
            level = -1.0
    if level in levels:
        return level
    known = f"{', '.join(f'{one:g}' for one in levels)}, or one of {', '.join(WORDS)}"
    raise DataError(
        f"column {named[role]} holds {value!r}, which is no {role}", where=row.where, fix=f"{role}: {known}"
    )


def _first_error(value: Any, row: Row, named: Mapping[str, str]) -> int | None:
    """The first wrong step from 1, 0 where none is wrong, None where that is not said."""
    for role, offset in (("first_error_step", 0), ("first_error_index", 1)):
        given = value(role)
        if given is None or str(given).strip().lower() in ABSENT:
            continue
        try:
            number = float(given) + offset
        except (TypeError, ValueError):
            number = -1.0
        if number < 0 or number != int(number):
            what = f"column {named[role]} holds {given!r}, which is the number of no step"
            raise DataError(what, where=row.where, fix=_how_to(row, role))
        return int(number)
    return None


def _sums(count: int, seed: int) -> Iterator[Labelled]:
    """`count` responses to problems of the embedded world, one of each of KINDS to a problem."""
    stream = random.Random(f"{seed}/labelled")
    seen: set[str] = set()
    made = 0
    while made < count:
        terms = draw_terms(stream, TIER)
        problem = prompt_of(terms)
        if problem in seen:
            continue
        seen.add(problem)
        for kind, label in KINDS.items():
            steps, first_error, answer = _steps(kind, terms, stream)
            if answer == sum(terms) and stream.random() < WRONG_ANSWERS:
                answer += stream.choice([1, 2])
            if made < count:
                yield Labelled(
                    row=made,
                    problem=problem,
                    response="\n".join([*steps, boxed(answer)]),
                    label=label,
                    reference=solution_of(terms),
                    first_error=first_error,
                    answer_correct=answer == sum(terms),
                    kind=kind,
                )
            made += 1


def _steps(kind: str, terms: list[int], stream: random.Random) -> tuple[list[str], int | None, int]:
    """The lines of a response of that kind but for the box, its first wrong line as `Labelled` has it, and the answer they lead to."""
    answer = sum(terms)
    if kind == "bare":
        return [], None, answer
    if kind == "merged":
        return _carried_out(terms[0], _runs(terms[1:], stream)), 0, answer
    steps = _carried_out(terms[0], [[term] for term in terms[1:]])
    if kind == "padded":
        for _ in range(stream.randint(1, 6)):
            left, right = stream.randint(1, 9), stream.choice([0, 1])
            steps.insert(stream.randint(0, len(steps)), f"{left}+{right}={left + right}")
        return steps, None, answer  # whether a true line that leads nowhere is a wrong step is a matter of the rubric
    if kind == "wrong":
        at, off = stream.randrange(len(steps)), stream.choice([1, 2])
        value = sum(terms[: at + 1])
        steps[at] = f"{value}{terms[at + 1]:+d}={value + terms[at + 1] + off}"
        if stream.random() < 0.5:
            steps[at + 1 :] = _carried_out(value + terms[at + 1] + off, [[term] for term in terms[at + 2 :]])
            answer += off
        return steps, at + 1, answer
    return steps, 0, answer


def _carried_out(value: int, runs: Sequence[Sequence[int]]) -> list[str]:
    """A true line for each run of terms, from `value` on."""
    lines = []
    for run in runs:
        lines.append(f"{value}{''.join(f'{term:+d}' for term in run)}={value + sum(run)}")
        value += sum(run)
    return lines


def _runs(terms: list[int], stream: random.Random) -> list[list[int]]:
    """The terms in runs of one or two, at least one of two."""
    runs: list[list[int]] = []
    while terms:
        size = stream.randint(1, 2)
        runs.append(terms[:size])
        terms = terms[size:]
    if all(len(run) == 1 for run in runs):
        at = stream.randrange(len(runs) - 1)
        runs[at : at + 2] = [runs[at] + runs[at + 1]]
    return runs
