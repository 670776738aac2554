"""What can be wrong between a person and their runs on a Prefect server, and what to do about each."""

from __future__ import annotations

import base64
import json
import os
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import prefect
from prefect.settings import get_current_settings, load_profiles

from flows.notify import TARGET, target_problem
from papo.errors import PapoError, SetupError

POOL = "papo"
POOL_TYPES = ("process", "kubernetes")
QUEUE = "gpu"
DEPLOYMENTS = ("train-eval", "nightly-ablations", "evaluate")
AUTOMATIONS = ("papo: dead runs", "papo: lost runs", "papo: restarts")
PATIENCE_S = 15.0
BUSY_S = (1.0, 2.0, 4.0, 8.0, 16.0)


class Address(NamedTuple):
    """A value of PREFECT_API_URL, and who says so."""

    url: str
    where: str

    def __str__(self) -> str:
        return f"{shown(self.url)} ({self.where})"


def shown(url: str) -> str:
    """The address without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def addresses() -> list[Address]:
    """Every place that says where the server is, the one in force first; Prefect asks them in this order."""
    places = [
        (os.environ.get("PREFECT_API_URL"), "the environment: PREFECT_API_URL"),
        (_dotenv().get("PREFECT_API_URL"), "the file .env: PREFECT_API_URL"),
        (_toml("prefect.toml").get("api", {}).get("url"), "the file prefect.toml: api.url"),
        (
            _toml("pyproject.toml").get("tool", {}).get("prefect", {}).get("api", {}).get("url"),
            "the file pyproject.toml: tool.prefect.api.url",
        ),
        (_profiles().get(active := active_profile()[0]), f"the profile {active!r} of Prefect"),
    ]
    return [Address(url, where) for url, where in places if url]


def active_profile() -> tuple[str, str]:
    """The profile in force, and who says so.

    Raises:
        SetupError: it is named and does not exist; Prefect would take another one.
    """
    profiles = load_profiles()
    name, where = os.environ.get("PREFECT_PROFILE"), "the environment: PREFECT_PROFILE"
    if not name:
        name, where = profiles.active_name or "ephemeral", f"{get_current_settings().profiles_path}"
    if name not in profiles.names:
        known = ", ".join(sorted(profiles.names))
        fix = f"name one that exists, with `prefect profile use NAME` or PREFECT_PROFILE: {known}"
        raise SetupError(f"Prefect has no profile {name!r}", where=where, fix=fix)
    return name, where


def contradictions() -> list[str]:
    """Servers that are named elsewhere than by the place in force; a command in another shell may go there."""
    found = addresses()
    chosen = found[0] if found else None
    others = [
        f"{address} is not used: {chosen.where} says {shown(chosen.url)}"
        for address in found[1:]
        if chosen is not None and address.url.rstrip("/") != chosen.url.rstrip("/")
    ]
    active, where = active_profile()
    for name, url in sorted(_profiles().items()):
        if name != active and (chosen is None or url.rstrip("/") != chosen.url.rstrip("/")):
            others.append(f"the profile {name!r} has {shown(url)} and is not in force: that is {active!r} ({where})")
    return others


@contextmanager
def server() -> Iterator[httpx.Client]:
    """The API of the server that the settings name, once it has shown that it can be used.

    Raises:
        SetupError: no server is named, it does not answer, asks for a password, is none of Prefect, or of another version; in the `with`,
            too, if it stops answering or cannot do what it is asked.
    """
    found = addresses()
    if not found:
        named = "; ".join(f"profile {name!r}: {shown(url)}" for name, url in sorted(_profiles().items()))
        start = (
            "start one with `prefect server start --background` and `export PREFECT_API_URL=http://127.0.0.1:4200/api`"
        )
        name, where = active_profile()
        raise SetupError(
            "no Prefect server is named",
            where=f"the profile {name!r} ({where}), and the environment",
            fix=f"{start}, or choose one that is known ({named}) with `prefect profile use NAME`" if named else start,
        )
    with _client(found[0]) as client:
        _check_version(client, found[0])
        try:
            yield client
        except httpx.HTTPError as error:
            raise SetupError(
                f"the Prefect server did not do what it was asked: {str(error).splitlines()[0]}",
                where=str(found[0]),
                fix="its log says why; a server on SQLite may have too much to do: run this again later, or give it Postgres",
            ) from None


def check_named_server() -> None:
    """Checks the server that the settings name, if they name one; Prefect starts one of its own otherwise.

    Raises:
        as `server`, but for no server being named.
    """
    active_profile()
    if addresses():
        with server():
            pass


def check_pool(api: httpx.Client) -> None:
    """
    Raises:
        SetupError: the pool is missing, of a type that papo's deployments do not run on, or paused.
    """
    pool = read(api, f"/work_pools/{POOL}")
    where = f"the Prefect server {_shown(api)}"
    if pool is None:
        raise SetupError(f"there is no work pool {POOL!r}", where=where, fix="run `python -m flows.setup`")
    if pool["type"] not in POOL_TYPES:
        fix = (
            f"delete it with `prefect work-pool delete {POOL}` and run `python -m flows.setup`, if nothing else uses it"
        )
        raise SetupError(
            f"the work pool {POOL!r} is of the type {pool['type']!r}; papo runs on {' or '.join(POOL_TYPES)}",
            where=where,
            fix=fix,
        )
    if pool["is_paused"]:
        raise SetupError(
            f"the work pool {POOL!r} is paused: nothing in it starts",
            where=where,
            fix=f"`prefect work-pool resume {POOL}`",
        )


def check_queue(api: httpx.Client) -> None:
    """
    Raises:
        SetupError: the queue of the GPUs is missing, without a limit, or paused.
    """
    queue = read(api, f"/work_pools/{POOL}/queues/{QUEUE}")
    where = f"the work pool {POOL!r}"
    if queue is None or queue["concurrency_limit"] is None:
        what = f"two runs may train on one GPU: the queue {QUEUE!r} {'is missing' if queue is None else 'has no limit'}"
        raise SetupError(what, where=where, fix="run `python -m flows.setup`")
    if queue["is_paused"]:
        fix = f"`prefect work-queue resume {QUEUE} --pool {POOL}`"
        raise SetupError(f"the queue {QUEUE!r} is paused: no training starts", where=where, fix=fix)


def check_workers(api: httpx.Client) -> None:
    """
    Raises:
        SetupError: no worker asks for runs.
    """
    workers = api.post(f"/work_pools/{POOL}/workers/filter", json={}).raise_for_status().json()
    if not any(worker["status"] == "ONLINE" for worker in workers):
        last = max((worker["last_heartbeat_time"] or "" for worker in workers), default="")
        raise SetupError(
            f"no worker takes runs of the pool {POOL!r}" + (f"; the last was heard of at {last}" if last else ""),
            where=f"the Prefect server {_shown(api)}",
            fix=f"start one in the folder of the checkout: `prefect worker start --pool {POOL}`",
        )


def check_deployments(api: httpx.Client) -> None:
    """
    Raises:
        SetupError: some are missing.
    """
    missing = [name for name in DEPLOYMENTS if read(api, f"/deployments/name/papo/{name}") is None]
    if missing:
        names = ", ".join(f"papo/{name}" for name in missing)
        raise SetupError(f"not deployed: {names}", where=f"{_shown(api)}", fix="run `python -m flows.setup`")


def check_automations(api: httpx.Client) -> None:
    """
    Raises:
        SetupError: some are missing or switched off.
    """
    enabled = {found["name"] for found in automations(api) if found["enabled"]}
    if missing := [name for name in AUTOMATIONS if name not in enabled]:
        raise SetupError(
            f"not there, or switched off: {', '.join(missing)}; a run whose process died stays Running, or is not started again",
            where=f"the automations of {_shown(api)}",
            fix="run `python -m flows.setup`",
        )


def check_notifications(api: httpx.Client) -> None:
    """
    Raises:
        SetupError: PAPO_NOTIFY names nothing that messages can go to.
    """
    if problem := target_problem():
        raise SetupError(
            f"no message can be sent: {problem}", where=f"the environment: {TARGET}", fix="see docs/prefect.md"
        )


CHECKS: dict[str, Callable[[httpx.Client], None]] = {
    "work pool": check_pool,
    "one run per GPU": check_queue,
    "deployments": check_deployments,
    "automations": check_automations,
    "workers": check_workers,
    "notifications": check_notifications,
}


def examine() -> Iterator[tuple[str, str | PapoError]]:
    """Each check by name, with what it found, a line or the error; without a server there is no more to check."""
    try:
        for line in contradictions():
            yield "note", line
        with server() as api:
            yield "server", f"{addresses()[0]}, version {read(api, '/admin/version')}"
            for name, check in CHECKS.items():
                try:
                    check(api)
                    yield (
                        name,
                        "as it should be" if name != "notifications" or os.environ.get(TARGET) else "none wanted",
                    )
                except SetupError as error:
                    yield name, error
    except SetupError as error:
        yield "server", error


def read(api: httpx.Client, path: str) -> Any:
    """What lies there; None if there is nothing."""
    answer = api.get(path)
    return None if answer.status_code == httpx.codes.NOT_FOUND else answer.raise_for_status().json()


def automations(api: httpx.Client) -> list[dict[str, Any]]:
    """papo's, whether they are switched on or not."""
    query = {"automations": {"name": {"any_": list(AUTOMATIONS)}}}
    found: list[dict[str, Any]] = api.post("/automations/filter", json=query).raise_for_status().json()
    return found


def _check_version(api: httpx.Client, address: Address) -> None:
    where = str(address)
    try:
        answer = api.get("/admin/version")
        version = answer.json() if answer.is_success else None
    except httpx.HTTPError as error:
        start = "start it (`prefect server start --background`), or correct the address"
        notes = "".join(f"; {line}" for line in contradictions())
        what = f"the Prefect server does not answer ({type(error).__name__})"
        raise SetupError(what, where=where, fix=f"{start}{notes}") from None
    except json.JSONDecodeError:
        version = None
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        given = get_current_settings().api.auth_string is not None or get_current_settings().api.key is not None
        raise SetupError(
            f"the Prefect server {'refuses this password' if given else 'asks for a password'}",
            where=where,
            fix="export PREFECT_API_AUTH_STRING=user:password, as PREFECT_SERVER_API_AUTH_STRING of the server has it",
        )
    if not isinstance(version, str):
        raise SetupError(
            f"what answers there is no API of Prefect (status {answer.status_code})",
            where=where,
            fix="correct the address; it ends with /api, such as http://127.0.0.1:4200/api",
        )
    theirs, ours = _major_minor(version), _major_minor(prefect.__version__)
    if theirs[0] != ours[0] or theirs < ours:
        raise SetupError(
            f"the Prefect server has version {version}, and this environment {prefect.__version__}",
            where=where,
            fix=f"bring the server to {ours[0]}.{ours[1]} or a later {ours[0]}.x, or install the server's version here",
        )


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


class _Client(httpx.Client):
    """Asks a busy server again: on SQLite Prefect's says 503 while its database is locked, and has done nothing then."""

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        for pause in BUSY_S:
            answer = super().send(request, **options)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return answer
            answer.close()
            time.sleep(pause)
        return super().send(request, **options)


def _client(address: Address) -> httpx.Client:
    settings = get_current_settings().api
    headers = {}
    if settings.auth_string is not None:
        secret = settings.auth_string.get_secret_value()
        headers["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
    elif settings.key is not None:
        headers["Authorization"] = f"Bearer {settings.key.get_secret_value()}"
    verify: Any = not settings.tls_insecure_skip_verify
    if verify and settings.ssl_cert_file:
        verify = ssl.create_default_context(cafile=settings.ssl_cert_file)
    loopback = urlsplit(address.url).hostname in ("127.0.0.1", "localhost", "::1")
    try:
        return _Client(base_url=address.url, headers=headers, verify=verify, timeout=PATIENCE_S, trust_env=not loopback)
    except (httpx.InvalidURL, TypeError) as error:
        raise SetupError(f"this is no address: {error}", where=str(address), fix="correct it") from None


def _shown(api: httpx.Client) -> str:
    return shown(str(api.base_url)).rstrip("/")


def _profiles() -> dict[str, str]:
    """Profiles that name a server, and which: those that a person made, and the one in force."""
    found = {}
    made, active = load_profiles(include_defaults=False).names, active_profile()[0]
    for name, profile in load_profiles().items():
        if name not in made | {active}:
            continue
        if url := profile.to_environment_variables().get("PREFECT_API_URL"):
            found[name] = url
    return found


def _toml(name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(name).read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return {}


def _dotenv() -> dict[str, str]:
    try:
        lines = [line.strip().removeprefix("export ") for line in Path(".env").read_text().splitlines()]
    except OSError:
        return {}
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}
