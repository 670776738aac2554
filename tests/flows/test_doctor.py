"""What a person is told where Prefect is not set up as it should be."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import prefect
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_PROFILES_PATH, temporary_settings

from flows import doctor, setup
from papo.errors import SetupError

from .processes import free_port

OURS = prefect.__version__
POOL = {"type": "process", "is_paused": False}
QUEUE = {"concurrency_limit": 1, "is_paused": False}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No server is named anywhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_API_AUTH_STRING", "PAPO_NOTIFY"):
        monkeypatch.delenv(name, raising=False)
    with temporary_settings({PREFECT_PROFILES_PATH: tmp_path / "profiles.toml"}):
        yield


@pytest.fixture
def answering() -> Iterator[Callable[[int, str], str]]:
    """Starts a server that always answers the same; its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(status: int, body: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told = self.headers.get("Authorization") == "Basic bGFiOnJpZ2h0"  # lab:right
                self.send_response(200 if told else status)
                self.end_headers()
                self.wfile.write((json.dumps(OURS) if told else body).encode())

            def log_message(self, *_: Any) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/api"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refused() -> SetupError:
    with pytest.raises(SetupError) as caught, doctor.server():
        pass
    assert caught.value.exit_code == 2
    assert caught.value.where
    assert caught.value.fix
    return caught.value


def test_a_server_that_does_not_answer_is_named_with_who_named_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url := f"http://lab:secret@127.0.0.1:{free_port()}/api")
    error = refused()
    assert "does not answer (ConnectError)" in error.what
    assert error.where == f"{url.replace('lab:secret@', '')} (the environment: PREFECT_API_URL)"
    assert "prefect server start" in error.fix


@pytest.mark.parametrize(
    ("status", "body", "what", "fix"),
    [
        (401, "", "asks for a password", "PREFECT_API_AUTH_STRING=user:password"),
        (200, "<html></html>", "no API of Prefect", "ends with /api"),
        (404, '{"detail": "Not Found"}', "no API of Prefect (status 404)", "ends with /api"),
        (200, '"2.20.9"', f"has version 2.20.9, and this environment {OURS}", "bring the server to"),
        (200, '"3.1.0"', f"has version 3.1.0, and this environment {OURS}", "bring the server to"),
        (200, '"4.0.0"', f"has version 4.0.0, and this environment {OURS}", "install the server's version"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, answering: Callable[[int, str], str], status: int, body: str, what: str, fix: str
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", answering(status, body))
    error = refused()
    assert what in error.what
    assert fix in error.fix


def test_the_password_is_tried(monkeypatch: pytest.MonkeyPatch, answering: Callable[[int, str], str]) -> None:
    monkeypatch.setenv("PREFECT_API_URL", answering(401, ""))
    with temporary_settings({PREFECT_API_AUTH_STRING: "lab:wrong"}):
        assert "refuses this password" in refused().what
    with temporary_settings({PREFECT_API_AUTH_STRING: "lab:right"}), doctor.server():
        pass


@pytest.mark.parametrize("busy", [2, 99])
def test_a_busy_server_is_asked_again_and_one_that_stays_busy_is_said(
    monkeypatch: pytest.MonkeyPatch, busy: int
) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503 if self.path.endswith("gpu") and asked.count(self.path) <= busy else 200)
            self.end_headers()
            self.wfile.write(json.dumps(OURS).encode())

        def log_message(self, *_: Any) -> None: ...

    monkeypatch.setattr(doctor, "BUSY_S", (0.0, 0.0, 0.0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
    try:
        if busy == 2:
            with doctor.server() as api:
                assert doctor.read(api, "/gpu") == OURS
            assert asked[1:] == ["/api/gpu"] * 3
        else:
            with pytest.raises(SetupError, match="503 Service Unavailable") as caught, doctor.server() as api:
                doctor.read(api, "/gpu")
            assert asked[1:] == ["/api/gpu"] * 4
            assert "PREFECT_API_URL" in caught.value.where
            assert "Postgres" in caught.value.fix
    finally:
        server.shutdown()
        server.server_close()


def test_a_later_server_of_the_same_major_version_is_taken(
    monkeypatch: pytest.MonkeyPatch, answering: Callable[[int, str], str]
) -> None:
    major, minor = OURS.split(".")[:2]
    monkeypatch.setenv("PREFECT_API_URL", answering(200, json.dumps(f"{major}.{int(minor) + 1}.0")))
    doctor.check_named_server()


PROFILES = """
active = "lab"
[profiles.lab]
PREFECT_API_URL = "http://lab.invalid:4200/api"
[profiles.home]
PREFECT_API_URL = "http://home.invalid:4200/api"
"""


def test_of_two_profiles_and_the_environment_it_is_said_which_is_in_force(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "profiles.toml").write_text(PROFILES)
    assert str(doctor.addresses()[0]) == "http://lab.invalid:4200/api (the profile 'lab' of Prefect)"
    (line,) = doctor.contradictions()
    assert line.startswith("the profile 'home' has http://home.invalid:4200/api and is not in force: that is 'lab'")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    first, second = doctor.contradictions()
    assert first.startswith("http://lab.invalid:4200/api (the profile 'lab' of Prefect) is not used: the environment")
    assert "'home'" in second
    monkeypatch.setenv("PREFECT_PROFILE", "home")
    assert doctor.active_profile() == ("home", "the environment: PREFECT_PROFILE")


def test_no_server_at_all_is_said_with_the_profiles_that_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "prefect server start --background" in refused().fix
    (tmp_path / "profiles.toml").write_text(PROFILES.replace('active = "lab"', 'active = "ephemeral"'))
    error = refused()
    assert "profile 'home': http://home.invalid:4200/api; profile 'lab'" in error.fix
    assert "`prefect profile use NAME`" in error.fix
    monkeypatch.setenv("PREFECT_PROFILE", "lap")
    assert "no profile 'lap'" in refused().what


def test_a_place_in_the_folder_comes_before_the_profile(tmp_path: Path) -> None:
    (tmp_path / "profiles.toml").write_text(PROFILES)
    (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:1/api"\n')
    assert doctor.addresses()[0].where == "the file prefect.toml: api.url"
    (tmp_path / ".env").write_text("export PREFECT_API_URL='http://127.0.0.1:2/api'\n")
    assert doctor.addresses()[0].url == "http://127.0.0.1:2/api"


def api(**found: Any) -> httpx.Client:
    """A server that has what is given, by the end of the path."""

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path.removesuffix("/filter").split("/")[-1]
        body = found.get(path, found.get("other"))
        return httpx.Response(404) if body is None else httpx.Response(200, json=body)

    return httpx.Client(transport=httpx.MockTransport(answer), base_url="http://lab.invalid/api")


ONLINE = [{"status": "ONLINE", "last_heartbeat_time": "2026-01-01"}]
OFFLINE = [{"status": "OFFLINE", "last_heartbeat_time": "2026-01-01"}]


@pytest.mark.parametrize(
    ("check", "found", "what", "fix"),
    [
        (doctor.check_pool, {}, "no work pool 'papo'", "python -m flows.setup"),
        (doctor.check_pool, {"papo": POOL | {"type": "docker"}}, "of the type 'docker'", "prefect work-pool delete papo"),
        (doctor.check_pool, {"papo": POOL | {"is_paused": True}}, "is paused", "prefect work-pool resume papo"),
        (doctor.check_queue, {}, "'gpu' is missing", "python -m flows.setup"),
        (doctor.check_queue, {"gpu": QUEUE | {"concurrency_limit": None}}, "has no limit", "python -m flows.setup"),
        (doctor.check_queue, {"gpu": QUEUE | {"is_paused": True}}, "is paused", "prefect work-queue resume gpu --pool papo"),
        (doctor.check_workers, {"workers": []}, "no worker takes runs", "prefect worker start --pool papo"),
        (doctor.check_workers, {"workers": OFFLINE}, "last was heard of at 2026-01-01", "prefect worker start"),
        (doctor.check_deployments, {"train-eval": {}}, "papo/nightly-ablations, papo/evaluate", "python -m flows.setup"),
        (doctor.check_automations, {"automations": [{"name": "papo: dead runs", "enabled": False}]}, "papo: dead runs", "setup"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_server_is_said_with_what_to_do(
    check: Callable[[httpx.Client], None], found: dict[str, Any], what: str, fix: str
) -> None:
    with api(**found) as client, pytest.raises(SetupError) as caught:
        check(client)
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.where


def test_what_is_as_it_should_be_passes() -> None:
    there = [{"name": name, "enabled": True} for name in doctor.AUTOMATIONS]
    found = {
        "papo": POOL,
        "gpu": QUEUE | {"concurrency_limit": 4},
        "workers": ONLINE,
        "automations": there,
        "other": {},
    }
    with api(**found) as client:
        for check in doctor.CHECKS.values():
            check(client)


@pytest.mark.parametrize("target", ["slack", "slack-webhook/", "/lab"])
def test_a_target_of_messages_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setenv("PAPO_NOTIFY", target)
    with api() as client, pytest.raises(SetupError, match="names nothing that messages can go to"):
        doctor.check_notifications(client)


def test_what_the_server_has_more_is_no_difference() -> None:
    wanted = {"trigger": {"within": 60, "expect": ["a", "b"]}, "enabled": True}
    found = {"id": "1", "trigger": {"within": 60, "expect": ["b", "a"], "threshold": 1}, "enabled": True}
    assert setup._same(wanted, found)
    assert not setup._same(wanted, found | {"enabled": False})
    assert not setup._same(wanted | {"trigger": {"within": 90}}, found)


@pytest.mark.parametrize("module", ["flows.pipeline", "flows.setup"])
def test_a_person_at_a_terminal_gets_the_message_and_the_exit_code(tmp_path: Path, module: str) -> None:
    (tmp_path / "prefect.yaml").touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = kept | {
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "PREFECT_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "papo: the Prefect server does not answer" in done.stderr
    assert "to do: start it" in done.stderr
    assert "Traceback" not in done.stderr
