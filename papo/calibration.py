"""`papo calibrate-judge`: how far a judge can be trusted, measured on solutions whose reasoning has been labelled."""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from papo.core.calibration import (
    Measured,
    agreement,
    auc,
    cohen_kappa,
    confusion,
    first_errors,
    intervals,
    krippendorff_alpha,
    nearest_level,
    partial_correlation,
    partial_slope,
)
from papo.core.credit import split_steps
from papo.core.groups import IndexArray
from papo.core.votes import vote_agreement
from papo.engines.judges import make_judge, store_of
from papo.engines.judges.model import Purpose
from papo.engines.labelled import Labelled, LabelledSet, labelled_set
from papo.engines.protocols import Judge, JudgeItem, Judgement, Tracker
from papo.engines.reporting.results import Calibration
from papo.errors import DataError, MissingInputError, StageError
from papo.params import Params, ScorePrmParams
from papo.schemas import CALIBRATION
from papo.store.files import read_json, write_json
from papo.store.layout import Workspace
from papo.store.manifest import Context
from papo.store.tables import write_rows

KINDS = 20
"""With more kinds of responses than this, the kind is taken for a name that says nothing."""

WRONG = 0.5
"""Combined vote from which the judge calls a step wrong."""

MEASURES = {
    "agreement": "agreement with the label",
    "kappa": "Cohen's kappa",
    "kappa_linear": "kappa, linear weights",
    "auc": "AUC of the score",
    "length_bias": "length bias",
    "length_effect": "score for 1 sd of length",
    "answer_bias": "answer bias",
}
"""Measures that have an interval -> what a person reads."""


def calibrate(
    params: Params,
    workspace: Workspace,
    context: Context,
    *,
    data: str,
    columns: Mapping[str, str] | None = None,
    out: Path | None = None,
    limit: int | None = None,
    tracker: Tracker | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Has the judge of `score_prm` judge labelled responses, and writes rows.parquet and calibration.json to a folder.

    Args:
        data, columns, limit: as `labelled_set` takes them; drawn by run.seed.
        out: the folder; None: artifacts/calibration/<judge>-<data> of the workspace.
        tracker: where the measures go on record.

    Returns:
        The folder and what calibration.json holds.

    Raises:
        ParamsError, DataError: as `labelled_set`.
        StageError: the judge gave another number of judgements than it was asked for.
    """
    labelled = labelled_set(data, columns=columns, limit=limit, seed=params.run.seed)
    judge = _judge(params, workspace, context)
    items = [JudgeItem(one.problem, one.reference, one.response) for one in labelled.responses]
    started = time.monotonic()
    with context.progress("calibrate", len(items)) as progress:
        judgements = judge.judge(items, progress)
    seconds = time.monotonic() - started
    if len(judgements) != len(items):
        raise StageError(
            f"{len(judgements)} judgements for {len(items)} responses", where=judge.name, fix="mend the judge"
        )
    found = summarise(judge, labelled, judgements, seed=params.run.seed, limit=params.score_prm.max_length_bias)
    found["seconds"] = round(seconds, 3)
    folder = out or workspace.calibrations / _name(judge.name, judge.rubric, labelled.name)
    write_rows(folder / "rows.parquet", CALIBRATION, _rows(judge, labelled, judgements))
    write_json(folder / "calibration.json", found)
    if tracker is not None:
        _record(params, tracker, folder, found)
    return folder, found


def _judge(params: Params, workspace: Workspace, context: Context) -> Judge:
    """The judge of the params; what a paid one costs is on an account of its own."""
    store, run = store_of(params.score_prm, workspace), f"calibrate-judge {workspace.root.resolve()}"
    return make_judge(params.score_prm, Purpose(store, run, variant="calibration", warn=context.warn))


def summarise(
    judge: Judge, labelled: LabelledSet, judgements: Sequence[Judgement], *, seed: int, limit: float
) -> dict[str, Any]:
    """What calibration.json holds; a measure that the data cannot give is null.

    Biases are those among responses of the same label, and of the same kind where there are at most KINDS of them. Length is in characters.
    """
    everyone = list(zip(labelled.responses, judgements, strict=True))
    pairs = [(one, judgement.score) for one, judgement in everyone if judgement.score is not None]
    named = [_first_error(one, judgement) for one, judgement in everyone]
    errors = first_errors(named, [one.first_error for one in labelled.responses])
    statuses = Counter(judgement.status for judgement in judgements)
    votes = [judgement.votes for judgement in judgements]
    ballots = sum(len(ballot) > 1 for ballot in votes)
    measured = _measured(pairs, labelled, seed)
    labels, levels = [one.label for one, _ in pairs], labelled.levels
    verdicts = nearest_level([score for _, score in pairs], levels)
    table = confusion(nearest_level(labels, levels), verdicts, len(levels))
    found: dict[str, Any] = {
        "schema_version": 1,
        "judge": judge.name,
        "rubric": judge.rubric,
        "data": labelled.name,
        "seed": seed,
        "max_length_bias": limit,
        "responses": len(everyone),
        "problems": len({one.problem for one, _ in everyone}),
        "scored": len(pairs),
        "missing_share": 1.0 - len(pairs) / len(everyone),
        "statuses": {status: count / len(everyone) for status, count in sorted(statuses.items())},
        "skipped": labelled.skipped,
        "levels": list(levels),
        "confusion": table.tolist(),
        **{name: value._asdict() for name, value in measured.items()},
        "votes": {"responses": ballots, "agreement": vote_agreement(votes), "alpha": krippendorff_alpha(votes)},
        "first_error": errors._asdict(),
        "kinds": _kinds(labelled, judgements),
        "tokens": {
            "prompt": sum(judgement.prompt_tokens for judgement in judgements),
            "completion": sum(judgement.completion_tokens for judgement in judgements),
        },
    }
    found["notes"] = _notes(found, judgements, labels)
    return found


def _measured(pairs: Sequence[tuple[Labelled, float]], labelled: LabelledSet, seed: int) -> dict[str, Measured]:
    labels = nearest_level([one.label for one, _ in pairs], labelled.levels)
    scores = np.array([score for _, score in pairs], dtype=np.float64)
    verdicts = nearest_level(scores, labelled.levels)
    lengths = np.array([len(one.response.strip()) for one, _ in pairs], dtype=np.float64)
    answers = np.array(
        [np.nan if one.answer_correct is None else one.answer_correct for one, _ in pairs], dtype=np.float64
    )
    kinds = {kind: number for number, kind in enumerate(_few_kinds(labelled))}
    alike = np.array([kinds.get(one.kind, 0) for one, _ in pairs], dtype=np.intp) * len(labelled.levels) + labels

    def counts(rows: IndexArray) -> IndexArray:
        return confusion(labels[rows], verdicts[rows], len(labelled.levels))

    def answer_bias(rows: IndexArray) -> float | None:
        told = rows[~np.isnan(answers[rows])]
        return partial_correlation(scores[told], answers[told], alike[told])

    return intervals(
        {
            "agreement": lambda rows: agreement(counts(rows)),
            "kappa": lambda rows: cohen_kappa(counts(rows)),
            "kappa_linear": lambda rows: cohen_kappa(counts(rows), "linear"),
            "auc": lambda rows: auc(labels[rows], scores[rows]),
            "length_bias": lambda rows: partial_correlation(scores[rows], lengths[rows], alike[rows]),
            "length_effect": lambda rows: partial_slope(scores[rows], lengths[rows], alike[rows]),
            "answer_bias": answer_bias,
        },
        [one.problem for one, _ in pairs],
        seed=seed,
    )


def _few_kinds(labelled: LabelledSet) -> list[str]:
    """The kinds in the order of the data; none if there are too many."""
    kinds = list(dict.fromkeys(one.kind for one in labelled.responses))
    return kinds if len(kinds) <= KINDS else []


def _first_error(one: Labelled, judgement: Judgement) -> int | None:
    """The first step that the judge calls wrong, numbered from 1 as the data has its steps; 0: none; None: it names none at all."""
    if judgement.wrong_steps is None:
        return None
    first = next((at for at, wrong in enumerate(judgement.wrong_steps) if wrong >= WRONG), None)
    if first is None:
        return 0
    return first + 1 if one.starts is None else bisect_right(one.starts, split_steps(one.response)[first].start)


def _kinds(labelled: LabelledSet, judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """A row a kind: how many there are, mean label and score, and how often both are of one level."""
    rows = []
    pairs = list(zip(labelled.responses, judgements, strict=True))
    for kind in _few_kinds(labelled):
        of_kind = [pair for pair in pairs if pair[0].kind == kind]
        scored = [(one.label, judgement.score) for one, judgement in of_kind if judgement.score is not None]
        labels, scores = [label for label, _ in scored], [score for _, score in scored]
        same = nearest_level(labels, labelled.levels) == nearest_level(scores, labelled.levels)
        rows.append(
            {
                "kind": kind or "-",
                "responses": len(of_kind),
                "scored": len(scored),
                "label": float(np.mean([one.label for one, _ in of_kind])),
                "score": float(np.mean(scores)) if scored else None,
                "agreement": float(np.mean(same)) if scored else None,
            }
        )
    return rows


def _notes(found: Mapping[str, Any], judgements: Sequence[Judgement], labels: Sequence[float]) -> list[str]:
    """How to read the numbers, where they need it."""
    notes = []
    if found["skipped"]:
        notes.append("rows left out: " + ", ".join(f"{reason} {count}" for reason, count in found["skipped"].items()))
    failed = Counter(judgement.status for judgement in judgements if judgement.score is None)
    for status, count in failed.most_common():
        reason = next(one.reason for one in judgements if one.score is None and one.status == status)
        notes.append(f"no score, {status}: {count} of {found['responses']}; such as: {_brief(reason)}")
    if not labels:
        return [*notes, "no response has a score: nothing is measured, and every measure is null"]
    if len(set(labels)) == 1:
        notes.append(f"every scored response is labelled {labels[0]:g}: kappa and AUC are not defined")
    elif found["length_bias"]["value"] is None:
        notes.append(
            "the score never differs among responses of one kind and label, or their length does not: no bias to measure"
        )
    if Measured(**found["length_bias"]).beyond(found["max_length_bias"]):
        notes.append(f"the length bias is above score_prm.max_length_bias, {found['max_length_bias']:g}")
    return notes


def _brief(text: str) -> str:
    line = " ".join(text.split()) or "no reason given"
    return line if len(line) <= 120 else f"{line[:117]}..."


def _rows(judge: Judge, labelled: LabelledSet, judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    return [
        {
            "row": one.row,
            "kind": one.kind,
            "problem": one.problem,
            "reference_solution": one.reference,
            "response": one.response,
            "label": one.label,
            "first_error": one.first_error,
            "answer_correct": one.answer_correct,
            "prm_score": judgement.score,
            "status": judgement.status,
            "reason": judgement.reason,
            "votes": judgement.votes,
            "wrong_steps": judgement.wrong_steps,
            "judge": judge.name,
            "rubric": judge.rubric,
            "prompt_tokens": judgement.prompt_tokens,
            "completion_tokens": judgement.completion_tokens,
            "cached": judgement.cached,
        }
        for one, judgement in zip(labelled.responses, judgements, strict=True)
    ]


def _name(judge: str, rubric: str, data: str) -> str:
    """`<judge>-<data>`; the rubric between them where it is not named after the judge."""
    parts = [judge, data] if rubric.split("/")[0] == judge else [judge, rubric, data]
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") or "unnamed" for part in parts)


def _record(params: Params, tracker: Tracker, folder: Path, found: Mapping[str, Any]) -> None:
    """A run of its own on the record: the measures that are defined, and calibration.json."""
    metrics = {name: found[name]["value"] for name in MEASURES} | {"missing_share": found["missing_share"]}
    metrics |= {f"votes_{name}": found["votes"][name] for name in ("agreement", "alpha")}
    metrics |= {f"first_error_{name}": found["first_error"][name] for name in ("found", "none_right", "exact")}
    tags = {"papo.kind": "calibration"} | {f"papo.{name}": str(found[name]) for name in ("judge", "rubric", "data")}
    tracker.start(f"calibrate-{folder.name}", params.flat(), tags)
    tracker.artifact(folder / "calibration.json")
    tracker.finish("FINISHED", {f"calibration/{name}": value for name, value in metrics.items() if value is not None})


# ---- what a run makes of the calibrations that are there ----


def calibrations(params: ScorePrmParams, workspace: Workspace) -> dict[str, Path]:
    """Name of the folder -> calibration.json, of those of the judge and the rubric that the params name; a damaged one is none."""
    paths = sorted(workspace.calibrations.glob("*/calibration.json"))
    if not paths:
        return {}
    judge = make_judge(params)
    found = {}
    for path in paths:
        known = _read(path)
        if known is not None and (known.judge, known.rubric) == (judge.name, judge.rubric):
            found[path.parent.name] = path
    return found


def length_warnings(params: Params, workspace: Workspace) -> list[str]:
    """A line for each calibration in which the run's judge follows the length; none if the variant asks no judge."""
    if params.advantage.variant == "orm":
        return []
    lines, limit = [], params.score_prm.max_length_bias
    for path in calibrations(params.score_prm, workspace).values():
        known = _read(path)
        if known is not None and Measured(**known.length_bias.model_dump()).beyond(limit):
            lines.append(
                f"the judge {known.judge} ({known.rubric}) follows the length of a response: correlation {known.length_bias} among "
                f"equally good ones of {known.data}, above score_prm.max_length_bias {limit:g} ({path})"
            )
    return lines


def _read(path: Path) -> Calibration | None:
    try:
        return Calibration.model_validate(read_json(path))
    except (DataError, MissingInputError, ValueError):
        return None
