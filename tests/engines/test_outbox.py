"""The journal of a run: what a torn tail, a flipped bit, a full disk and two deliverers do to it."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from papo.engines.tracking.delivery import Delivery, absolute, address
from papo.engines.tracking.outbox import Damaged, Journal, Outbox, Record
from papo.engines.tracking.troubles import DeliveryError
from papo.params import TrackingParams

TARGET = "http://host"
PARAMS = TrackingParams(uri=TARGET)
TAGS = {"papo.lineage": "abc", "papo.workspace": "/here"}
OPENING = {"name": "a run", "target": TARGET, "experiment": "papo", "params": {"seed": 1}, "tags": TAGS}


def no_warning(message: str) -> None:
    pytest.fail(f"warned: {message}")


def opened(
    folder: Path, warn: Callable[[str], None] = no_warning, key: Mapping[str, str] | None = None, target: str = TARGET
) -> Journal:
    return Outbox(folder).open(key or {}, target=target, experiment="papo", warn=warn)


def written(folder: Path, count: int = 5) -> Journal:
    """A journal with the opening and `count` tags."""
    journal = opened(folder)
    journal.append("start", OPENING)
    for number in range(count):
        journal.append("tag", {"key": "number", "value": str(number)})
    return journal


def values(journal: Journal) -> list[str]:
    return [item.content["value"] for item in journal.read() if isinstance(item, Record) and item.kind == "tag"]


class Server:
    """A backend that keeps what it is sent, as MLflow does: the same point twice is one. It can lose answers."""

    def __init__(self) -> None:
        self.at = 0.0
        self.opened: list[str] = []
        self.tags: list[str] = []
        self.times: list[float] = []
        self.finished = ""
        self.away = False
        self.lose_answer = 0

    def _stored(self) -> None:
        if self.away:
            raise ConnectionError("away")
        if self.lose_answer:
            self.lose_answer -= 1
            raise TimeoutError("timed out")

    def open(self, record: str, name: str, tags: Mapping[str, str], run: str) -> str:
        if self.away:
            raise ConnectionError("away")
        self.opened.append(record)
        return "id"

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self._stored()

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None:
        self._stored()

    def traces(self, round_: int | None, calls: Sequence[Mapping[str, Any]]) -> None:
        self._stored()

    def tag(self, key: str, value: str) -> None:
        if not self.away:
            self.tags.append(value)
            self.times.append(self.at)
        self._stored()

    def artifact(self, path: Path) -> None:
        self._stored()

    def policy(self, path: Path, name: str, metrics: Mapping[str, float], step: int) -> None:
        self._stored()

    def finish(self, status: str, metrics: Mapping[str, float], step: int) -> None:
        self._stored()
        self.finished = status

    def check(self) -> None:
        if self.away:
            raise ConnectionError("away")

    def link(self) -> str | None:
        return None


def deliver(journal: Journal, server: Server, say: Callable[[str], None] = no_warning) -> Delivery:
    delivery = Delivery(journal, PARAMS, lambda params: server, say=say)
    with delivery.held() as mine:
        assert mine
        while delivery.step():
            pass
        delivery.complete()
    return delivery


def test_records_are_delivered_in_order_with_the_times_at_which_they_were_made(tmp_path: Path) -> None:
    before = time.time()
    journal = written(tmp_path)
    journal.append("finish", {"status": "FINISHED", "metrics": {}, "step": 0})
    after = time.time()
    server = Server()
    time.sleep(0.05)
    deliver(journal, server)
    assert (server.tags, server.finished, server.opened) == (list("01234"), "FINISHED", [journal.id])
    assert all(before <= at <= after for at in server.times)
    assert not list(tmp_path.iterdir()), "nothing stays of what is delivered"


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_tail_is_dropped_with_a_warning(tmp_path: Path, cut: int) -> None:
    journal = written(tmp_path)
    journal.close()
    with journal.path.open("r+b") as stream:
        stream.truncate(journal.path.stat().st_size - cut)
    assert journal.torn() > 0
    warnings: list[str] = []
    again = opened(tmp_path, warnings.append, TAGS)
    assert again.path == journal.path
    [warning] = warnings
    assert "no whole record and are dropped" in warning
    again.append("tag", {"key": "number", "value": "after"})
    assert values(again) == ["0", "1", "2", "3", "after"]


@pytest.mark.parametrize("what", ["bit", "newline out", "newline in", "rubbish"])
def test_a_damaged_record_is_set_aside_named_and_skipped(tmp_path: Path, what: str) -> None:
    journal = written(tmp_path)
    data = bytearray(journal.path.read_bytes())
    place = data.index(b'"value": "2"')
    match what:
        case "bit":
            data[place + 10] ^= 1
        case "newline out":
            data[data.index(b"\n", place)] = ord("x")
        case "newline in":
            data[place] = ord("\n")
        case "rubbish":
            data[place : place + 10] = b'\xff\x00{["9e999'
    journal.path.write_bytes(data)
    said: list[str] = []
    server = Server()
    delivery = deliver(journal, server, said.append)
    lost = ["2", "3"] if what == "newline out" else ["2"]
    assert server.tags == [value for value in "01234" if value not in lost]
    assert len(said) == (2 if what == "newline in" else 1)
    assert "is set aside in" in said[0]
    assert str(journal.path) in said[0]
    assert b"number" in journal.damaged.read_bytes()
    assert delivery.waiting == 0


def test_a_journal_whose_first_record_is_damaged_is_delivered_as_a_run_of_its_id(tmp_path: Path) -> None:
    journal = written(tmp_path)
    data = bytearray(journal.path.read_bytes())
    data[20] ^= 1
    journal.path.write_bytes(data)
    server = Server()
    deliver(journal, server, lambda message: None)
    assert (server.tags, server.opened) == (list("01234"), [journal.id])


def test_a_note_of_progress_that_is_damaged_costs_a_second_delivery_only(tmp_path: Path) -> None:
    journal, server = written(tmp_path), Server()
    deliver(journal, server)
    [note] = tmp_path.glob("*.done")
    for text in ("", "{", '{"offset": 1, "unknown": 2}', "[]"):
        note.write_text(text)
        assert journal.waiting(TARGET) == 6
    deliver(journal, server)
    assert journal.waiting(TARGET) == 0


def test_a_start_of_the_same_run_goes_on_with_its_journal_unless_it_had_ended_well(tmp_path: Path) -> None:
    first = written(tmp_path)
    first.append("finish", {"status": "FAILED"})
    first.close()
    second = opened(tmp_path, key=TAGS)
    assert second.id == first.id
    assert opened(tmp_path, key=TAGS | {"papo.lineage": "abd"}).id != first.id
    assert opened(tmp_path, key=TAGS, target="http://other").id != first.id, "what one server has, another has not"
    assert opened(tmp_path).id != first.id
    second.append("start", OPENING)
    assert second.status() == ""
    second.append("finish", {"status": "FINISHED"})
    assert opened(tmp_path, key=TAGS).id != first.id


def test_a_failure_in_between_leaves_the_rest_and_an_answer_that_was_lost_makes_another_try(tmp_path: Path) -> None:
    journal, server = written(tmp_path), Server()
    server.lose_answer = 2
    deliver(journal, server)
    assert list(dict.fromkeys(server.tags)) == list("01234")
    assert len(server.opened) == 3, "what is there is looked at anew after each"

    journal.append("tag", {"key": "number", "value": "5"})
    server.away = True
    with pytest.raises(DeliveryError, match="unreachable"):
        deliver(journal, server)
    assert journal.waiting(TARGET) == 1


def test_a_record_that_a_server_never_takes_does_not_hold_the_others(tmp_path: Path) -> None:
    journal, server = written(tmp_path, 1), Server()
    server.lose_answer = 99
    delivery = deliver(journal, server)
    assert delivery.waiting == 2
    assert all("timed out" in line for line in delivery.refused)
    server.lose_answer = 0
    with delivery.held():
        delivery.again()
    assert delivery.waiting == 0


def test_two_deliverers_send_each_record_once(tmp_path: Path) -> None:
    journal, server = written(tmp_path, 60), Server()

    def work() -> None:
        delivery = Delivery(Journal(journal.path), PARAMS, lambda params: server, say=no_warning)
        until = time.monotonic() + 100
        while delivery.waiting and time.monotonic() < until:
            with delivery.held() as mine:
                for _ in range(3):
                    if mine:
                        delivery.step()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.tags == [str(number) for number in range(60)]


def test_an_artifact_is_copied_and_a_policy_is_not(tmp_path: Path) -> None:
    journal = opened(tmp_path / "outbox")
    report, policy = tmp_path / "report", tmp_path / "policy"
    for folder in (report, policy):
        folder.mkdir()
        (folder / "file").write_text("before")
    kept, named = journal.keep(report, copy=True), journal.keep(policy, copy=False)
    assert journal.keep(report, copy=True) == kept
    assert [path.name for path in journal.files.rglob("file")] == ["file"], "the same content is copied once"
    (report / "file").write_text("after it")
    (policy / "file").write_text("after it")
    assert (journal.find(kept) / "file").read_text() == "before"
    assert journal.find(kept).name == "report"
    with pytest.raises(ValueError, match="no longer what was recorded"):
        journal.find(named)
    (policy / "file").unlink()
    policy.rmdir()
    with pytest.raises(FileNotFoundError, match="gone"):
        journal.find(named)


def test_what_the_disk_does_not_take_waits_in_memory_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = written(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = journal.path.stat().st_size
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))  # the next write is torn in its middle
    try:
        with pytest.raises(OSError):  # noqa: PT011  # whichever the system raises
            journal.append("tag", {"key": "number", "value": "5" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert journal.path.stat().st_size == size, "the half of a record is taken back"
    journal.append("tag", {"key": "number", "value": "6"})
    assert len(journal.unwritten) == 2
    monkeypatch.setattr("papo.engines.tracking.outbox.MEMORY_BYTES", 1000)
    for _ in range(100):
        journal.append("tag", {"key": "number", "value": "7"})
    assert len(journal.unwritten) + journal.dropped == 102
    assert journal.dropped > 80
    server = Server()
    deliver(journal, server)
    assert server.tags[:7] == [*"01234", "5" * 50, "6"]


def test_an_outbox_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("papo.engines.tracking.outbox.OUTBOX_BYTES", 2000)
    first = written(tmp_path, 5)
    second = opened(tmp_path)
    failures = []
    for _ in range(100):
        try:
            second.append("tag", {"key": "number", "value": "more"})
        except OSError as error:
            failures.append(str(error))
    assert len(failures) == 1
    assert "limit" in failures[0]
    assert sum(path.stat().st_size for path in (first.path, second.path)) <= 2000


def test_journals_of_failed_runs_that_are_wholly_delivered_do_not_pile_up(tmp_path: Path) -> None:
    for number in range(30):
        journal = opened(tmp_path)
        journal.append("start", OPENING | {"tags": {"papo.lineage": str(number)}})
        journal.append("finish", {"status": "FAILED", "metrics": {}, "step": 0})
        if number != 3:
            deliver(journal, Server())
        journal.close()
    left = [journal.opening() for journal in Outbox(tmp_path).journals()]
    lineages = [record.content["tags"]["papo.lineage"] for record in left if record]
    assert "3" in lineages, "what waits is never thrown away"
    assert 20 <= len(left) <= 23


@pytest.mark.parametrize(
    ("recorded", "given", "environment", "address_"),
    [
        ("http://host", "http://host", "", "http://host"),
        ("http://***@host", "http://me:pw@host", "", "http://me:pw@host"),
        ("http://***@host", "http://other", "http://me:pw@host", "http://me:pw@host"),
        ("http://host", "http://me:pw@other", "", "http://host"),
        ("http://***@host", "http://me:pw@other", "", None),
    ],
)
def test_a_password_comes_from_params_or_environment(
    recorded: str, given: str, environment: str, address_: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    params = TrackingParams(uri=given)
    if address_ is None:
        with pytest.raises(DeliveryError, match="MLFLOW_TRACKING_URI"):
            address(recorded, params)
    else:
        assert address(recorded, params) == address_
    assert address(recorded, params, "sqlite:///x.db") == absolute("sqlite:///x.db")


def test_lines_are_json_behind_a_checksum(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append("tag", {"key": "half a pair", "value": "\ud800 \n \x00 \u3042", "number": float("inf")})
    [line] = journal.path.read_bytes().splitlines()
    assert json.loads(line.split(b" ", 1)[1])["kind"] == "tag"
    [record] = journal.read()
    assert isinstance(record, Record)
    assert record.content == {"key": "half a pair", "value": "\ud800 \n \x00 \u3042", "number": float("inf")}
    assert not any(isinstance(item, Damaged) for item in journal.read())


WRITER = """
import sys
from pathlib import Path
from papo.engines.tracking.outbox import Outbox
journal = Outbox(Path(sys.argv[1])).open({}, target="t", experiment="e", warn=print)
print("ready", flush=True)
for number in range(10**6):
    journal.append("tag", {"key": "number", "value": str(number), "much": "x" * 5000})
    print(number, flush=True)
"""


def test_a_record_is_kept_once_append_has_returned_however_the_process_ends(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.kill()
        said = [int(line) for line in process.stdout.read().split()]
    [journal] = Outbox(tmp_path).journals()
    assert len(said) > 10
    kept = values(journal)
    assert kept[: len(said)] == [str(number) for number in said]
    assert len(kept) <= len(said) + 1
