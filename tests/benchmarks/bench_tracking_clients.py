"""Many runs that record to one MLflow server at once: what each waits for, what the server does, and whether a point is lost or doubled.

    python tests/benchmarks/bench_tracking_clients.py                      # 100 clients, SQLite behind the server
    python tests/benchmarks/bench_tracking_clients.py --postgres           # a PostgreSQL of its own, started here and ended
    python tests/benchmarks/bench_tracking_clients.py --backend-store-uri postgresql://USER:PASSWORD@HOST/NAME

Then the same points by `mlflow.log_metrics` in the run's own thread, as a training loop calls it: for how long that thread stands still.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pwd
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from servers.mlflow import MlflowServer
from tracked import STAGES, expected_points, manifest, record

from papo.engines.serving import free_port
from papo.engines.tracking import make_tracker
from papo.engines.tracking.mlflow import prepare
from papo.params import TrackingParams
from papo.track import sync

PROCESSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inline", type=int, default=20, help="clients of the comparison")
    parser.add_argument("--backend-store-uri")
    parser.add_argument("--postgres", action="store_true")
    options = parser.parse_args()
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "60"
    with tempfile.TemporaryDirectory() as folder, database(Path(folder), options) as backend:
        Path(folder).chmod(0o755)
        with MlflowServer(Path(folder) / "server", backend=backend) as server:
            measure(server, Path(folder), options)


def measure(server: MlflowServer, folder: Path, options: argparse.Namespace) -> None:
    prepare()
    from mlflow import MlflowClient

    MlflowClient(server.url).search_experiments()  # imports what is imported late
    name = server.backend.split(":")[0]
    print(
        f"{options.clients} clients in {PROCESSES} processes, {options.rounds} rounds each, one worker of MLflow's server on {name}"
    )
    requests = served(server)
    began = time.monotonic()
    results = in_processes(recorded, options.clients, server.url, folder, options.rounds)
    seconds = time.monotonic() - began
    requests = served(server) - requests
    for label, key in (("run's thread blocked", "blocked"), ("record delivered after", "delivered")):
        values = [result[key] for result in results]
        print(f"{label:<24} median {statistics.median(values):8.3f} s, worst {max(values):8.3f} s")
    print(f"{'one call of the run':<24} worst  {max(result['worst'] for result in results):8.3f} s")
    print(f"server                   {requests} requests in {seconds:.1f} s, {requests / seconds:.0f}/s")
    print(
        f"memory of a client       {statistics.median(result['memory'] for result in results):.2f} MB beside MLflow's own import"
    )
    print(
        f"delivered by a sync      {sum(result['late'] for result in results):.0f} clients, whose end did not wait for the server"
    )
    found, doubled = points(server.backend)
    print(
        f"points of stages         expected {options.clients * expected_points(options.rounds)}, found {found}, doubled {doubled}"
    )
    inline = in_processes(inlined, options.inline, server.url, folder, options.rounds)
    alone = in_processes(recorded, options.inline, server.url, folder / "again", options.rounds)
    ours, theirs = (statistics.median(result["blocked"] for result in each) for each in (alone, inline))
    print(f"{options.inline} clients, blocked       papo {ours:.3f} s, mlflow.log_metrics inline {theirs:.3f} s")
    print(f"{'':<24} {theirs / ours:.0f} times as long")


def recorded(url: str, folder: Path, number: int, rounds: int) -> dict[str, float]:
    """One run of papo: for how long its own thread stood still, and when all was in MLflow."""
    outbox, before = folder / f"{number}/.papo/outbox", psutil.Process().memory_info().rss
    tracker = make_tracker(TrackingParams(uri=url), outbox=outbox, warn=lambda message: None)
    calls, times = record(tracker, rounds=rounds, lineage=str(number)), []
    began = time.perf_counter()
    for _ in range(rounds * len(STAGES) + 2):  # all but the end, which waits for the delivery
        start = time.perf_counter()
        next(calls)
        times.append(time.perf_counter() - start)
    for _ in calls:
        pass
    late = bool(list(outbox.glob("*.jsonl")))  # the patience of `finish` was not enough
    while list(outbox.glob("*.jsonl")):
        list(sync([outbox], TrackingParams(uri=url), to=None, experiment=None, say=print, progress=lambda *line: None))
    delivered = time.perf_counter() - began
    memory = (psutil.Process().memory_info().rss - before) / 1e6
    return {"blocked": sum(times), "worst": max(times), "delivered": delivered, "memory": memory, "late": late}


def inlined(url: str, folder: Path, number: int, rounds: int) -> dict[str, float]:
    """The same metrics in the run's own thread."""
    import mlflow

    mlflow.set_tracking_uri(url)
    blocked = time.perf_counter()
    with mlflow.start_run(experiment_id="0", run_name=str(number)):
        for round_ in range(rounds):
            for stage in STAGES:
                content = manifest(stage, round_, history=30 if stage == "train" else 0)
                facts = {"seconds": content["seconds"], "rows": content["rows"]}
                mlflow.log_metrics(
                    {f"{stage}/{key}": value for key, value in (content["metrics"] | facts).items()}, step=round_
                )
                for row in content["history"]:
                    mlflow.log_metrics({f"{stage}/loss": row["loss"]}, step=int(round_ * 30 + row["step"]))
    return {"blocked": time.perf_counter() - blocked}


Work = Callable[[str, Path, int, int], dict[str, float]]


def in_processes(work: Work, clients: int, url: str, folder: Path, rounds: int) -> list[dict[str, float]]:
    """`work` of so many clients at once, a thread each."""
    context = multiprocessing.get_context("fork")  # nobody waits for the import of MLflow, which is made before
    gate, answers = context.Barrier(PROCESSES), context.Queue()
    shares = [range(first, clients, PROCESSES) for first in range(PROCESSES)]
    processes = [
        context.Process(target=_share, args=(work, share, url, folder, rounds, gate, answers)) for share in shares
    ]
    for process in processes:
        process.start()
    results = [one for _ in processes for one in json.loads(answers.get(timeout=3000))]
    for process in processes:
        process.join()
    return results


def _share(work: Work, numbers: range, url: str, folder: Path, rounds: int, gate: Any, answers: Any) -> None:
    gate.wait()
    before, results = psutil.Process().memory_info().rss, []

    def one(number: int) -> None:
        results.append(work(url, folder, number, rounds))

    threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    each = (psutil.Process().memory_info().rss - before) / 1e6 / max(1, len(numbers))
    answers.put(json.dumps([result | {"memory": each} for result in results]))


def served(server: MlflowServer) -> int:
    """Requests that the server has noted."""
    return (server.folder / "server.log").read_text().count(" HTTP/1.1")


def points(backend: str) -> tuple[int, int]:
    """Points of the child runs in the database, and how many of them stand there more than once."""
    from sqlalchemy import create_engine, text

    of_stages = "SELECT run_uuid FROM tags WHERE key = 'papo.kind' AND value = 'stage'"
    grouped = f"SELECT count(*) AS n FROM metrics WHERE run_uuid IN ({of_stages}) GROUP BY run_uuid, key, step"
    with create_engine(backend).connect() as connection:
        found, distinct = connection.execute(text(f"SELECT sum(n), count(*) FROM ({grouped}) AS each_one")).one()
    return int(found), int(found) - int(distinct)


@contextmanager
def database(folder: Path, options: argparse.Namespace) -> Iterator[str | None]:
    """The URI of the server's database; None for a file of its own."""
    if not options.postgres:
        yield options.backend_store_uri
        return
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    binaries = Path(found).resolve().parent if (found := shutil.which("pg_ctl")) else programs[-1]
    data, port = folder / "postgres", free_port()
    data.mkdir()
    user = None
    folder.chmod(0o755)
    if os.getuid() == 0:  # PostgreSQL refuses to be run by root
        user = "postgres"
        account = pwd.getpwnam(user)
        os.chown(data, account.pw_uid, account.pw_gid)

    def call(*command: str | Path) -> None:
        subprocess.run(command, check=True, user=user, stdout=subprocess.DEVNULL, cwd=data)

    call(binaries / "initdb", "-D", data, "-A", "trust", "-U", "papo")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data}"
    call(binaries / "pg_ctl", "-D", data, "-w", "-l", data / "log", "-o", settings, "start")
    try:
        yield f"postgresql://papo@127.0.0.1:{port}/postgres"
    finally:
        call(binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop")


if __name__ == "__main__":
    main()
