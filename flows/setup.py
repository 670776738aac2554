"""Sets a Prefect server up for papo, as often as one likes: a second time changes nothing. `--check` only looks.

python -m flows.setup                 # in the folder of the checkout
python -m flows.setup --check         # what is wrong, and what to do about it
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from flows.doctor import AUTOMATIONS, DEPLOYMENTS, POOL, QUEUE, automations, check_pool, examine, read, server
from flows.restarts import RESTARTING, restart_forgotten
from papo.errors import PapoError, SetupError

DEAD_AFTER_S = 180
"""Without a heartbeat, of which a deployed run sends one in 30 s; a server may be away for less than that without harm."""
LOST_AFTER_S = 900
"""From a worker taking a run to the run's first step; a worker may have to fetch an image meanwhile."""
RESTART_AFTER_S = 60
"""From a crash to a new start: a worker reports a crash twice, up to 25 s later and after the hooks, and would end a start before."""
VARIABLE = "papo_setup"

FLOW = {"prefect.resource.role": "flow", "prefect.resource.name": "papo"}
DEPLOYED = {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}
LEFT = [f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled", "Suspended")]
GOES_ON = ("Scheduled", "AwaitingRetry", RESTARTING, "Pending", "Running", "Completed", "Failed", "Cancelled")


def main() -> int:
    """Returns: 0 done, or nothing is wrong; 2 something is, which is said."""
    options = _parser().parse_args()
    try:
        return _check() if options.check else _set_up(options)
    except PapoError as error:
        sys.stderr.write(f"papo: {error}\n")
        return error.exit_code


def _check() -> int:
    wrong = 0
    for name, found in examine():
        if isinstance(found, PapoError):
            wrong += 1
            sys.stdout.write(f"WRONG  {name}: {found}\n")
        else:
            sys.stdout.write(f"{'note ' if name == 'note' else 'ok   '}  {name if name != 'note' else ''}: {found}\n")
    return 2 if wrong else 0


def _set_up(options: argparse.Namespace) -> int:
    if not Path("prefect.yaml").is_file():
        fix = "run this in the folder of the checkout"
        raise SetupError("here is no prefect.yaml", where=str(Path.cwd()), fix=fix)
    with server() as api:
        for name, what in (
            (f"work pool {POOL}", _make_pool(api)),
            (f"queue {QUEUE}", _make_queue(api, options.gpus)),
            *((name, what) for name, what in _make_automations(api, options.dead_after)),
            ("deployments", _deploy(api)),
            ("runs that crashed and were forgotten", ", ".join(restart_forgotten()) or "none"),
        ):
            sys.stdout.write(f"{name}: {what}\n")
    sys.stdout.write(f"now start a worker, here: prefect worker start --pool {POOL}\n")
    return 0


def _make_pool(api: httpx.Client) -> str:
    if read(api, f"/work_pools/{POOL}") is None:
        command = ["work-pool", "create", POOL, "--type", "process"]  # the command knows the type's template of jobs
        _prefect(command)
        return "made, of the type process"
    check_pool(api)
    return "there already"


def _make_queue(api: httpx.Client, gpus: int | None) -> str:
    queue = read(api, f"/work_pools/{POOL}/queues/{QUEUE}")
    limit = gpus if gpus is not None else 1
    if queue is None:
        body = {"name": QUEUE, "concurrency_limit": limit, "description": "one run for each GPU"}
        api.post(f"/work_pools/{POOL}/queues", json=body).raise_for_status()
        return f"made, with a limit of {limit}"
    if queue["concurrency_limit"] == limit or (gpus is None and queue["concurrency_limit"] is not None):
        return f"there already, with a limit of {queue['concurrency_limit']}"
    api.patch(f"/work_pools/{POOL}/queues/{QUEUE}", json={"concurrency_limit": limit}).raise_for_status()
    return f"its limit is {limit} now"


def wanted_automations(dead_after: int) -> list[dict[str, Any]]:
    """What the server does by itself with papo's runs; the names are those of flows/doctor.py."""
    dead, lost, restarts = AUTOMATIONS
    run = {"prefect.resource.id": "prefect.flow-run.*"}
    missing = {
        "type": "event",
        "posture": "Proactive",
        "match": run,
        "for_each": ["prefect.resource.id"],
        "threshold": 1,
    }
    beat = "prefect.flow-run.heartbeat"
    return [
        {
            "name": dead,
            "description": "A run that sends no heartbeat has crashed: its process or its machine is gone.",
            "trigger": missing
            | {"match_related": FLOW, "after": [beat], "expect": [beat, *LEFT], "within": dead_after},
            "actions": [_state("CRASHED", f"no heartbeat for {dead_after} s: its process, or its machine, is gone")],
        },
        {
            "name": lost,
            "description": "A run that a worker took and never started has crashed: its worker is gone.",
            "trigger": missing
            | {
                "match_related": [FLOW, DEPLOYED],
                "after": ["prefect.flow-run.Pending"],
                "expect": ["prefect.flow-run.Running", "prefect.flow-run.Scheduled", *LEFT],
                "within": LOST_AFTER_S,
            },
            "actions": [_state("CRASHED", f"not running {LOST_AFTER_S} s after a worker took it: the worker is gone")],
        },
        {
            "name": restarts,
            "description": "A deployed run that crashed is started again and goes on where it stopped; it counts how often.",
            "trigger": missing
            | {
                "match_related": [FLOW, DEPLOYED],
                "after": ["prefect.flow-run.Crashed"],
                "expect": [f"prefect.flow-run.{name}" for name in GOES_ON],
                "within": RESTART_AFTER_S,
            },
            "actions": [_state("SCHEDULED", "it crashed; it goes on where it stopped", name=RESTARTING)],
        },
    ]


def _state(kind: str, message: str, name: str | None = None) -> dict[str, Any]:
    return {"type": "change-flow-run-state", "state": kind, "name": name, "message": message, "force": False}


def _make_automations(api: httpx.Client, dead_after: int) -> list[tuple[str, str]]:
    there = {found["name"]: found for found in automations(api)}
    done = []
    for wanted in wanted_automations(dead_after):
        wanted |= {"enabled": True}
        found = there.get(wanted["name"])
        if found is None:
            api.post("/automations/", json=wanted).raise_for_status()
            what = "made"
        elif _same(wanted, found):
            what = "there already"
        else:
            api.put(f"/automations/{found['id']}", json=wanted).raise_for_status()
            what = "changed to what this version of papo wants"
        done.append((f"automation {wanted['name']!r}", what))
    return done


def _same(wanted: Any, found: Any) -> bool:
    """Whether everything wanted is found; the server adds ids and defaults, and keeps sets in any order."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_same(value, found.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list) and isinstance(found, list):
        return len(wanted) == len(found) and all(any(_same(one, other) for other in found) for one in wanted)
    return bool(wanted == found)


def _deploy(api: httpx.Client) -> str:
    """By `prefect deploy`, unless these deployments of this folder are there: each time makes their schedules anew."""
    here = str(Path.cwd())
    sources = [Path("prefect.yaml"), Path("papo/params.py"), *sorted(Path("flows").glob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources if path.is_file())).hexdigest()[:16]
    stored = read(api, f"/variables/name/{VARIABLE}")
    found = [read(api, f"/deployments/name/papo/{name}") for name in DEPLOYMENTS]
    ours = all(one is not None and here in json.dumps(one["pull_steps"]) for one in found)
    if stored is not None and stored["value"] == digest and ours:
        return "there already"
    _prefect(["deploy", "--all"])
    if stored is None:
        api.post("/variables/", json={"name": VARIABLE, "value": digest}).raise_for_status()
    else:
        api.patch(f"/variables/name/{VARIABLE}", json={"value": digest}).raise_for_status()
    return f"made from prefect.yaml, to run in {here}"


def _prefect(arguments: list[str]) -> None:
    # prefect.yaml takes the folder from the shell's PWD, which a child of this process would have from another place.
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        env=os.environ | {"PWD": str(Path.cwd())},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        last = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise SetupError(
            f"Prefect says: {last}", where=f"prefect {' '.join(arguments)}", fix="mend that, then run this again"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.setup", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="change nothing; say what is wrong")
    parser.add_argument(
        "--gpus", type=_positive, metavar="N", help="runs at the same time in the queue of the GPUs (1)"
    )
    parser.add_argument(
        "--dead-after", type=_seconds, default=DEAD_AFTER_S, metavar="SECONDS",
        help=f"from 60, without a heartbeat, which comes every 30 s (default: {DEAD_AFTER_S})",
    )  # fmt: skip
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _seconds(text: str) -> int:
    if int(text) < 60:
        raise argparse.ArgumentTypeError(f"{text} s would take runs for dead that live")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
