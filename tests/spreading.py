"""A verifier that says where each of its items is verified, and waits there until it may go on; a flow that verifies by a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prefect import flow

from flows.spread import open_spread
from papo.engines.fan_out import SpreadVerifier
from papo.engines.protocols import Progress, Verdict, Verifier, VerifyItem
from papo.params import RayParams


class Waiting:
    """Right is an item whose completion is its gold answer, which has to be a name for a file.

    Args:
        folder: gets a file `gold pid node` for each time that an item is begun; all wait for the file `go`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        import ray

        for item in items:
            (self._folder / f"{item.gold} {os.getpid()} {ray.get_runtime_context().get_node_id()}").touch()
            while not (self._folder / "go").exists():
                time.sleep(0.05)
        return [Verdict(float(item.gold == item.completion), item.completion, "ok") for item in items]

    def versions(self) -> dict[str, str]:
        return {"waiting": "1"}


@flow(persist_result=False, validate_parameters=False)
def verify(
    address: str, make: Callable[[], Verifier], items: Sequence[VerifyItem], chunk: int = 1
) -> tuple[list[Verdict], list[int]]:
    """Verdicts, and the steps of the progress. Of a module, as a flow goes with its tasks to the nodes."""
    done: list[int] = []
    with open_spread(RayParams(address=address, chunk=chunk)) as spread:
        assert spread is not None
        return SpreadVerifier(make, spread).verify(items, done.append), done
