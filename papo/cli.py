"""`papo STAGE`, `papo run` and their helpers: the command of dvc.yaml and of people."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from papo import __version__

STAGE_HELP = {
    "prepare": "problem sets, benchmarks and warm-start traces",
    "warmstart": "the policy that round 0 samples from",
    "rollout": "sample G responses a prompt (needs --round)",
    "score-orm": "score the outcome of each response (needs --round)",
    "score-prm": "score the process of each response (needs --round)",
    "advantage": "decoupled advantages and signals (needs --round)",
    "train": "one pass over a round's advantages (needs --round)",
    "evaluate": "avg@k and pass@k of warm start and final policy",
    "report": "the static page",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done; 2 the input is wrong; 1 a stage could not finish; 3 an alarm stopped the run; 4 an alarm waits for a person; 130
        interrupted.
    """
    options = _parser().parse_args(arguments)
    quiet_environment()
    # Imported after the arguments are read, so that `papo --help` is quick.
    from papo import commands
    from papo.errors import PapoError

    try:
        return commands.dispatch(options)
    except PapoError as error:
        print(f"papo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("papo: interrupted; finished shards are kept, the same command goes on from there", file=sys.stderr)
        return 130


def quiet_environment() -> None:
    """One thread a process, no telemetry and no chatter from the libraries, unless the person's environment says otherwise.

    One thread, because a second gains a third at this size of model and costs a factor of ten as soon as anything else runs on its
    core; and because results must not depend on how many cores a machine has. Set OMP_NUM_THREADS for a larger model on a CPU.
    """
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }.items():
        os.environ.setdefault(name, value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="papo",
        description="Process-aware policy optimization as a pipeline.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"papo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in STAGE_HELP.items():
        stage = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        stage.add_argument("--round", type=int, metavar="K", help="the round, from 0")
        if name == "advantage":
            stage.add_argument("--variant", metavar="X", help="as --set advantage.variant=X; all with --compare")
            compare = "only show what X would make of the stored scores, against the stored advantages; all rounds without --round"
            stage.add_argument("--compare", action="store_true", help=compare)
        if name == "evaluate":
            benchmark = (
                "as --set evaluate.benchmarks; with --policy also one of papo/benchmarks, or B=SOURCE; may be repeated"
            )
            stage.add_argument("--benchmark", action="append", metavar="B", help=benchmark)
            stage.add_argument("--k", type=int, metavar="K", help="as --set evaluate.samples_per_problem")
            stage.add_argument(
                "--policy", metavar="P", help="evaluate this one: warmstart, final, round-<k> or a folder"
            )
            stage.add_argument("--against", metavar="Q", help="with --policy: the paired difference from this one")
        _common(stage)
    run = commands.add_parser("run", help="the whole pipeline in this process, without any server", allow_abbrev=False)
    run.add_argument("--no-dvc", action="store_true", help="do not record the outputs with DVC at the end")
    accept = "accept the alarm that stopped this run, and go on"
    run.add_argument("--go-on", action="store_true", help=accept)
    run.add_argument("--name", help="name of the run in MLflow")
    run.add_argument(
        "--tag", action="append", default=[], metavar="KEY=VALUE", help="of the run in MLflow; may be repeated"
    )
    _common(run)
    _ablate(commands)
    _common(commands.add_parser("params", help="print every param with its value in force", allow_abbrev=False))
    rates = "the training problems with the pass rate of a reference policy, for prepare.tiers"
    measure = commands.add_parser("pass-rates", help=rates, description=rates, allow_abbrev=False)
    measure.add_argument("--policy", metavar="P", default="warmstart", help="warmstart, final, round-<k> or a folder")
    measure.add_argument("--k", type=int, metavar="K", default=8, help="tries a problem (default: 8)")
    measure.add_argument("--out", type=Path, metavar="FILE", default=Path("pass_rates.parquet"), help="a Parquet file")
    _common(measure)
    trust = "how far a judge can be trusted: its scores against solutions whose reasoning has been labelled"
    calibrate = commands.add_parser("calibrate-judge", help=trust, description=trust, allow_abbrev=False)
    calibrate.add_argument(
        "--data", metavar="FILE", default="sums", help="labelled solutions, or sums (default): made here"
    )
    calibrate.add_argument(
        "--column", action="append", default=[], metavar="ROLE=COLUMN", help="where the data has what; may be repeated"
    )
    calibrate.add_argument("--out", type=Path, metavar="FOLDER", help="default: artifacts/calibration/<judge>-<data>")
    calibrate.add_argument("--max", type=int, metavar="N", help="judge so many of them, drawn by run.seed")
    _common(calibrate)
    serve = "one policy by vLLM, as rollout.server says, until Ctrl-C; for rollouts whose base_urls name it"
    server = commands.add_parser("serve-policy", help=serve, description=serve, allow_abbrev=False)
    server.add_argument(
        "policy", nargs="?", default="warmstart", metavar="POLICY",
        help="warmstart (default), final, round-<k> or a folder",
    )  # fmt: skip
    server.add_argument("--host", default="127.0.0.1", help="another than loopback takes a key (default: 127.0.0.1)")
    server.add_argument("--port", type=_port, default=8000, help="default: 8000")
    _common(server)
    alarms = "what the signals of the rounds so far say is going wrong, and since when"
    _common(commands.add_parser("alarms", help=alarms, description=alarms, allow_abbrev=False))
    why = "the responses to one problem, their scores and advantages, and why each is pushed up or down"
    explain = commands.add_parser("explain", help=why, description=why, allow_abbrev=False)
    explain.add_argument("problem_id", metavar="PROBLEM_ID", help="its first digits are enough, from four on")
    explain.add_argument("--round", type=int, metavar="K", help="the round (default: the last that has the problem)")
    explain.add_argument("--text", action="store_true", help="also the text of each response")
    _common(explain)
    kept = "the verdicts of paid judges that are kept: what is there, a copy as a table, or whether all is whole"
    cache = commands.add_parser("judge-cache", help=kept, description=kept, allow_abbrev=False)
    cache.add_argument("action", choices=("stats", "export", "verify"), metavar="stats|export|verify")
    cache.add_argument("file", nargs="?", type=Path, metavar="FILE", help="of export: *.parquet or *.jsonl")
    cache.add_argument("--store", type=Path, metavar="FILE", help="the store (default: .papo/verdicts.sqlite)")
    _common(cache)
    _lineage(commands)
    record = "what of the record of runs MLflow does not have yet: which runs wait (status), or deliver it (sync)"
    track = commands.add_parser("track", help=record, description=record, allow_abbrev=False)
    track.add_argument("action", choices=("sync", "status"), metavar="sync|status")
    track.add_argument("--all", action="store_true", help="also every workspace in a folder below")
    track.add_argument("--to", metavar="URI", help="of sync: another MLflow than the one where it was to be recorded")
    track.add_argument("--experiment", metavar="NAME", help="of sync: another experiment than the recorded one")
    _common(track)
    takes = (
        "what a run takes, by rates that another was measured at: seconds, device-seconds, judge tokens, money, bytes"
    )
    cost = commands.add_parser("cost", help=takes, description=f"{takes}. docs/scale.md", allow_abbrev=False)
    cost.add_argument("--from-run", type=Path, metavar="DIR", help="workspace of the run that was measured")
    cost.add_argument("--rates", type=Path, metavar="FILE", help="rates that --out has written")
    cost.add_argument("--out", type=Path, metavar="FILE", help="write the rates of --from-run there, as JSON")
    cost.add_argument(
        "--run-devices", type=int, metavar="N", default=1, help="that --from-run sampled with (default: 1)"
    )
    cost.add_argument(
        "--parameters", type=float, metavar="N", help="of the policy, such as 7.6e9 (default: as measured)"
    )
    cost.add_argument("--prompt-tokens", type=float, metavar="N", help="mean of a prompt (default: as measured)")
    cost.add_argument("--completion-tokens", type=float, metavar="N", help="mean of a response (default: as measured)")
    cost.add_argument(
        "--sampling-devices", type=int, metavar="N", help="that the planned run has (default: by the params)"
    )
    cost.add_argument("--judge-devices", type=int, metavar="N", default=0, help="that the judge's servers have")
    cost.add_argument("--peak-tflops", type=float, metavar="X", help="of a device, in the type that is computed in")
    cost.add_argument("--mfu", type=float, metavar="SHARE", help="of the peak, in training; where no rate was measured")
    cost.add_argument("--sampling-mfu", type=float, metavar="SHARE", help="of the peak, in sampling; likewise")
    _common(cost)
    dvc = commands.add_parser("dvc", help="write dvc.yaml anew from params.yaml", allow_abbrev=False)
    dvc.add_argument("--check", action="store_true", help="only say whether dvc.yaml is up to date")
    return parser


def _lineage(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = "a workspace, or the first digits of an id: of the run, its lineage, flow run, MLflow run, policy or other output"
    chain = "what a run was made of and what it made, tied by one id; without RUN, the runs known here"
    lineage = commands.add_parser("lineage", help=chain, description=chain, allow_abbrev=False)
    lineage.add_argument("run", nargs="?", metavar="RUN", help=run)
    two = (
        "what differs between two runs: the first stage with other outputs and why, data, code, judge, alarms, metrics"
    )
    diff = commands.add_parser("diff", help=two, description=two, allow_abbrev=False)
    diff.add_argument("a", metavar="A", help=run)
    diff.add_argument("b", metavar="B", help="the same")
    again = "make a run again from its record; exit code 0 if all is byte-equal, 1 if not"
    reproduce = commands.add_parser("reproduce", help=again, description=again, allow_abbrev=False)
    reproduce.add_argument("run", metavar="RUN", help=run)
    reproduce.add_argument("--workspace", type=Path, metavar="DIR", help="a new folder (default: runs/reproduce-<id>)")
    for parser in (lineage, diff, reproduce):
        parser.add_argument("--json", action="store_true", help="everything, as JSON")
        parser.add_argument(
            "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="such as tracking.uri=..."
        )


def _ablate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    what = "the runs of a plan that are not done, two or more at a time, then claims and comparisons with intervals; docs/ablations.md"
    ablate = commands.add_parser(
        "ablate", help="a plan of runs, and what it shows", description=what, allow_abbrev=False
    )
    ablate.add_argument("plan", metavar="PLAN", help="a YAML file, or the name of one under infra/ablations")
    ablate.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a core)")
    ablate.add_argument(
        "--minutes", type=float, metavar="M", help="begin no run that should not end by then; the next start goes on"
    )
    ablate.add_argument("--money", type=float, metavar="X", help="likewise of what judges are paid")
    ablate.add_argument(
        "--seeds", type=int, metavar="N", help="values of run.seed, 0 to N-1 (default: as the plan says)"
    )
    ablate.add_argument(
        "--root", type=Path, metavar="DIR", help="folder of the workspaces (default: runs/ablations/<plan>)"
    )
    ablate.add_argument(
        "--results", action="store_true", help="begin nothing, and write what the runs that are done show"
    )
    ablate.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="one param of every run"
    )


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is none from 1 to 65535")
    return number


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="FILE", help="a YAML file, or the name of one under infra/presets")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override one param"
    )
    parser.add_argument(
        "--workspace", type=Path, default=Path(), metavar="DIR", help="where data/ and artifacts/ lie (default: here)"
    )
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="wait for another run in the workspace to end"
    )


if __name__ == "__main__":
    sys.exit(main())
