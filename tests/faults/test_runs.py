"""`papo run` killed where it is more than its stages: its record, its scoring ahead, the start that it shares, and `dvc commit`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.world import IMPORTS, PARAMS, contents
from forks import Papo, papo_forks, with_tests

from papo.errors import AlarmError
from papo.lineage.record import read_record

pytestmark = pytest.mark.ops

ONCE = ("session begins", "session ends", "verify", "verified", "judge", "judged")
RECORDS = ("write", "written", "renamed")
# A tracker that writes down what it is told, in the place of MLflow's.
TRACKER = """
import papo.commands
from faults.records import FileTracker
papo.commands.make_tracker = lambda params, *, outbox, warn: FileTracker({record!r})
"""


class Runs:
    """`papo run` of a small world with the embedded judge, its stages scored ahead."""

    def __init__(self, papo: Papo, folder: Path) -> None:
        self._papo, self._folder = papo, folder
        self.case, self.trace, self.record = folder / "case", folder / "trace", folder / "record"
        self._start = folder / "start"
        self._start.mkdir()
        for stage in ("prepare", "warmstart"):
            papo.run(stage, "--workspace", str(self._start))
        self.fresh()
        code, self.lines = self.run()
        assert code == 0, papo.log.read_text()
        self.whole = results(self.case)

    def fresh(self) -> None:
        shutil.rmtree(self.case, ignore_errors=True)
        self.record.unlink(missing_ok=True)
        shutil.copytree(self._start, self.case)

    def run(
        self, place: list[Any] | None = None, fault: str = "none", *options: str
    ) -> tuple[int, list[dict[str, str]]]:
        self.trace.unlink(missing_ok=True)
        at = place and {"place": place, "victim": ""}
        arm = f"child.arm({str(self.case)!r}, {str(self.trace)!r}, at={at!r}, fault={fault!r})"
        tracker = TRACKER.format(record=str(self.record))
        pid = self._papo.start("run", "--no-dvc", "--workspace", str(self.case), *options, before=f"{tracker}\n{arm}")
        code = self._papo.wait(pid)
        return code, [json.loads(line) for line in self.trace.read_text().splitlines()]

    def records(self) -> list[list[list[Any]]]:
        """What the tracker was told, from each start on."""
        found: list[list[list[Any]]] = []
        for line in self.record.read_text().splitlines():
            call = json.loads(line)
            if call[0] == "start":
                found.append([])
            found[-1].append(call)
        return found


def results(root: Path) -> dict[str, str]:
    """All but the report, which says how long things took."""
    return {name: text for name, text in contents(root).items() if "report" not in name}


def places(lines: list[dict[str, str]]) -> Iterator[list[Any]]:
    """The first and, where it matters, the last time of each point that is one of a run."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found: dict[tuple[str, str], list[list[Any]]] = {}
    for line in lines:
        key = (line["step"], line["point"], line["label"])
        seen[key] += 1
        own = line["label"] == ".papo/recorded"
        # Between its first and last write the record on disk is written now and then, as the clock says.
        own = own or (line["label"] == "artifacts/runs/#.json" and line["step"] in ("start", "over"))
        if line["point"] in (*ONCE, "track") or (own and line["point"] in RECORDS):
            found.setdefault((line["point"], line["label"]), []).append([*key, seen[key]])
    for (point, _), all_of in found.items():
        yield from {str(place): place for place in (all_of[:1] if point in ONCE else (all_of[0], all_of[-1]))}.values()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        folder = tmp_path_factory.mktemp("runs")
        with papo_forks(folder / "here", IMPORTS) as papo:
            judged = {"score_prm": {"judge": "steps"}, "run": {**PARAMS["run"], "rounds": 1, "overlap": True}}
            (papo.folder / "params.yaml").write_text(yaml.safe_dump(PARAMS | judged))
            yield Runs(papo, folder)


@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_beside_its_stages_ends_whole_and_is_recorded_whole(runs: Runs) -> None:
    chosen = list(places(runs.lines))
    assert {place[1] for place in chosen} == {*ONCE, *RECORDS, "track"}
    steps = len({line["detail"] for line in runs.lines if line["point"] == "stage begins"})
    for place in chosen:
        runs.fresh()
        code, lines = runs.run(place, "kill")
        if place[1] in ("verified", "judged", "judge", "verify") and code == 0:
            continue  # scored ahead in fewer pieces than before: the threads take what has come
        assert code == -signal.SIGKILL, place
        assert any(line["point"] == "struck" for line in lines), place
        assert runs.run()[0] == 0, place
        assert results(runs.case) == runs.whole, place
        records = runs.records()
        for record in records:  # nothing is told twice
            told = [tuple(call[1:]) for call in record if call[0] == "stage"]
            assert len(told) == len(set(told)), place
        finished = [record for record in records if record[-1][0] == "finish"]
        # Killed after the record was closed and before that was noted, it is recorded again, as a run of its own.
        again = place[2].startswith(".papo/recorded") and place[1] not in ("renamed", "kept")
        assert len(finished) <= 1 + again, place
        assert sum(call[0] == "stage" for call in finished[-1]) == steps, place
        (on_disk,) = (runs.case / "artifacts/runs").iterdir()  # nothing temporary beside it
        record = read_record(on_disk)
        assert record.state == "finished", place
        assert len(record.steps) == steps, place
    assert runs.run()[0] == 0  # and finds nothing to do
    assert runs.records() == records


@pytest.mark.timeout(900)
def test_an_alarm_that_stops_a_run_stops_it_though_it_is_killed_meanwhile(runs: Runs) -> None:
    values = ("alarms.patience=1", "alarms.exhausted_share=0", "on_alarm.signal_exhaustion=stop")
    options = [part for value in values for part in ("--set", value)]
    runs.fresh()
    assert runs.run(None, "none", *options)[0] == AlarmError.exit_code
    whole = results(runs.case)
    assert "artifacts/last_good.json" in whole
    for name in ("artifacts/last_good.json", ".papo/alarms.json"):
        for point, fault in (("write", "kill"), ("written", "torn"), ("renamed", "lost"), ("kept", "kill")):
            for path in ("artifacts/last_good.json", ".papo/alarms.json"):
                (runs.case / path).unlink(missing_ok=True)
            code, lines = runs.run(["end", point, name, 1], fault, *options)
            assert (code, lines[-1]["point"]) == (-signal.SIGKILL, "struck"), (name, point)
            assert runs.run(None, "none", *options)[0] == AlarmError.exit_code, (name, point)
            assert results(runs.case) == whole, (name, point)
            (stopped,) = json.loads((runs.case / ".papo/alarms.json").read_text()).values()
            assert stopped["stopped"]["why"] == "policy"
            assert stopped["stopped"]["alarms"][0]["name"] == "signal_exhaustion"


@pytest.mark.timeout(900)
def test_a_start_that_is_shared_half_way_is_shared_by_the_next(runs: Runs, tmp_path: Path) -> None:
    checkout, trace = tmp_path / "checkout", tmp_path / "trace"
    shutil.copytree(runs._start, checkout)
    shutil.copy(runs._papo.folder / "params.yaml", checkout)
    command = ["run", "--no-dvc", "--workspace", "beside"]

    def start(at: dict[str, Any] | None, fault: str) -> subprocess.CompletedProcess[str]:
        code = (
            f"import sys; from faults import child; child.arm({str(checkout / 'beside')!r}, {str(trace)!r}, at={at!r}, fault={fault!r})\n"
            "from papo import session; session.Session.step = lambda *_: sys.exit(0)\n"
            f"from papo.cli import main; sys.exit(main({command!r}))"
        )
        return subprocess.run(
            [sys.executable, "-c", code], cwd=checkout, env=with_tests(), capture_output=True, text=True, check=False
        )

    done = start(None, "none")
    assert done.returncode == 0, done.stderr
    links = [json.loads(line) for line in trace.read_text().splitlines() if '"link"' in line]
    whole = contents(checkout / "beside")
    assert whole == contents(checkout)
    counted: Counter[str] = Counter()
    chosen = []
    for line in links:
        counted[line["label"]] += 1
        chosen.append(["start", "link", line["label"], counted[line["label"]]])
    for place, fault, code in ((chosen[0], "kill", -9), (chosen[-1], "kill", -9), (chosen[1], "full", 2)):
        shutil.rmtree(checkout / "beside")
        done = start({"place": place, "victim": ""}, fault)
        assert done.returncode == code, done.stderr
        if fault == "full":
            assert "the disk is full" in done.stderr
            assert "to do: " in done.stderr
        assert start(None, "none").returncode == 0
        assert contents(checkout / "beside") == whole


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_while_dvc_commits_is_recorded_by_the_next(
    tiny_copy: Callable[[], Path], tmp_path: Path
) -> None:
    checkout = tiny_copy()
    for point, fault in (("dvc commit", "group"), ("dvc committed", "kill")):
        at = {"place": ["end", point, "", 1], "victim": ""}
        code = (
            f"import sys; from faults import child; child.arm({str(checkout)!r}, {str(tmp_path / 'trace')!r}, at={at!r}, fault={fault!r})\n"
            "from papo.cli import main; sys.exit(main(['run']))"
        )
        shutil.rmtree(checkout / ".dvc/cache", ignore_errors=True)
        (checkout / "dvc.lock").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=checkout, env=with_tests(), check=False, start_new_session=True
        )
        assert done.returncode == -signal.SIGKILL, point
        again = subprocess.run(
            [sys.executable, "-m", "papo", "run"], cwd=checkout, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, again.stderr
        status = subprocess.run(
            [sys.executable, "-m", "dvc", "status"], cwd=checkout, capture_output=True, text=True, check=True
        )
        assert "up to date" in status.stdout
