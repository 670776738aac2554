"""What the commands of `papo` do."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.calibration import calibrate
from papo.console import (
    ask_in_terminal,
    configure_logging,
    log,
    make_context,
    show_alarms,
    show_calibration,
    show_comparison,
    show_costs,
    show_delivered,
    show_explained,
    show_rederivation,
    show_stored,
    show_summary,
    show_verified,
    show_waiting,
    warn,
)
from papo.core.cost_model import Line, Rates, cost
from papo.costing import measured_rates, plan_of, read_rates
from papo.decisions import read_decisions
from papo.dvcfile import DVC_FILE, render
from papo.engines.judges import store_of
from papo.engines.serving import serve_policy
from papo.engines.tracking import ABLATION, make_tracker, resolved
from papo.engines.versioning import Dvc
from papo.errors import UserError
from papo.inspection import check_variant, explain_problem, rederive, signals_and_alarms
from papo.lineage import show
from papo.params import GENERATED, UNDECIDING, Params, TrackingParams, defined_benchmarks, load_params
from papo.paths import check_paths
from papo.pipeline import Step, evaluate_policies, lineage, measure_pass_rates, policy_to_serve, run_step, steps
from papo.session import Session, Summary, share_start
from papo.store.files import read_json, replacing, write_json
from papo.store.layout import Workspace
from papo.store.lock import exclusive
from papo.store.manifest import Spread
from papo.store.verdicts import VerdictStore, verify_store
from papo.track import outbox_of, outboxes_of, sync, waiting_runs
from papo.watch import Ask


def dispatch(options: argparse.Namespace) -> int:
    """Runs the command that the options name; the exit code."""
    configure_logging()
    if options.command == "dvc":
        return write_dvc(check=options.check)
    if options.command in show.COMMANDS:
        return show.dispatch(options)
    if options.command == "ablate":
        from papo.ablations import command

        return command.ablate(options)
    params = load_params(preset=options.preset, overrides=overrides(options))
    check_paths(params, options.workspace, overrides=options.overrides)
    stay_offline(params, further_sources(params, options))
    if options.command == "params":
        sys.stdout.writelines(f"{key} = {value}\n" for key, value in params.flat().items())
        return 0
    workspace = Workspace(options.workspace)
    if options.command == "alarms":
        rounds, raised = signals_and_alarms(params.alarms, workspace)
        show_alarms(rounds, raised, params.on_alarm, read_decisions(workspace, lineage(params)))
        return 0
    if options.command == "cost":
        show_costs(costs_of(params, options))
        return 0
    if options.command == "judge-cache":
        return judge_cache(options.store or store_of(params.score_prm, workspace), options.action, options.file)
    if options.command == "explain":
        show_explained(explain_problem(workspace, options.problem_id, round_=options.round), text=options.text)
        return 0
    if options.command == "advantage" and options.compare:
        variant = options.variant or "all"
        show_rederivation(rederive(params.advantage, workspace, variant=variant, round_=options.round))
        return 0
    if options.command == "track":
        return track(params.tracking, workspace, options)
    if options.command == "serve-policy":
        serve_named_policy(params, workspace, options)
        return 0
    if options.command == "pass-rates":
        pass_rates(params, workspace, options)
        return 0
    if options.command == "calibrate-judge":
        show_calibration(*calibrate_judge(params, workspace, options))
        return 0
    if options.command == "evaluate" and (options.policy or options.against):
        show_comparison(*compare_policies(params, workspace, options))
        return 0
    if options.command == "run":
        dvc, go_on = not options.no_dvc, options.go_on
        tags = tags_of(options.tag)
        show_summary(
            run_all(params, workspace, name=options.name, dvc=dvc, wait_s=options.wait, go_on=go_on, tags=tags)
        )
        return 0
    step = Step(options.command.replace("-", "_"), options.round)
    if step.stage in ("score_orm", "score_prm"):
        warn_of_ray(params)
    with exclusive(workspace, wait_s=options.wait):
        manifest = run_step(step, params, workspace, make_context(workspace.work))
    log.info("%s: %s", step, "had been done before" if manifest.skipped else f"done in {manifest.seconds:.1f} s")
    return 0


def overrides(options: argparse.Namespace) -> list[str]:
    """What `--set` gives, `--benchmark` and `--k` of `papo evaluate`, and `--variant` of `papo advantage` unless it is only compared.

    Raises:
        ParamsError: an unknown variant.
    """
    given: list[str] = options.overrides
    if options.command == "evaluate" and options.policy is None:
        if sourced := [text for text in options.benchmark or () if "=" in text]:
            fix = "name the policy, or add the benchmark to prepare.eval_sources"
            raise UserError(f"--benchmark {sourced[0]} needs --policy", where="papo evaluate", fix=fix)
        benchmarks = [f"evaluate.benchmarks=[{', '.join(options.benchmark)}]"] if options.benchmark else []
        return [*given, *benchmarks, *([f"evaluate.samples_per_problem={options.k}"] if options.k is not None else [])]
    if options.command != "advantage" or options.variant is None:
        return given
    check_variant(options.variant, comparing=options.compare)
    return given if options.compare else [*given, f"advantage.variant={options.variant}"]


def run_all(
    params: Params, workspace: Workspace, *, name: str | None, dvc: bool, wait_s: float = 0.0, go_on: bool = False,
    tags: Mapping[str, str] | None = None,
) -> Summary:  # fmt: skip
    """The whole pipeline in this process."""
    session = open_session(
        params, workspace, name=name, dvc=dvc, wait_s=wait_s, tags=tags, ask=ask_in_terminal, go_on=go_on
    )
    with session:
        for step in steps(params):
            session.run(step)
        return session.finish()


def tags_of(given: Sequence[str]) -> dict[str, str]:
    """Key -> value of `--tag`.

    Raises:
        UserError: one is not of the form KEY=VALUE, or has a key that papo or MLflow sets.
    """
    tags = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--tag {text}", where="papo run", fix="write KEY=VALUE, such as --tag lab=west")
        if key.startswith("mlflow.") or (key.startswith("papo.") and key != ABLATION):
            raise UserError(
                f"--tag {key}", where="papo run", fix="choose another key: those are set by MLflow and papo"
            )
        tags[key] = value
    return tags


def open_session(
    params: Params,
    workspace: Workspace,
    *,
    name: str | None = None,
    dvc: bool = True,
    wait_s: float = 0.0,
    tags: Mapping[str, str] | None = None,
    ask: Ask | None = None,
    go_on: bool = False,
    spread: Spread | None = None,
) -> Session:
    """A session with the tracker that the params name, and with DVC where the outputs are those of dvc.yaml.

    A run in another folder than the checkout's, or with params that are not those of params.yaml, is not what dvc.yaml describes: its
    outputs are not recorded, and DVC shows them as changed. Such a run starts from the problem sets and warm start of the checkout.
    """
    here = Workspace(Path())
    beside = workspace.root.resolve() != here.root.resolve()
    described = not beside and untracked(params) == untracked(load_params())
    if dvc and not beside and not described:
        warn("the params are not those of params.yaml: DVC will show the outputs of this run as changed")
    if spread is None:
        warn_of_ray(params)
    if beside:
        share_start(here, workspace)
    return Session(
        params,
        workspace,
        name=name or f"{params.advantage.variant}-seed{params.run.seed}",
        tracker=make_tracker(params.tracking, outbox=outbox_of(workspace), warn=warn),
        context=dataclasses.replace(make_context(workspace.work), spread=spread),
        dvc=Dvc(workspace.root) if dvc and described else None,
        tags=tags,
        wait_s=wait_s,
        ask=ask,
        go_on=go_on,
    )


def warn_of_ray(params: Params) -> None:
    """Says of a command that does not score on the cluster of the params that it does not; the scores are the same."""
    if params.run.ray is not None:
        warn("run.ray is for the flows (`python -m flows.pipeline`): this command scores in its own process")


def untracked(params: Params) -> dict[str, object]:
    """The params that decide results."""
    return params.model_dump(exclude=dict.fromkeys(UNDECIDING, True) | {"run": {"overlap", "ray"}})


def compare_policies(params: Params, workspace: Workspace, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The folder and the metrics of the policies that the options name."""
    if options.policy is None:
        raise UserError(
            "--against needs --policy", where="papo evaluate", fix="name the policy whose gain is asked for"
        )
    with exclusive(workspace, wait_s=options.wait):
        context = make_context(workspace.work)
        named = dict(map(_named, options.benchmark)) if options.benchmark else None
        out, _ = evaluate_policies(
            params, workspace, context,
            policy=options.policy, against=options.against, benchmarks=named, samples=options.k,
        )  # fmt: skip
    return out, read_json(out / "metrics.json")


def calibrate_judge(params: Params, workspace: Workspace, options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The folder of a calibration and what calibration.json holds."""
    columns = {}
    for text in options.column:
        role, _, column = text.partition("=")
        if not role.strip() or not column.strip():
            fix = "name the role and the column, such as problem=question"
            raise UserError(f"--column {text}", where="papo calibrate-judge", fix=fix)
        columns[role.strip()] = column.strip()
    with exclusive(workspace, wait_s=options.wait):
        return calibrate(
            params, workspace, make_context(workspace.work),
            data=options.data, columns=columns, out=options.out, limit=options.max,
            tracker=make_tracker(params.tracking, outbox=outbox_of(workspace), warn=warn),
        )  # fmt: skip


def _named(text: str) -> tuple[str, str | None]:
    """Name and source of `--benchmark NAME=SOURCE`; no source if there is only a name."""
    name, _, source = text.partition("=")
    if not name or source != source.strip() or text.endswith("="):
        raise UserError(f"--benchmark {text}", where="papo evaluate", fix="name it as NAME or NAME=SOURCE")
    return name, source or None


def pass_rates(params: Params, workspace: Workspace, options: argparse.Namespace) -> None:
    """Measures and writes pass rates, and says how to use them."""
    if options.k < 1:
        raise UserError(f"--k is {options.k}", where="papo pass-rates", fix="try each problem at least once")
    with exclusive(workspace, wait_s=options.wait):
        context = make_context(workspace.work)
        counts = measure_pass_rates(
            params, workspace, context, policy=options.policy, out=options.out, samples=options.k
        )
    log.info("%s: %s", options.out, ", ".join(f"{count} {name}" for name, count in counts.items()))


def serve_named_policy(params: Params, workspace: Workspace, options: argparse.Namespace) -> None:
    """Serves a policy until Ctrl-C; beside a run in the same workspace, too, which it reads one folder of."""
    policy = policy_to_serve(options.policy, params, workspace)
    out = workspace.work / "servers" / f"port-{options.port}.log"
    serve_policy(params.rollout.server, policy, out, host=options.host, port=options.port, say=log.info)


def track(params: TrackingParams, workspace: Workspace, options: argparse.Namespace) -> int:
    """Shows what waits for MLflow, or delivers it; 1 if some could not be delivered."""
    outboxes = outboxes_of(workspace, below=options.all)
    if options.action == "status":
        if options.to or options.experiment:
            fix = "leave out --to and --experiment, or use `papo track sync`"
            raise UserError("only sync delivers to somewhere", where="papo track status", fix=fix)
        show_waiting(waiting_runs(outboxes))
        return 0
    results = list(
        sync(outboxes, resolved(params), to=options.to, experiment=options.experiment, say=warn, progress=log.info)
    )
    show_delivered(results)
    return int(any(result.why for result in results))


def costs_of(params: Params, options: argparse.Namespace) -> list[Line]:
    """What the run of the params takes, by the rates that the options name; those are written where they say.

    Raises:
        UserError: two kinds of rates, none to write, or a number that cannot be.
    """
    given = (
        "run_devices",
        "sampling_devices",
        "parameters",
        "prompt_tokens",
        "completion_tokens",
        "peak_tflops",
        "mfu",
        "sampling_mfu",
    )
    for name in given:
        value = getattr(options, name)
        if value is not None and not (0 < value <= (1 if name.endswith("mfu") else 1e18)):
            raise UserError(
                f"--{name.replace('_', '-')} is {value:g}", where="papo cost", fix="shares: above 0, at most 1"
            )
    if options.from_run is not None and options.rates is not None:
        raise UserError("--from-run and --rates are two sources of rates", where="papo cost", fix="name one of them")
    if (options.mfu or options.sampling_mfu) and not options.peak_tflops:
        raise UserError("a share of the peak needs the peak", where="papo cost", fix="add --peak-tflops")
    rates = Rates()
    if options.from_run is not None:
        rates = measured_rates(Workspace(options.from_run), sampling_devices=options.run_devices)
    elif options.rates is not None:
        rates = read_rates(options.rates)
    if options.out is not None:
        if options.from_run is None:
            raise UserError("--out has no rates to write", where="papo cost", fix="name a run with --from-run")
        write_json(options.out, dataclasses.asdict(rates))
    plan = plan_of(
        params, parameters=options.parameters, sampling_devices=options.sampling_devices, prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens, judge_devices=options.judge_devices,
        sampling_share=options.sampling_mfu, training_share=options.mfu, peak_tflops=options.peak_tflops,
    )  # fmt: skip
    return cost(plan, rates)


def judge_cache(store: Path, action: str, out: Path | None) -> int:
    """Shows, copies or checks the stored verdicts; 1 if some are damaged."""
    if (action == "export") != (out is not None):
        what = "export needs the file to write" if out is None else f"{action} takes no file"
        fix = "papo judge-cache stats | export FILE | verify; the store is named with --store"
        raise UserError(what, where="papo judge-cache", fix=fix)
    if action == "verify":
        return show_verified(verify_store(store), store)
    with VerdictStore.open(store, read_only=True, warn=warn) as verdicts:
        if out is None:
            show_stored(verdicts.stats(), verdicts.spent_by_run())
        else:
            log.info("%s: %d verdicts", out, verdicts.export(out))
    return 0


def stay_offline(params: Params, further: Sequence[str] = ()) -> None:
    """Tells the Hugging Face libraries not to look at the hub when nothing in the params is there; each look costs seconds."""
    benchmarks = [item.source for item in params.prepare.eval_sources.values()]
    names = [params.warmstart.checkpoint, params.prepare.source, *benchmarks, *further]
    if all(name is None or name in GENERATED or Path(name).exists() for name in names):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def further_sources(params: Params, options: argparse.Namespace) -> list[str]:
    """Where benchmarks come from that `--benchmark` names and `prepare` does not make."""
    named = dict(map(_named, getattr(options, "benchmark", None) or []))
    known = defined_benchmarks()
    return [
        source or known.get(name, {}).get("source", name)
        for name, source in named.items()
        if source or name not in params.benchmarks_made
    ]


def write_dvc(*, check: bool) -> int:
    """Writes dvc.yaml, or says whether it is what params.yaml asks for."""
    text = render(load_params())
    current = DVC_FILE.read_text() if DVC_FILE.exists() else ""
    if check and text != current:
        raise UserError("dvc.yaml is not what params.yaml asks for", where=str(DVC_FILE), fix="run `papo dvc`")
    if not check:
        with replacing(DVC_FILE) as temporary:
            temporary.write_text(text)
    log.info("dvc.yaml is up to date")
    return 0
