"""prepare: problem sets with content ids, training problems that no benchmark holds, every drop with its reason, a data card."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from papo.engines.decontamination import matches
from papo.engines.protocols import Drop, Problem, Source
from papo.errors import DataError
from papo.params import GENERATED, PrepareParams
from papo.schemas import DROPPED, PROBLEMS, TRACES, Grading, problem_id
from papo.store.faults import reached
from papo.store.files import digest, replacing, write_json
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_columns, write_rows

CODE = (
    "stages/prepare.py",
    "engines/sources",
    "engines/decontamination.py",
    "engines/verifiers/math_verify.py",
    "core/answers.py",
)

TIERS = (0.0, 0.125, 0.375, 0.625, 0.875, 1.0)
"""Bounds of the five tiers of the pass rate, each without its lower and with its upper one."""

KEPT_CHARS = 2_000
"""Of a dropped prompt."""

Item = Problem | Drop

Unreadable = Callable[[Iterable[str]], Mapping[str, str]]
"""Gold answers -> those that cannot be read, each with what became of it."""


@dataclass(frozen=True)
class Inputs:
    """The content of a local source file, where there is one: a changed file is a new data set."""

    files: dict[str, Path]


def local_files(params: PrepareParams) -> dict[str, Path]:
    """The files that the params name and that exist on this machine, by the name they have there."""
    names = [params.source, *(item.source for item in params.eval_sources.values())]
    return {name: Path(name) for name in names if Path(name).is_file()}


def run(
    params: PrepareParams,
    inputs: Inputs,
    out: Path,
    *,
    engine: Source,
    unreadable: Unreadable = lambda golds: {},
    context: Context = Context(),
) -> Manifest:
    """Writes train, traces and dropped.parquet, eval/<benchmark>.parquet and card.json under the folder `out`.

    Training problems go through, in this order: too long, unreadable, never solved; held out; contaminated; drawn by tier; at most
    `max_problems`.

    Args:
        unreadable: which of many gold answers in mathematics no answer can be compared with. Such a training problem is dropped;
            of a benchmark it is kept and warned about.

    Raises:
        DataError: no problems are left, saying how many were dropped why; or a problem twice.
    """
    task = Task("prepare", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    reached("read source")
    read = {"train": list(engine.train())} | {name: list(items) for name, items in engine.benchmarks().items()}
    dropped: dict[str, list[Drop]] = {name: [] for name in read}
    benchmarks = {name: _kept(items, dropped[name]) for name, items in read.items() if name != "train"}
    bad = unreadable(_golds(item for items in read.values() for item in items))
    usable, held_out = _split(_kept(_usable(read["train"], params, bad), dropped["train"]), params)
    for name, problems in benchmarks.items():
        if unread := [gold for gold in _golds(problems) if gold in bad]:
            what = f"{len(unread)} gold answers of {name} are not readable as mathematics, and compared only as text"
            context.warn(f"{what}: {_few(unread)}")
    benchmarks |= held_out
    clean = _kept(_clean(usable, benchmarks, params), dropped["train"])
    train = _drawn(clean, params, context.warn)
    tables = {
        name: _rows(problems, name, dropped.get(name, [])) for name, problems in ({"train": train} | benchmarks).items()
    }
    traces = [{"prompt": prompt, "completion": completion} for prompt, completion in engine.traces()]
    card = {
        "sets": {name: _described(rows) for name, rows in tables.items()},
        "read_as": {name: _formats(items) for name, items in read.items()},
        "dropped": {name: dict(Counter(drop.reason for drop in drops)) for name, drops in dropped.items()},
        "not_drawn": len(clean) - len(train),
        "files": {name: digest(path) for name, path in inputs.files.items()},
        "seed": params.seed,
        "traces": len(traces),
    }
    # The folder is one output, so it is replaced as a whole.
    with replacing(out) as folder:
        for name, rows in tables.items():
            write_rows(folder / ("train.parquet" if name == "train" else f"eval/{name}.parquet"), PROBLEMS, rows)
        write_rows(folder / "traces.parquet", TRACES, traces)
        write_rows(folder / "dropped.parquet", DROPPED, list(_dropped_rows(dropped)))
        write_json(folder / "card.json", card)
    return task.finish(rows=len(train), counts=_counts(card), metrics=_metrics(card))


@dataclass(frozen=True)
class BenchmarkInputs:
    """As `Inputs`, of one benchmark; `train` is what it is compared with."""

    name: str
    files: dict[str, Path]
    train: Path


def run_benchmark(
    params: PrepareParams, inputs: BenchmarkInputs, out: Path, *, engine: Source, context: Context = Context()
) -> Manifest:
    """Writes the table of one benchmark that is not among those of the run, and says how many training problems it holds.

    Raises:
        DataError: it cannot be read, or holds no problems.
    """
    task = Task("prepare", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    dropped: list[Drop] = []
    problems = _kept(engine.benchmarks()[inputs.name], dropped)
    rows = _rows(problems, inputs.name, dropped)
    train = [row["prompt"] for row in read_columns(inputs.train, PROBLEMS, "prompt")]
    prompts = {inputs.name: [problem.prompt for problem in problems]}
    if seen := matches(train, prompts, threshold=params.near_match):
        context.warn(
            f"{len(seen)} training problems are those of {inputs.name}, which was no benchmark when they were prepared: "
            f"what was trained on them has seen the answers; add {inputs.name} to prepare.eval_sources"
        )
    write_rows(out, PROBLEMS, rows)
    counts = {"contaminated": len(seen)} | dict(Counter(f"dropped, {drop.reason}" for drop in dropped))
    return task.finish(rows=len(rows), counts=counts)


def tier_of(pass_rate: float) -> str | None:
    """`0.125-0.375` for a rate above 0.125 and at most 0.375; None for 0, which is in no tier."""
    return next((_tier_name(low, high) for low, high in pairwise(TIERS) if low < pass_rate <= high), None)


def _tier_name(low: float, high: float) -> str:
    return f"{low:g}-{high:g}"


def _kept(items: Iterable[Item], dropped: list[Drop]) -> list[Problem]:
    """The problems; the others are added to `dropped`."""
    found = list(items)
    dropped += [item for item in found if isinstance(item, Drop)]
    return [item for item in found if isinstance(item, Problem)]


def _drop(problem: Problem, reason: str, detail: str, **match: Any) -> Drop:
    return Drop(problem.source, problem.row, reason, detail, problem.prompt, **match)


def _golds(items: Iterable[Item]) -> Iterator[str]:
    return (item.answer for item in items if isinstance(item, Problem) and item.grading.kind == "math")


def _few(names: Iterable[str]) -> str:
    first, *more = (repr(name[:40]) for name in names)
    return ", ".join([first, *more[:2]]) + (", ..." if len(more) > 2 else "")


def _usable(items: Iterable[Item], params: PrepareParams, bad: Mapping[str, str]) -> Iterator[Item]:
    for item in items:
        if isinstance(item, Drop):
            yield item
        elif len(item.prompt) > params.max_prompt_chars:
            yield _drop(item, "too_long", f"{len(item.prompt)} characters")
        elif item.grading.kind == "math" and item.answer in bad:
            yield _drop(item, "unparsable_gold", f"{item.answer} ({bad[item.answer]})")
        elif params.drop_never_solved and item.pass_rate == 0.0:
            yield _drop(item, "never_solved", "pass rate 0")
        else:
            yield item


def _split(train: list[Problem], params: PrepareParams) -> tuple[list[Problem], dict[str, list[Problem]]]:
    """What is left to train on, and the benchmark `holdout`; which are which is the source's order, and so the seed's."""
    if not params.holdout or params.source in GENERATED:
        return train, {}
    if params.holdout >= len(train) > 0:
        raise DataError(
            f"{params.holdout} problems to hold out of {len(train)}", where=params.source, fix="lower prepare.holdout"
        )
    return train[params.holdout :], {"holdout": train[: params.holdout]}


def _clean(
    train: Sequence[Problem], benchmarks: Mapping[str, Sequence[Problem]], params: PrepareParams
) -> Iterator[Item]:
    prompts = {name: [problem.prompt for problem in problems] for name, problems in benchmarks.items()}
    found = matches([problem.prompt for problem in train], prompts, threshold=params.near_match)
    for index, problem in enumerate(train):
        if (match := found.get(index)) is None:
            yield problem
            continue
        twin = benchmarks[match.benchmark][match.place]
        yield _drop(
            problem,
            "contaminated",
            "equal" if match.equal else "near",
            benchmark=match.benchmark,
            match_id=problem_id(twin.prompt, twin.answer),
            score=match.score,
        )


def _drawn(problems: Sequence[Problem], params: PrepareParams, warn: Callable[[str], None]) -> Sequence[Problem]:
    """Problems by tier, if there are to be tiers, and `max_problems` of them at most."""
    drawn = problems if params.tiers is None else _by_tier(problems, params.tiers.per_tier, params.seed, warn)
    return drawn[: params.max_problems]


def _by_tier(problems: Sequence[Problem], per_tier: int, seed: int, warn: Callable[[str], None]) -> list[Problem]:
    """As many problems of each tier, drawn by the seed, in the order they had; all of a tier that has too few."""
    tiers: dict[str, list[int]] = {_tier_name(*bounds): [] for bounds in pairwise(TIERS)}
    for index, problem in enumerate(problems):
        if problem.pass_rate is not None and (name := tier_of(problem.pass_rate)):
            tiers[name].append(index)
    if problems and not any(tiers.values()):
        raise DataError(
            f"none of {len(problems)} training problems has a pass rate above 0",
            where="prepare.tiers",
            fix="name the column of the pass rates, or leave the tiers out",
        )
    chosen: dict[int, str] = {}
    for name, indices in tiers.items():
        if len(indices) < per_tier:
            warn(f"the tier {name} of the pass rate has {len(indices)} problems, {per_tier} asked for")
        drawn = random.Random(f"{seed}/{name}").sample(indices, min(per_tier, len(indices)))
        chosen |= dict.fromkeys(drawn, name)
    return [replace(problems[index], tier=chosen[index]) for index in sorted(chosen)]


def _rows(problems: Sequence[Problem], name: str, dropped: Sequence[Drop]) -> list[dict[str, Any]]:
    what = "training set" if name == "train" else f"benchmark {name}"
    if not problems:
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(drop.reason for drop in dropped).items())
        raise DataError(
            f"the {what} holds no problems" + (f" after the drops: {reasons}" if reasons else ""),
            where="prepare",
            fix="check the source, its format and columns, and the limits in prepare",
        )
    twice = [prompt for prompt, times in Counter(problem.prompt for problem in problems).items() if times > 1]
    if twice:
        raise DataError(
            f"the {what} holds {len(twice)} problems more than once, the first is {twice[0][:80]!r}",
            where="prepare",
            fix="remove the duplicates",
        )
    return [_row(problem, "train" if name == "train" else "eval") for problem in problems]


def _row(problem: Problem, split: str) -> dict[str, Any]:
    return {
        "problem_id": problem_id(problem.prompt, problem.answer),
        "prompt": problem.prompt,
        "answer": problem.answer,
        "grading": problem.grading.model_dump_json(exclude_defaults=True),
        "reference_solution": problem.reference_solution,
        "source": problem.source,
        "tier": problem.tier,
        "pass_rate": problem.pass_rate,
        "split": split,
    }


def _dropped_rows(dropped: Mapping[str, Sequence[Drop]]) -> Iterator[dict[str, Any]]:
    for name, drops in dropped.items():
        for drop in drops:
            yield asdict(drop) | {"set": name, "prompt": drop.prompt[:KEPT_CHARS], "detail": drop.detail[:KEPT_CHARS]}


def _described(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the card says of a set."""
    ids = "\n".join(sorted(row["problem_id"] for row in rows))
    return {
        "problems": len(rows),
        "by_source": dict(Counter(row["source"] for row in rows)),
        "by_tier": dict(Counter(row["tier"] or "none" for row in rows)),
        "by_kind": dict(Counter(Grading.model_validate_json(row["grading"]).kind for row in rows)),
        "with_solution": sum(row["reference_solution"] is not None for row in rows),
        "prompt_chars": _lengths([len(row["prompt"]) for row in rows]),
        "answer_chars": _lengths([len(row["answer"]) for row in rows]),
        "digest": hashlib.sha256(ids.encode()).hexdigest(),
    }


def _lengths(values: Sequence[int]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "p95": float(np.quantile(values, 0.95)), "max": float(max(values))}


def _formats(items: Sequence[Item]) -> dict[str, int]:
    return dict(Counter(item.format for item in items if isinstance(item, Problem) and item.format))


def _counts(card: Mapping[str, Any]) -> dict[str, int]:
    counts = {name: int(described["problems"]) for name, described in card["sets"].items()}
    counts |= {"contaminated": card["dropped"]["train"].get("contaminated", 0), "not_drawn": card["not_drawn"]}
    counts |= {"traces": card["traces"]}
    for name, reasons in card["dropped"].items():
        counts |= {f"{name} dropped, {reason}": count for reason, count in reasons.items()}
    for name, formats in card["read_as"].items():
        counts |= {f"{name} read as {kind}": count for kind, count in formats.items()}
    return counts


def _metrics(card: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the card."""
    metrics: dict[str, float] = {}
    for name, described in card["sets"].items():
        metrics[f"{name}/problems"] = described["problems"]
        metrics[f"{name}/prompt_chars_mean"] = described["prompt_chars"]["mean"]
        metrics |= {f"{name}/by_tier/{key}": count for key, count in described["by_tier"].items()}
    for name, reasons in card["dropped"].items():
        metrics |= {f"{name}/dropped/{reason}": count for reason, count in reasons.items()}
    return metrics
