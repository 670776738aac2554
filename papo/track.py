"""`papo track`: what of the record of runs waits on the disk, and its delivery to MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from papo.engines.tracking.delivery import Delivery, address
from papo.engines.tracking.outbox import Journal, Outbox
from papo.engines.tracking.troubles import PASSES, DeliveryError, brief_of, without_password
from papo.errors import MissingInputError, SetupError
from papo.params import TrackingParams
from papo.store.layout import Workspace

HELD_S = 60.0  # how long a journal is waited for that another process delivers
BUSY_S = 0.25  # the pause between two tries while others write to the same database
BUSY_TRIES = 240
TOLD_S = 5.0  # how often progress is said
SKIPPED = {".git", ".venv", ".venv-vllm", "artifacts", "data", "node_modules"}


@dataclass(frozen=True)
class Waiting:
    """A run of which some is not in MLflow. `refused`: those of the records that the server did not take when it was asked."""

    workspace: Path
    run: str
    experiment: str
    target: str
    status: str
    records: int
    refused: int
    megabytes: float
    journal: Path


@dataclass(frozen=True)
class Delivered:
    """What became of one run. `why`: empty if nothing of it waits any more."""

    workspace: Path
    run: str
    target: str
    delivered: int
    waiting: int
    why: str


def outbox_of(workspace: Workspace) -> Path:
    """Where the record of a run waits until MLflow has it."""
    return workspace.work / "outbox"


def outboxes_of(workspace: Workspace, *, below: bool) -> list[Path]:
    """The outbox of a workspace, and those of the workspaces in folders below.

    Raises:
        MissingInputError: there is no such folder.
    """
    if not workspace.root.is_dir():
        raise MissingInputError("no folder", where=str(workspace.root), fix="name a workspace with --workspace")
    if not below:
        return [outbox_of(workspace)]
    found = []
    for folder, names, _ in os.walk(workspace.root):
        if (here := outbox_of(Workspace(Path(folder)))).is_dir():
            found.append(here)
        names[:] = sorted(name for name in names if name not in SKIPPED and not name.startswith("."))
    return found


def waiting_runs(outboxes: Sequence[Path]) -> list[Waiting]:
    """Runs with records that wait, by workspace, oldest first."""
    found = []
    for outbox in outboxes:
        for journal in Outbox(outbox).journals():
            name, experiment, target = _about(journal)
            if waiting := journal.waiting(target):
                refused = len(journal.progress(target).refused)
                size = sum(path.stat().st_size for path in (journal.path, *journal.files.rglob("*")) if path.is_file())
                status = journal.status() or "not ended"
                found.append(
                    Waiting(
                        _workspace(outbox),
                        name,
                        experiment or "?",
                        target or "?",
                        status,
                        waiting,
                        refused,
                        size / 1e6,
                        journal.path,
                    )
                )
    return found


def sync(
    outboxes: Sequence[Path],
    params: TrackingParams,
    *,
    to: str | None,
    experiment: str | None,
    say: Callable[[str], None],
    progress: Callable[..., None],
) -> Iterator[Delivered]:
    """Delivers what waits, a run after the other.

    Args:
        params: where a record goes that does not say it, and the user and the password of its server.
        to, experiment: in place of the recorded server or experiment.

    Raises:
        SetupError: MLflow cannot be imported.
    """
    from papo.engines.tracking.mlflow import MlflowTracker, prepare

    try:
        prepare()
    except Exception as error:  # a broken installation raises anything
        fix = "run `pip install mlflow`"
        raise SetupError(f"MLflow cannot be imported: {brief_of(error)}", where="papo track sync", fix=fix) from error
    dead: dict[str, DeliveryError] = {}
    for outbox in outboxes:
        for journal in Outbox(outbox).journals():
            name, recorded, target = _about(journal)
            delivery = None
            try:
                uri = address(target or without_password(params.uri), params, to)
                there = params.model_copy(
                    update={"uri": uri, "experiment": experiment or recorded or params.experiment}
                )
                delivery = Delivery(journal, there, MlflowTracker, say=say)
                before = delivery.progress.delivered
                if not delivery.waiting and journal.status() != "FINISHED":
                    continue
                if uri in dead:
                    raise dead[uri]
                _deliver(delivery, name, progress)
                why = "; ".join(delivery.refused)
            except DeliveryError as error:
                why = str(error)
                if delivery is not None and error.kind in ("down", "credentials", "schema", "disk", "uri", "import"):
                    dead[uri] = error
            if delivery is None:
                yield Delivered(_workspace(outbox), name, target, 0, journal.waiting(target), why)
                continue
            if torn := journal.torn():
                say(f"the last {torn} bytes of {journal.path} are no whole record: a run was cut off there")
            done = delivery.progress.delivered - before
            yield Delivered(_workspace(outbox), name, without_password(uri), done, delivery.waiting, why)


def _deliver(delivery: Delivery, name: str, progress: Callable[..., None]) -> None:
    """
    Raises:
        DeliveryError: some of it waits still.
    """
    until, told, tries, first = time.monotonic() + HELD_S, time.monotonic(), 0, True
    while True:
        with delivery.held() as mine:
            try:
                if mine and first:
                    delivery.again()
                    first = False
                while mine and delivery.step():
                    tries = 0
                    if time.monotonic() - told > TOLD_S:
                        told = time.monotonic()
                        progress(
                            "%s: %d records delivered, %d wait", name, delivery.progress.delivered, delivery.waiting
                        )
                if mine:
                    delivery.complete()
                    return
            except DeliveryError as error:
                tries += 1
                if error.kind not in PASSES or tries > BUSY_TRIES:
                    raise
        if not mine and not delivery.journal.path.exists():
            return
        if not mine and time.monotonic() > until:
            raise DeliveryError("held", "another process is delivering it", "wait until it ends")
        time.sleep(BUSY_S)


def _about(journal: Journal) -> tuple[str, str, str]:
    """Name, experiment and server of a run; the last two are empty if its first record is damaged."""
    opening = journal.opening()
    if opening is None:
        return journal.id, "", ""
    return opening.content["name"], opening.content["experiment"], opening.content["target"]


def _workspace(outbox: Path) -> Path:
    return outbox.parent.parent
