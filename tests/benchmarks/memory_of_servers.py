"""What the servers of infra/servers take: memory and time to be healthy, each as its script starts it; takes some two minutes.

    python tests/benchmarks/memory_of_servers.py

MiB are proportional set sizes, a page that several processes share counted once, when all have been healthy for a while and have served one
run that a worker records.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkout import TINY, Checkout
from servers.processes import Server, serving
from servers.stack import Stack, running


def main() -> None:
    with tempfile.TemporaryDirectory() as name, running() as stack:
        idle = {one: server.memory() for one, server in stack.servers.items()}
        params = TINY | {"run": {"rounds": 1}, "tracking": {"enabled": True, "uri": stack.mlflow}}
        checkout = Checkout(Path(name), params=params).folder
        with serving(stack.worker(checkout)) as worker:
            idle["worker"] = worker.memory()
            print(
                f"{'server':<10}{'healthy after':>14}{'processes':>11}{'MiB, idle':>11}{'MiB, after a run':>18}{'MiB, most':>11}"
            )
            most = run(stack, checkout, worker)
            for one, server in (stack.servers | {"worker": worker}).items():
                print(
                    f"{one:<10}{server.took:>12.0f} s{len(server.family()):>11}{idle[one]:>11.0f}{server.memory():>18.0f}{most[one]:>11.0f}"
                )


def run(stack: Stack, checkout: Path, worker: Server) -> dict[str, float]:
    """Runs the deployment; the most that each server had while it ran, looked at twice a second."""
    most = dict.fromkeys([*stack.servers, "worker"], 0.0)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for one, server in (stack.servers | {"worker": worker}).items():
                most[one] = max(most[one], server.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        stack.prefect(checkout, "deploy", "--name", "train-eval")
        stack.prefect(checkout, "deployment", "run", "papo/train-eval", "--watch")
    finally:
        over.set()
        watcher.join()
    time.sleep(5)
    return most


if __name__ == "__main__":
    main()
