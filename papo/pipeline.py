"""The pipeline as a list of steps, and how each is run: its params, inputs, output and engine. Used by the CLI, DVC and the flows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from papo.calibration import calibrations
from papo.decisions import read_decisions, read_last_good
from papo.engines.protocols import Judge, Sampler, Verifier
from papo.engines.reporting import TABLES
from papo.errors import MissingInputError, ParamsError
from papo.params import UNDECIDING, Params, defined_benchmarks, to_json, with_values
from papo.schemas import EVALUATION, PROBLEMS
from papo.stages import advantage, evaluate, prepare, report, rollout, score_orm, score_prm, train, warmstart
from papo.store.faults import reached
from papo.store.files import read_json
from papo.store.layout import Workspace
from papo.store.manifest import Context, Manifest, code_digest
from papo.store.tables import read_columns, read_rows, write_rows

if TYPE_CHECKING:
    from papo.ahead import Ahead
    from papo.engines.serving import Servers

T = TypeVar("T")

ROUND_STAGES = ("rollout", "score_orm", "score_prm", "advantage", "train")
STAGES = ("prepare", "warmstart", *ROUND_STAGES, "evaluate", "report")
NO_RESULT = (*(f"{section}." for section in UNDECIDING), "run.overlap", "run.ray")
"""What keys of params begin with that decide no result."""
CODE = {
    "prepare": prepare.CODE,
    "warmstart": warmstart.CODE,
    "rollout": rollout.CODE,
    "score_orm": score_orm.CODE,
    "score_prm": score_prm.CODE,
    "advantage": advantage.CODE,
    "train": train.CODE,
    "evaluate": evaluate.CODE,
    "report": report.CODE,
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage, of one round where it belongs to a round."""

    stage: str
    round: int | None = None

    @property
    def command(self) -> str:
        name = self.stage.replace("_", "-")
        return f"papo {name}" if self.round is None else f"papo {name} --round {self.round}"

    def __str__(self) -> str:
        return self.stage if self.round is None else f"{self.stage} {self.round}"


def steps(params: Params) -> Iterator[Step]:
    """Every step of a run, in order."""
    yield from (Step("prepare"), Step("warmstart"))
    for round_ in range(params.run.rounds):
        yield from (Step(stage, round_) for stage in ROUND_STAGES)
    yield from (Step("evaluate"), Step("report"))


def lineage(params: Params) -> str:
    """Twelve hex digits that name what a run is a run of: its params that decide results, and the code of every stage."""
    sections = {
        name: json.loads(to_json(getattr(params, name))) for name in Params.model_fields if name not in UNDECIDING
    }
    sections |= {"run": params.run.deciding, "rollout": params.rollout.deciding, "score_prm": params.score_prm.deciding}
    identity = {"params": sections, "code": {stage: code_digest(CODE[stage]) for stage in CODE}}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def run_step(
    step: Step, params: Params, workspace: Workspace, context: Context, ahead: Ahead | None = None
) -> Manifest:
    """Runs one step, or finds that there is nothing to do.

    Args:
        ahead: of the step's round, as `make_ahead` makes it: what it has scored is not scored again.

    Raises:
        ParamsError: the step's round is missing, or not one of the run's.
        MissingInputError: naming the file and the command that makes it.
    """
    name = Step(step.stage).command
    if step.stage in ROUND_STAGES and step.round is None:
        raise ParamsError(f"{step.stage} needs --round", where=name, fix=f"name the round: {name} --round 0")
    if step.stage not in ROUND_STAGES and step.round is not None:
        raise ParamsError(f"{step.stage} takes no --round", where=name, fix="leave it out: the stage runs once")
    if step.round is not None and not 0 <= step.round < params.run.rounds:
        raise ParamsError(
            f"there is no round {step.round}: run.rounds is {params.run.rounds}",
            where="--round",
            fix=f"use 0 to {params.run.rounds - 1}, or raise run.rounds",
        )
    run: dict[str, Any] = {
        "prepare": _prepare,
        "warmstart": _warmstart,
        "rollout": partial(_rollout, ahead=ahead),
        "score_orm": partial(_score_orm, ahead=ahead),
        "score_prm": partial(_score_prm, ahead=ahead),
        "advantage": _advantage,
        "train": _train,
        "evaluate": _evaluate,
        "report": _report,
    }
    _allow_code(params)
    reached("stage begins", detail=str(step))
    manifest: Manifest = run[step.stage](params, workspace, context, step.round)
    reached("stage ends", detail=str(step))
    return manifest


def _allow_code(params: Params) -> None:
    from papo.engines.policy import allow_code

    allow_code(params.warmstart.trust_code)


def _prepare(params: Params, workspace: Workspace, context: Context, round_: None) -> Manifest:
    from papo.engines.sources import make_source
    from papo.engines.verifiers.math_verify import unreadable_golds

    inputs = prepare.Inputs(files=prepare.local_files(params.prepare))
    source = make_source(params.prepare, warn=context.warn)
    unreadable = partial(unreadable_golds, timeout_s=params.score_orm.timeout_s, workers=params.score_orm.workers)
    return prepare.run(
        params.prepare, inputs, workspace.problems, engine=source, unreadable=unreadable, context=context
    )


def _warmstart(params: Params, workspace: Workspace, context: Context, round_: None) -> Manifest:
    from papo.engines.warmstart import make_warm_starter

    checkpoint = warmstart.local_checkpoint(params.warmstart)
    inputs = _there(warmstart.Inputs(traces=workspace.traces, checkpoint=checkpoint), workspace)
    engine = make_warm_starter(params.warmstart)
    return warmstart.run(params.warmstart, inputs, workspace.warmstart, engine=engine, context=context)


def make_ahead(params: Params, workspace: Workspace, context: Context, round_: int) -> Ahead:
    """What scores the shards of a round while others are sampled."""
    from papo.ahead import Ahead
    from papo.engines.tokenizer import TokenizerAligner

    variant = params.advantage.variant
    judge = None if variant == "orm" else _judge(params, workspace, context, round_=round_, variant=variant)
    aligner = TokenizerAligner(workspace.warmstart / "tokenizer.json") if variant == "capo" else None
    return Ahead(workspace.train_problems, params.advantage, _verifier(params, context), judge, aligner)


def _scoring(params: Params, workspace: Workspace, context: Context, round_: int) -> dict[str, Any]:
    """What decides the advantage of a group."""
    judge = _judge(params, workspace, context, round_=round_, variant=params.advantage.variant)
    sections = {name: json.loads(to_json(getattr(params, name))) for name in ("score_orm", "advantage")}
    code = {stage: code_digest(CODE[stage]) for stage in ("score_orm", "score_prm", "advantage")}
    return {**sections, "score_prm": params.score_prm.deciding, "rubric": judge.digest, "code": code}


def _rollout(params: Params, workspace: Workspace, context: Context, round_: int, *, ahead: Ahead | None) -> Manifest:
    from papo.engines.recompute import PolicyRecomputer
    from papo.engines.samplers import make_sampler

    p = params.rollout
    policy = workspace.policy(round_ - 1)
    inputs = rollout.Inputs(round=round_, seed=params.run.seed, problems=workspace.train_problems, policy=policy)
    scorer = None
    if p.max_prompts is not None:
        scorer = ahead = ahead or make_ahead(params, workspace, context, round_)
        inputs = dataclasses.replace(inputs, scoring=_scoring(params, workspace, context, round_))
    out = workspace.table(round_, "rollouts")
    # What a server serves that was never handed this policy.
    others = (workspace.policy(round_ - 2), workspace.warmstart) if round_ else ()
    with _servers(params, workspace, context) as servers, ExitStack() as opened:
        sampler = make_sampler(
            p, policy, temperature=p.temperature, top_p=p.top_p, max_new_tokens=p.max_new_tokens,
            logs=workspace.work / "engines", others=others, urls=lambda: servers.serve(policy), warn=context.warn,
        )  # fmt: skip
        opened.callback(servers.close)
        opened.callback(sampler.close)
        recomputer = PolicyRecomputer(policy, temperature=p.temperature)
        return rollout.run(
            p, _there(inputs, workspace), out,
            engine=rollout.Engine(sampler, recomputer, scorer, release=opened.close),
            finished=ahead.add if ahead is not None else None,
            context=context,
        )  # fmt: skip


def _servers(params: Params, workspace: Workspace, context: Context) -> Servers:
    """Those that rollouts and evaluation sample from; what papo starts of them ends with the stage, so that training has its memory."""
    from papo.engines.serving import Servers

    return Servers(params.rollout.server, workspace.work / "servers", say=context.say)


def _score_orm(params: Params, workspace: Workspace, context: Context, round_: int, *, ahead: Ahead | None) -> Manifest:
    from papo.engines.second_opinion import make_second_opinion

    inputs = score_orm.Inputs(
        round=round_, rollouts=workspace.table(round_, "rollouts"), problems=workspace.train_problems
    )
    engine = _verifier(params, context) if ahead is None else ahead.verifier()
    second_opinion = make_second_opinion(params.score_orm.second_opinion)
    out = workspace.table(round_, "orm")
    return score_orm.run(
        params.score_orm, _there(inputs, workspace), out, engine=engine, second_opinion=second_opinion, context=context
    )


def _score_prm(params: Params, workspace: Workspace, context: Context, round_: int, *, ahead: Ahead | None) -> Manifest:
    variant = params.advantage.variant
    engine = ahead.judge() if ahead is not None else None
    if engine is None:
        engine = _judge(params, workspace, context, round_=round_, variant=variant)
    inputs = score_prm.Inputs(
        round=round_,
        variant=variant,
        rollouts=workspace.table(round_, "rollouts"),
        orm=workspace.table(round_, "orm"),
        problems=workspace.train_problems,
        rubric=engine.digest,
    )
    out = workspace.table(round_, "prm")
    return score_prm.run(params.score_prm, _there(inputs, workspace), out, engine=engine, context=context)


def _verifier(params: Params, context: Context) -> Verifier:
    """The verifier of the params, here or spread over other machines."""
    from papo.engines.fan_out import SpreadVerifier
    from papo.engines.verifiers import make_verifier

    make = partial(make_verifier, params.score_orm)
    if context.spread is None:
        return make()
    return SpreadVerifier(make, context.spread, cpus=params.score_orm.workers)


def _judge(params: Params, workspace: Workspace, context: Context, *, round_: int, variant: str) -> Judge:
    """The judge of the params, with the store of this workspace, on the account of this run.

    Raises:
        ParamsError: there is no such rubric, it cannot be used, or it names no wrong steps for `capo` to debit.
    """
    from papo.engines.fan_out import SpreadJudge
    from papo.engines.judges import make_judge, store_of
    from papo.engines.judges.model import Purpose
    from papo.engines.judges.rubrics import load_rubric

    if params.score_prm.judge != "model":
        make = partial(make_judge, params.score_prm)
        return make() if context.spread is None else SpreadJudge(make, context.spread)
    if variant == "capo" and load_rubric(params.score_prm.rubric).kind != "steps":
        raise ParamsError(
            f"advantage.variant capo debits wrong steps, and the rubric {params.score_prm.rubric} names none",
            where="score_prm.rubric",
            fix="take wrong-steps or another rubric of kind steps, or another variant",
        )
    run = f"{lineage(params)} {workspace.root.resolve()}"
    store = store_of(params.score_prm, workspace)
    return make_judge(params.score_prm, Purpose(store, run, round_, variant, warn=context.warn, trace=context.trace))


def check_judge(params: Params, workspace: Workspace, context: Context) -> None:
    """For the start of a run, hours before its judge is asked.

    Raises:
        ParamsError, SetupError: the judge that its variant asks cannot be asked here.
    """
    if params.advantage.variant != "orm":
        _judge(params, workspace, context, round_=0, variant=params.advantage.variant).check()


def check_trainer(params: Params) -> None:
    """For the start of a run, hours before it trains.

    Raises:
        ParamsError, SetupError: what `train` asks for cannot be had here.
    """
    from papo.engines import training

    training.check_trainer(params.train)


def check_sampler(params: Params, workspace: Workspace, context: Context) -> None:
    """For the start of a run, before the warm start is made.

    Raises:
        SetupError: what `rollout.engine` names cannot be had here.
    """
    from papo.engines.samplers import make_sampler

    p = params.rollout
    if p.engine == "vllm-server":
        _servers(params, workspace, context).check()
    make_sampler(
        p, workspace.warmstart, temperature=p.temperature, top_p=p.top_p, max_new_tokens=p.max_new_tokens,
        logs=workspace.work / "engines",
    ).check()  # fmt: skip


def _advantage(params: Params, workspace: Workspace, context: Context, round_: int) -> Manifest:
    from papo.engines.tokenizer import TokenizerAligner

    rollouts, orm, prm = (workspace.table(round_, name) for name in ("rollouts", "orm", "prm"))
    # Every round's policy has the tokenizer of the warm start.
    tokenizer = workspace.warmstart / "tokenizer.json" if params.advantage.variant == "capo" else None
    inputs = advantage.Inputs(round=round_, rollouts=rollouts, orm=orm, prm=prm, tokenizer=tokenizer)
    engine = TokenizerAligner(tokenizer) if tokenizer is not None else None
    out = workspace.table(round_, "advantages")
    return advantage.run(params.advantage, _there(inputs, workspace), out, engine=engine, context=context)


def _train(params: Params, workspace: Workspace, context: Context, round_: int) -> Manifest:
    from papo.engines.training import make_trainer

    inputs = train.Inputs(
        round=round_,
        seed=params.run.seed,
        rollouts=workspace.table(round_, "rollouts"),
        advantages=workspace.table(round_, "advantages"),
        policy=workspace.policy(round_ - 1),
        state=workspace.trainer(round_ - 1) if round_ else None,
        reference=workspace.warmstart if params.train.needs_reference else None,
        temperature=params.rollout.temperature,
        max_new_tokens=params.rollout.max_new_tokens,
    )
    engine = make_trainer(
        params.train,
        temperature=params.rollout.temperature,
        max_new_tokens=params.rollout.max_new_tokens,
        seed=params.run.seed,
        warn=context.warn,
    )
    return train.run(params.train, _there(inputs, workspace), workspace.policy(round_), engine=engine, context=context)


def evaluate_policies(
    params: Params,
    workspace: Workspace,
    context: Context,
    *,
    policy: str,
    against: str | None = None,
    benchmarks: Mapping[str, str | None] | None = None,
    samples: int | None = None,
) -> tuple[Path, Manifest]:
    """Evaluates a policy, and with `against` the paired difference from another; beside the pipeline's own evaluation.

    Args:
        policy, against: `warmstart`, `final`, `round-<k>`, or a folder.
        benchmarks: by name; with a source, or if `prepare` makes none of that name, it is read on its own. None: evaluate.benchmarks.
        samples: k; None: evaluate.samples_per_problem.

    Returns:
        The folder with metrics.json and the samples of each benchmark, and its manifest.

    Raises:
        ParamsError: not the name of a policy, or the same twice.
        MissingInputError: a policy or benchmark is not there.
    """
    named = {name: _named_policy(name, params, workspace) for name in (against, policy) if name is not None}
    if policy == against:
        raise ParamsError(f"{policy} against itself", where="--against", fix="name another policy")
    asked = dict.fromkeys(params.evaluate.benchmarks) if benchmarks is None else benchmarks
    made = params.benchmarks_made
    beside = {name: source for name, source in asked.items() if source is not None or name not in made}
    known = defined_benchmarks()
    if unknown := [name for name, source in beside.items() if source is None and name not in known]:
        fix = f"name one of {', '.join([*made, *(name for name in known if name not in made)])}, or NAME=SOURCE"
        raise ParamsError(f"there is no benchmark {unknown[0]}", where="--benchmark", fix=fix)
    k = params.evaluate.samples_per_problem if samples is None else samples
    params = _by_hand(with_values(params, {"prepare": {"eval_sources": beside}}), samples_per_problem=k)
    tables = {name: workspace.benchmark_beside(name) if name in beside else workspace.benchmark(name) for name in asked}
    inputs = evaluate.Inputs(
        seed=params.run.seed,
        sampler=params.rollout.sampler,
        policies=named,
        benchmarks=tables,
        metrics={name: params.metric(name) for name in asked},
    )
    # What is there already comes first: a benchmark is not fetched for a policy that does not exist.
    _there(
        dataclasses.replace(inputs, benchmarks={n: path for n, path in tables.items() if n not in beside}), workspace
    )
    for name in beside:
        _benchmark_beside(name, params, workspace, context)
    label = "-against-".join(
        Path(name).resolve().name if Path(name).is_dir() else name for name in (policy, against) if name
    )
    out = workspace.comparisons / label
    with _evaluation_engine(params, workspace, context, inputs) as engine:
        return out, evaluate.run(params.evaluate, inputs, out, engine=engine, context=context)


def _by_hand(params: Params, **changed: Any) -> Params:
    """For policies and benchmarks that are named: none is chosen among them.

    Raises:
        ParamsError: a value out of bounds.
    """
    return with_values(params, {"evaluate": {"checkpoint": "last", "choose_on": None} | changed})


def _benchmark_beside(name: str, params: Params, workspace: Workspace, context: Context) -> None:
    from papo.engines.sources.formats import DatasetSource

    only = params.prepare.model_copy(update={"eval_sources": {name: params.prepare.eval_sources[name]}})
    source = only.eval_sources[name].source
    files = {source: Path(source)} if Path(source).is_file() else {}
    inputs = prepare.BenchmarkInputs(name=name, files=files, train=workspace.train_problems)
    engine = DatasetSource(only, warn=context.warn)
    out = workspace.benchmark_beside(name)
    prepare.run_benchmark(only, _there(inputs, workspace), out, engine=engine, context=context)


def measure_pass_rates(
    params: Params, workspace: Workspace, context: Context, *, policy: str, out: Path, samples: int
) -> dict[str, int]:
    """Writes the training problems with the share of `samples` tries that a reference policy gets right, at training's temperature.

    A try without a verdict does not count; a problem without any keeps the pass rate it had. `prepare` reads the file as a source
    whose pass rates make tiers.

    Returns:
        Counts of problems: measured, never and always solved.

    Raises:
        as `evaluate_policies`.
    """
    named = {policy: _named_policy(policy, params, workspace)}
    inputs = evaluate.Inputs(
        seed=params.run.seed,
        sampler=params.rollout.sampler,
        policies=named,
        benchmarks={"train": workspace.train_problems},
    )
    params = _by_hand(
        params, samples_per_problem=samples, temperature=params.rollout.temperature, top_p=params.rollout.top_p,
        max_new_tokens=params.rollout.max_new_tokens,
    )  # fmt: skip
    tries = workspace.comparisons / f"pass-rates-{Path(policy).name}"
    with _evaluation_engine(params, workspace, context, inputs) as engine:
        evaluate.run(params.evaluate, _there(inputs, workspace), tries, engine=engine, context=context)
    scores: dict[str, list[float]] = defaultdict(list)
    for row in read_columns(tries / "train.parquet", EVALUATION, "problem_id", "orm_score"):
        if row["orm_score"] is not None:
            scores[row["problem_id"]].append(row["orm_score"])
    rates = {name: sum(found) / len(found) for name, found in scores.items()}
    rows = read_rows(workspace.train_problems, PROBLEMS)
    write_rows(out, PROBLEMS, [row | {"pass_rate": rates.get(row["problem_id"], row["pass_rate"])} for row in rows])
    found = list(rates.values())
    return {"problems": len(rows), "measured": len(found), "never": found.count(0.0), "always": found.count(1.0)}


def policy_to_serve(name: str, params: Params, workspace: Workspace) -> Path:
    """The folder of the policy `warmstart`, `final`, `round-<k>`, or a folder.

    Raises:
        ParamsError: not the name of a policy.
        MissingInputError: it has not been made.
    """
    return _made(_named_policy(name, params, workspace, where="papo serve-policy"), workspace)


def _named_policy(name: str, params: Params, workspace: Workspace, *, where: str = "--policy, --against") -> Path:
    if name == "warmstart":
        return workspace.warmstart
    if name == "final":
        return workspace.policy(final_round(params, workspace))
    if name == "last-good":
        return workspace.root / read_last_good(workspace).folder
    if found := re.fullmatch(r"round-(\d+)", name):
        return workspace.policy(int(found[1]))
    if Path(name).is_dir():
        return Path(name)
    fix = "name warmstart, final, last-good, round-<k> or a folder"
    raise ParamsError(f"there is no policy {name!r}", where=where, fix=fix)


def final_round(params: Params, workspace: Workspace) -> int:
    """The round whose policy is the final one, by `evaluate.checkpoint`.

    Raises:
        MissingInputError: it is the best of an evaluation that has not been made.
    """
    if params.evaluate.checkpoint != "best":
        return params.run.rounds - 1 if params.evaluate.checkpoint == "last" else params.evaluate.checkpoint
    path = workspace.evaluation / "metrics.json"
    metrics = read_json(path) if path.is_file() else {}
    chosen = {benchmark.get("gain", {}).get("of", "") for benchmark in metrics.values()}
    if len(chosen) != 1 or not (found := re.fullmatch(r"round-(\d+)", *chosen)):
        raise MissingInputError(
            "which policy is the best is not known yet", where=str(path), fix="run `papo evaluate` with the same params"
        )
    return int(found[1])


def _evaluate(params: Params, workspace: Workspace, context: Context, round_: None) -> Manifest:
    p = params.evaluate
    policies = {"warmstart": workspace.warmstart}
    policies |= {f"round-{k}": workspace.policy(k) for k in params.evaluated_rounds}
    if p.checkpoint != "best":
        policies[evaluate.FINAL] = policies.pop(f"round-{final_round(params, workspace)}")
    inputs = evaluate.Inputs(
        seed=params.run.seed,
        sampler=params.rollout.sampler,
        policies=policies,
        benchmarks={name: workspace.benchmark(name) for name in p.benchmarks},
        metrics={name: params.metric(name) for name in p.benchmarks},
    )
    with _evaluation_engine(params, workspace, context, inputs) as engine:
        return evaluate.run(p, _there(inputs, workspace), workspace.evaluation, engine=engine, context=context)


@contextmanager
def _evaluation_engine(
    params: Params, workspace: Workspace, context: Context, inputs: evaluate.Inputs
) -> Iterator[evaluate.Engine]:
    from papo.engines.samplers import make_sampler

    _allow_code(params)
    p = params.evaluate
    others = (*inputs.policies.values(), workspace.policy(params.run.rounds - 2))
    with _servers(params, workspace, context) as servers, ExitStack() as opened:

        def sampler(policy: Path) -> Sampler:
            opened.close()  # the engines of the policy before
            made = make_sampler(
                params.rollout, policy, temperature=p.temperature, top_p=p.top_p, max_new_tokens=p.max_new_tokens,
                logs=workspace.work / "engines", others=others, urls=lambda: servers.serve(policy), warn=context.warn,
            )  # fmt: skip
            opened.callback(made.close)
            return made

        yield evaluate.Engine(sampler=sampler, verifier=_verifier(params, context))


def _report(params: Params, workspace: Workspace, context: Context, round_: None) -> Manifest:
    inputs = report.Inputs(
        params={key: value for key, value in params.flat().items() if not key.startswith(NO_RESULT)},
        limits=params.alarms.model_dump(),
        judging=_manifests(workspace, params, "prm.parquet"),
        advantages=_manifests(workspace, params, "advantages.parquet"),
        training=_manifests(workspace, params, "policy"),
        evaluation=workspace.evaluation / "metrics.json",
        calibrations=calibrations(params.score_prm, workspace),
        accepted=read_decisions(workspace, lineage(params)).words,
        lineage=lineage(params),
        tables={name: workspace.table(params.run.rounds - 1, name) for name in TABLES},
    )
    return report.run(params.report, _there(inputs, workspace), workspace.report, context=context)


def _manifests(workspace: Workspace, params: Params, output: str) -> dict[str, Path]:
    from papo.store.layout import manifest_path

    return {str(k): manifest_path(workspace.round(k) / output) for k in range(params.run.rounds)}


def _there(inputs: T, workspace: Workspace) -> T:
    """`inputs`, all of whose files exist."""
    for path in _paths(inputs):
        if not path.exists():
            raise MissingInputError(
                "an input of this stage is not there",
                where=str(path),
                fix=f"run `{_maker(path, workspace)}` first, or the whole pipeline with `papo run`; "
                "if `dvc repro` ran this, write its list of rounds and benchmarks anew with `papo dvc`",
            )
    return inputs


def _made(policy: Path, workspace: Workspace) -> Path:
    if not policy.exists():
        raise MissingInputError(
            "this policy has not been made",
            where=str(policy),
            fix=f"run `{_maker(policy, workspace)}` first, or the whole pipeline with `papo run`",
        )
    return policy


def _paths(inputs: Any) -> Iterator[Path]:
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        yield from (item for item in (value.values() if isinstance(value, dict) else [value]) if isinstance(item, Path))


def _maker(path: Path, workspace: Workspace) -> str:
    """The command that makes a file of the workspace."""
    parts = path.relative_to(workspace.root).parts
    if parts[0] == "data":
        return Step("prepare").command
    if parts[1] == "rounds":
        stages = {
            "rollouts": "rollout",
            "tried": "rollout",
            "orm": "score_orm",
            "prm": "score_prm",
            "advantages": "advantage",
        }
        return Step(stages.get(parts[3].split(".")[0], "train"), int(parts[2])).command
    return Step({"warmstart": "warmstart", "evaluation": "evaluate"}.get(parts[1], "report")).command
