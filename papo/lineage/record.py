"""The record of a run on disk: artifacts/runs/<id>.json, written while the run goes on.

A run is one lineage in one workspace, from its first start to its end: a start after a kill goes on with the record, and a start that
finds everything done is noted in it. Nothing of it decides a result, and no failure to write it stops a run.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from papo.core.alarms import Alarm
from papo.errors import DamagedError, DataError, PapoError
from papo.store.faults import reached
from papo.store.files import replacing, write_json

State = Literal["running", "finished", "failed", "stopped", "killed", "unknown"]

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "vllm",
    "prefect",
    "mlflow",
    "dvc",
)
"""Whose versions may explain another result, or another record of it."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Start(_Part):
    """One process that worked on the run. `diff`: digest of what differed from the commit; `kept` says whether it is in runs/diffs/.

    `ended` and `how` are absent until it ends, so a process that was killed is known by their absence.
    """

    at: str
    ended: str | None = None
    how: Literal["finished", "failed", "stopped"] | None = None
    why: str = ""
    pid: int
    process_began: float
    boot: str
    machine: str
    commit: str | None = None
    diff: str | None = None
    kept: bool = False
    flow_run: str | None = None
    ran: int = 0
    found: int = 0


class StepRecord(_Part):
    """What a stage's manifest says, and whether this run `made` it or found it done.

    `content`: digests of tables without the columns that say how a row was come by (`cached`), where there are such.
    """

    stage: str
    round: int | None
    identity: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    code: str
    outputs: dict[str, str]
    content: dict[str, str] = {}
    rows: int
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    versions: dict[str, str] = {}
    seconds: float
    made: bool

    @property
    def name(self) -> str:
        return self.stage if self.round is None else f"{self.stage} {self.round}"


class JudgeRecord(_Part):
    """`digest` and `text` of the rubric where a model judges; `calibrations`: file by name of the folder, with what it measured."""

    name: str
    model: str | None = None
    rubric: str | None = None
    digest: str | None = None
    text: str | None = None
    calibrations: dict[str, dict[str, Any]] = {}


class Tracking(_Part):
    """Where MLflow has the run: its runs carry the tag `papo.run_id` with the id of this record."""

    enabled: bool
    uri: str
    experiment: str


class RunRecord(_Part):
    """Everything that one id ties together; paths of outputs are relative to `workspace`, those of `sources` to `checkout`."""

    schema_version: int = 1
    id: str
    lineage: str
    name: str
    workspace: str
    checkout: str
    params: dict[str, Any]
    starts: list[Start] = Field(min_length=1)
    checks: list[str] = []
    code: dict[str, str]
    files: dict[str, str]
    sources: dict[str, str] = {}
    judge: JudgeRecord
    environment: dict[str, str]
    tracking: Tracking
    steps: list[StepRecord] = []
    data: dict[str, str] = {}
    evaluation: dict[str, Any] = {}
    alarms: list[dict[str, Any]] = []
    dvc_lock: str | None = None

    @property
    def last(self) -> Start:
        return self.starts[-1]

    @property
    def state(self) -> State:
        """How the run stands now; `unknown` where it is under way by what another machine wrote."""
        return self.last.how or _process_state(self.last)

    @property
    def seconds(self) -> float:
        """Work of all stages that this run made."""
        return sum(step.seconds for step in self.steps if step.made)

    def step(self, name: str) -> StepRecord | None:
        return next((step for step in self.steps if step.name == name), None)


def read_record(path: Path) -> RunRecord:
    """
    Raises:
        DamagedError: not what papo wrote, or written by another version of it.
    """
    fix = "delete it: nothing but `papo lineage`, `diff` and `reproduce` reads it"
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise DamagedError(f"not the record of a run: {place}: {first['msg']}", where=str(path), fix=fix) from None
    except OSError as error:
        raise DamagedError(f"the record of a run cannot be read: {error.strerror}", where=str(path), fix=fix) from None


def patch_file(folder: Path, diff: str) -> Path:
    """Where the diff with this digest is kept."""
    return folder / "diffs" / f"{diff[:16]}.patch"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def new_id(lineage: str) -> str:
    """The lineage, when it began, and two bytes that keep two starts of one second apart."""
    return f"{lineage}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def this_process() -> dict[str, Any]:
    """What tells this process from one that has its number later."""
    return {
        "pid": os.getpid(),
        "process_began": psutil.Process().create_time(),
        "boot": _boot(),
        "machine": platform.node(),
    }


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{psutil.boot_time():.0f}"


def _process_state(start: Start) -> State:
    if start.machine != platform.node():
        return "unknown"
    if start.boot != _boot():
        return "killed"
    try:
        alive = abs(psutil.Process(start.pid).create_time() - start.process_began) < 1.0
    except psutil.Error:
        alive = False
    return "running" if alive else "killed"


def environment() -> dict[str, str]:
    """Python, libraries, machine and threads: what may make arithmetic differ."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "cpu": _cpu()}
    found["cpus"] = str(os.cpu_count())
    found |= {name: os.environ.get(name, "not set") for name in THREADS}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    torch = sys.modules.get("torch")  # not imported for this: a run that needs it has done so by its end
    if torch is not None:
        found["torch threads"] = str(torch.get_num_threads())
        if torch.cuda.is_available():
            found["gpu"] = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


class Recorder:
    """Writes the record of one run; it is opened by the first stage that has something to do, or at once where none is finished.

    Args:
        folder: artifacts/runs of the workspace.
        made: everything of the record that is known before the run begins.
        start: commit, diff and flow run of this process.
        patch: the diff itself, if it is kept.
        warn: told once if the record cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        made: Mapping[str, Any],
        start: Mapping[str, Any],
        *,
        patch: bytes | None = None,
        warn: Callable[[str], None],
    ) -> None:
        self._folder, self._patch, self._warn = folder, patch, warn
        self._start = Start(at=now(), **this_process(), **start)
        self._fresh = RunRecord(id=new_id(made["lineage"]), starts=[self._start], **made)
        self._record: RunRecord = self._fresh
        self._open = False
        self._broken = False
        self._held: list[StepRecord] = []
        self._written = self._took = 0.0

    @property
    def id(self) -> str:
        return self._record.id

    def begin(self) -> None:
        """Takes up the last record of this lineage unless that run is finished; where there is none, opens a new one."""
        self._tidy()
        last = self._last()
        if last is None:
            self.open()
        elif last.last.how == "finished":
            self._record = last
        else:
            last.starts.append(self._start)
            known = {"id", "starts", "checks", "steps"}
            self._record = self._fresh.model_copy(update={name: getattr(last, name) for name in known})
            self._open = True
            self._write()

    def open(self) -> None:
        """Opens a new record, unless one is open; with what had been found done before."""
        if self._open:
            return
        self._open, self._record = True, self._fresh
        for step in self._held:
            self._put(step)
        self._write()

    def step(self, step: StepRecord) -> None:
        if not self._open:
            self._held.append(step)
            return
        self._put(step)
        # Hundreds of rounds make a long record: writing it may take a fiftieth of the time.
        if time.monotonic() - self._written > 50.0 * self._took:
            self._write()

    def finish(
        self, *, data: dict[str, str], evaluation: dict[str, Any], alarms: Sequence[Alarm], dvc_lock: str | None
    ) -> None:
        """Everything is done; where no stage had anything to do, that is noted in the record that is there."""
        if not self._open:
            self._record.checks.append(now())
        else:
            self._record.data, self._record.evaluation, self._record.dvc_lock = data, evaluation, dvc_lock
            self._record.alarms = [alarm._asdict() for alarm in alarms]
            self._record.environment = environment()
            self._start.how = "finished"

    def end(self, error: BaseException | None) -> None:
        """The end of this process's work, by an error or not."""
        if self._open:
            self._start.ended = now()
            if self._start.how is None:
                self._start.how = "stopped" if _by_choice(error) else "failed"
                self._start.why = _why(error)
            self._write()
        elif self._record.checks:
            self._write()

    def _put(self, step: StepRecord) -> None:
        counted = "ran" if step.made else "found"
        setattr(self._start, counted, getattr(self._start, counted) + 1)
        before = self._record.step(step.name)
        if before is not None:
            # What this run made at an earlier start, it still made.
            made = step.made or (before.made and before.identity == step.identity and before.outputs == step.outputs)
            self._record.steps[self._record.steps.index(before)] = step.model_copy(update={"made": made})
        else:
            self._record.steps.append(step)

    def _tidy(self) -> None:
        """Removes what a start left that was killed while it wrote its first record: the next has another id, and would leave it."""
        for left in self._folder.glob(f".{self._fresh.lineage}-*.tmp"):
            with contextlib.suppress(OSError):
                reached("remove", left)
                left.unlink()

    def _last(self) -> RunRecord | None:
        found: list[RunRecord] = []
        for path in sorted(self._folder.glob(f"{self._fresh.lineage}-*.json")):
            with contextlib.suppress(DataError):  # a damaged one is shown by `papo lineage`, and not gone on with
                found.append(read_record(path))
        return max(found, key=lambda record: record.last.at, default=None)

    def _write(self) -> None:
        began = time.monotonic()
        try:
            if self._patch is not None and self._start.diff is not None:
                with replacing(patch_file(self._folder, self._start.diff)) as temporary:
                    temporary.write_bytes(self._patch)
                self._patch = None
            write_json(self._folder / f"{self._record.id}.json", self._record.model_dump(mode="json"))
        except (
            PapoError,
            OSError,
        ) as error:  # a full disk must not keep a run from finding that there is nothing to do
            if not self._broken:
                self._warn(f"the record of this run cannot be written ({str(error).splitlines()[0]}); the run goes on")
            self._broken = True
        self._written = time.monotonic()
        self._took = self._written - began


def _by_choice(error: BaseException | None) -> bool:
    """Whether a person, a signal or an alarm ended the run; what alarms end has exit codes of its own, above 2."""
    return not isinstance(error, Exception) or (isinstance(error, PapoError) and error.exit_code > 2)


def _why(error: BaseException | None) -> str:
    """Messages of errors that are not papo's may hold anything, and are left out."""
    if error is None:
        return ""
    return error.what.splitlines()[0] if isinstance(error, PapoError) and error.what else type(error).__name__
