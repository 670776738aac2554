"""One of the processes that train together; `launch.py` starts it and hears it over a socket, JSON by line.

    python -m papo.engines.training.worker 5 FOLDER 1    # the socket is file descriptor 5; the job is in FOLDER; this is process 1

Out: {"progress": steps}, {"warning": text}, and last {"done": metrics by step} or {"error": [class, what, where, fix]}. It says nothing
last where it fails by what is no PapoError; that is in its log.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from papo.errors import PapoError

HOST = "127.0.0.1"
Say = Callable[[dict[str, Any]], None]


def main(arguments: Sequence[str]) -> int:
    folder, rank = Path(arguments[1]), int(arguments[2])
    with socket.socket(fileno=int(arguments[0])) as channel:
        # What training starts must not keep the socket open.
        channel.set_inheritable(False)

        def say(message: dict[str, Any]) -> None:
            channel.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

        try:
            say({"done": work(folder, rank, say)})
        except PapoError as error:
            traceback.print_exc()
            say({"error": [type(error).__name__, error.what, error.where, error.fix]})
            return 1
        except Exception:  # of any library below
            traceback.print_exc()
            return 1
        return 0


def work(folder: Path, rank: int, say: Say) -> list[dict[str, float]]:
    """Trains as process `rank`; the metrics by step."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it has it by a star

    from papo.engines.policy import import_libraries
    from papo.engines.training.jobs import read_job
    from papo.engines.training.many_devices import join, leave
    from papo.engines.training.trainer import GrpoTrainer

    import_libraries("train")
    order, job = read_job(folder)
    store = TCPStore(HOST, order.port, is_master=False, timeout=timedelta(seconds=order.timeout_s))
    devices = join(order.params, store, rank, order.timeout_s)
    trainer = GrpoTrainer(
        order.params,
        temperature=order.temperature,
        max_new_tokens=order.max_new_tokens,
        seed=order.seed,
        warn=lambda text: say({"warning": text}),
    )

    def progress(steps: int) -> None:
        if rank == 0:
            say({"progress": steps})

    history = trainer.train_on(devices, job, progress)
    leave()
    return history if rank == 0 else []


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that wait for processes that will not come would keep this one.
    os._exit(status)
