"""Prefect's and MLflow's servers on a database of the test's, each on a free port of the loopback interface.

with prefect_server(tmp_path, server.uri("prefect", driver="postgresql+asyncpg")) as prefect:
    prefect.client_environment    # PREFECT_API_URL and a PREFECT_HOME of its own, for processes that ask it
with mlflow_server(tmp_path, server.uri("mlflow"), tmp_path / "artifacts") as mlflow:
    TrackingParams(uri=mlflow.url)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .processes import START_S, Server, clean_environment, free_port, serving


@dataclass
class PrefectServer(Server):
    """`url` is without /api."""

    @property
    def client_environment(self) -> dict[str, str]:
        """The environment of a process that uses this server, and nothing of the person's own Prefect."""
        home = self.folder / "prefect-client"
        return clean_environment({"PREFECT_API_URL": f"{self.url}/api", "PREFECT_HOME": str(home)})


@contextmanager
def prefect_server(
    folder: Path, database: str, *, environment: Mapping[str, str] | None = None, start_s: float = START_S
) -> Iterator[PrefectServer]:
    """`prefect server start` with its logs and its home in `folder`.

    Args:
        database: a URI with its password, of the driver postgresql+asyncpg or sqlite+aiosqlite.
        environment: further variables.
    """
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    variables = clean_environment(
        {
            "PREFECT_API_DATABASE_CONNECTION_URL": database,
            "PREFECT_HOME": str(folder / "prefect-server"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        | dict(environment or {})
    )
    server = PrefectServer(command, folder, "prefect", f"http://127.0.0.1:{port}", "/api/health", environment=variables)
    with serving(server, start_s=start_s):
        yield server


@contextmanager
def mlflow_server(
    folder: Path,
    database: str,
    artifacts: str | Path,
    *,
    environment: Mapping[str, str] | None = None,
    flags: tuple[str, ...] = (),
    start_s: float = START_S,
) -> Iterator[Server]:
    """`mlflow server` with its logs in `folder`; clients send artifacts to it, and it puts them under `artifacts`.

    Args:
        database: postgresql://USER:PASSWORD@HOST:PORT/NAME or sqlite:///PATH.
        artifacts: a folder, or s3://BUCKET with the credentials in `environment`.
        flags: further flags of `mlflow server`.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", database, "--artifacts-destination", str(artifacts), *flags,
    ]  # fmt: skip
    # Jobs of MLflow's own, such as for its gateway, take eight more processes, and papo uses none of them.
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    variables = clean_environment(quiet | dict(environment or {}))
    server = Server(command, folder, "mlflow", f"http://127.0.0.1:{port}", "/health", environment=variables)
    with serving(server, start_s=start_s):
        yield server
