"""A flow run in this process, from a terminal, with no server to start: what `python -m flows.pipeline` does."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable

from prefect.client.orchestration import get_client

from flows.doctor import check_named_server
from flows.guarded import start_guard
from papo.console import show_summary
from papo.errors import PapoError
from papo.session import Summary


def main(run: Callable[..., Summary]) -> int:
    """Runs the flow and shows its result, as `papo run` does.

    Returns:
        0 done; 2 the input is wrong; 1 a stage could not finish; 3 an alarm stopped the run; 4 an alarm waits for a person; 130
        interrupted.
    """
    options = _parser().parse_args()
    _quiet_console()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the server is stopped, too
    try:
        check_named_server()
        start_guard()  # before the server, which must not outlive this process either, however that goes
        _start_server()
        summary = run(
            preset=options.preset,
            overrides=tuple(options.overrides),
            workspace=options.workspace,
            dvc=not options.no_dvc,
            go_on=options.go_on,
        )
    except PapoError as error:
        sys.stderr.write(f"papo: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("papo: interrupted; finished shards are kept, the same command goes on from there\n")
        return 130
    show_summary(summary)
    return 0


def _start_server() -> None:
    """Starts the server of this process, unless PREFECT_API_URL names one.

    Ctrl-C in a terminal reaches every process in it. The server must not hear it: it has yet to take down that the run was interrupted.
    """
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _quiet_console() -> None:
    """papo shows each step itself; that Prefect's task of it is done is for Prefect's pages."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: record.name != "prefect.task_runs" or record.levelno > logging.INFO)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline", description="The flow `papo`, in this process.", allow_abbrev=False
    )
    parser.add_argument("--preset", metavar="FILE", help="a YAML file, or the name of one under infra/presets")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override one param"
    )
    parser.add_argument(
        "--workspace", default=".", metavar="DIR", help="where data/ and artifacts/ lie (default: here)"
    )
    parser.add_argument("--no-dvc", action="store_true", help="do not record the outputs with DVC at the end")
    accept = "accept the alarm that stopped this run, and go on"
    parser.add_argument("--go-on", action="store_true", help=accept)
    return parser
