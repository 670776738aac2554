"""prepare: problem sets with content ids, benchmarks that share no problem with training, warm-start traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from papo.engines.protocols import Problem, Source
from papo.errors import DataError
from papo.params import PrepareParams
from papo.schemas import PROBLEMS, TRACES, problem_id
from papo.store.files import replacing
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import write_rows

CODE = ("stages/prepare.py", "engines/sources")


@dataclass(frozen=True)
class Inputs:
    """The content of a local source file, where there is one: a changed file is a new data set."""

    files: dict[str, Path]


def local_files(params: PrepareParams) -> dict[str, Path]:
    """The files that the params name and that exist on this machine, by the name they have there."""
    names = [params.source, *params.eval_sources.values()]
    return {name: Path(name) for name in names if Path(name).is_file()}


def run(params: PrepareParams, inputs: Inputs, out: Path, *, engine: Source, context: Context = Context()) -> Manifest:
    """Writes train.parquet, traces.parquet and eval/<benchmark>.parquet under the folder `out`.

    Raises:
        DataError: no problems, or a problem twice.

    A training problem that is also in a benchmark is left out and counted as `contaminated`.
    """
    task = Task("prepare", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    benchmarks = {name: _rows(problems, f"benchmark {name}", "eval") for name, problems in engine.benchmarks().items()}
    train = _rows(engine.train(), "training set", "train")
    # By prompt: the same problem with its answer written otherwise has another id.
    held_out = {row["prompt"] for rows in benchmarks.values() for row in rows}
    clean = [row for row in train if row["prompt"] not in held_out]
    if not clean:
        raise DataError(
            "every training problem is also in a benchmark", where=params.source, fix="use other eval_sources"
        )
    traces = [{"prompt": prompt, "completion": completion} for prompt, completion in engine.traces()]
    # The folder is one output, so it is replaced as a whole.
    with replacing(out) as folder:
        write_rows(folder / "train.parquet", PROBLEMS, clean)
        write_rows(folder / "traces.parquet", TRACES, traces)
        for name, rows in benchmarks.items():
            write_rows(folder / "eval" / f"{name}.parquet", PROBLEMS, rows)
    counts = {"train": len(clean), "contaminated": len(train) - len(clean), "traces": len(traces)}
    counts |= {name: len(rows) for name, rows in benchmarks.items()}
    return task.finish(rows=len(clean), counts=counts)


def _rows(problems: Iterable[Problem], what: str, split: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {
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
        for problem in problems
    ]
    if not rows:
        raise DataError(f"the {what} holds no problems", where="prepare", fix="check prepare.source and its columns")
    twice = [row for row, times in Counter(str(row["prompt"]) for row in rows).items() if times > 1]
    if twice:
        raise DataError(
            f"the {what} holds {len(twice)} problems more than once, the first is {twice[0][:80]!r}",
            where="prepare",
            fix="remove the duplicates",
        )
    return rows
