"""All servers of infra/servers at once, each as its script starts it, with secrets and a folder of their own.

    with running() as stack:                                # Postgres, Prefect, MLflow, an S3 store; the workers' MLflow user
        stack.servers["prefect"].kill()
        with serving(stack.worker(checkout)): ...           # `serve worker` in a checkout
        stack.signed                                        # the environment of a person with the secrets

Prefect's and MLflow's servers run with a root that they cannot write to, as in their containers, where bubblewrap is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
import requests

from .processes import Server, clean_environment, free_port, serving
from .s3 import Store, s3_store

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "infra/servers/serve"


@dataclass
class Stack:
    """Secrets, ports and a folder, and what runs with them."""

    folder: Path
    store: Store
    secrets: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    servers: dict[str, Server] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a person has set who types the commands: no secret, but where they are."""
        return clean_environment(
            self.store.variables
            | {
                "SECRETS": str(self.folder / "secrets"),
                "DATA": str(self.folder / "data"),
                "TMPDIR": str(self.folder / "data/tmp"),
                "PYTHON": sys.executable,
                "ARTIFACTS": "s3://papo/mlflow",
                "POSTGRES_PORT": str(self.ports["postgres"]),
                "PREFECT_PORT": str(self.ports["prefect"]),
                "MLFLOW_PORT": str(self.ports["mlflow"]),
            }
        )

    @property
    def signed(self) -> dict[str, str]:
        """What a person has set who asks Prefect and MLflow."""
        user, password = self.as_user("papo-worker")
        return self.environment | {
            "PREFECT_API_URL": f"{self.servers['prefect'].url}/api",
            "PREFECT_API_AUTH_STRING": self.secrets["PREFECT_AUTH"],
            "PREFECT_HOME": str(self.folder / "data/tmp/prefect"),
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def worker(self, checkout: Path, name: str = "worker") -> Server:
        """A worker that runs flows in `checkout`, by the code that is there; its log lies in the folder of the stack."""
        self.ports.setdefault(name, free_port())
        environment = self.environment | {
            "HEALTH_PORT": str(self.ports[name]),
            "PREFECT_HOME": str(self.folder / f"data/tmp/{name}"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": str(checkout),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "DVC_NO_ANALYTICS": "true",
        }
        url = f"http://127.0.0.1:{self.ports[name]}"
        # By a shell in the folder, as a person does it.
        command = ["bash", "-c", 'cd "$0" && exec "$@"', checkout, SERVE, "worker", "--name", name]
        return Server(command, self.folder, name, url, "/health", environment=environment)

    def prefect(self, checkout: Path, *arguments: str) -> str:
        """What a command of Prefect says, typed in `checkout`."""
        command = [
            "bash",
            "-c",
            'cd "$0" && exec "$@"',
            checkout,
            sys.executable,
            "-m",
            "prefect",
            "--no-prompt",
            *arguments,
        ]
        environment = self.signed | {"PYTHONPATH": str(checkout)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def server(self, name: str, health: str | Callable[[], bool]) -> Server:
        command = [*self._confined(name), SERVE, name]
        return Server(
            command, self.folder, name, f"http://127.0.0.1:{self.ports[name]}", health, environment=self.environment
        )

    def _confined(self, name: str) -> list[str]:
        """A root that is read-only but for the data."""
        if name not in ("prefect", "mlflow") or shutil.which("bwrap") is None:
            return []
        data = str(self.folder / "data")
        return ["bwrap", "--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--bind", data, data, "--die-with-parent"]

    def serve(self, name: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """A command of the script that ends by itself."""
        return subprocess.run(
            [SERVE, name], cwd=self.folder, env=self.environment | changes, capture_output=True, text=True, check=False
        )

    def connect(self, database: str, role: str, password: str) -> Any:
        return psycopg2.connect(
            host="127.0.0.1", port=self.ports["postgres"], dbname=database, user=role, password=password
        )

    def rows(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        """As the superuser."""
        connection = self.connect(database, "postgres", self.secrets["POSTGRES_PASSWORD"])
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return list(cursor.fetchall())
        finally:
            connection.close()

    @property
    def mlflow(self) -> str:
        return self.servers["mlflow"].url

    def as_user(self, user: str) -> tuple[str, str]:
        secret = {"admin": "MLFLOW_ADMIN_PASSWORD", "papo-worker": "MLFLOW_WORKER_PASSWORD"}[user]
        return user, self.secrets[secret]

    def ask(self, path: str, user: str, **body: Any) -> requests.Response:
        """MLflow's reply to a POST, or to a GET without a body."""
        url, session = f"{self.mlflow}/api/2.0/mlflow/{path}", requests.Session()
        session.trust_env = False  # no proxy, no .netrc
        if body:
            return session.post(url, json=body, auth=self.as_user(user), timeout=60)
        return session.get(url, auth=self.as_user(user), timeout=60)


@contextmanager
def running() -> Iterator[Stack]:
    """The servers, healthy; nothing of them is left when the `with` ends."""
    # Not below pytest's folder, which the user `postgres` cannot enter.
    with ExitStack() as held:
        name = held.enter_context(
            tempfile.TemporaryDirectory(prefix="papo-servers-", dir="/tmp", ignore_cleanup_errors=True)
        )
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "data/tmp").mkdir(parents=True)
        store = held.enter_context(s3_store(folder, "papo"))
        result = Stack(folder, store)
        made = subprocess.run(
            [SERVE.with_name("secrets")], env=clean_environment({"SECRETS": f"{name}/secrets"}), check=False
        )
        assert made.returncode == 0
        result.secrets = dict(line.split("=") for line in (folder / "secrets").read_text().splitlines())
        for one in ("postgres", "prefect", "mlflow"):
            result.ports[one] = free_port()

        def roles_are_there() -> bool:
            return (folder / "postgres.log").read_text().endswith("with the roles prefect and mlflow\n")

        for one, health in (("postgres", roles_are_there), ("prefect", "/api/health"), ("mlflow", "/health")):
            result.servers[one] = held.enter_context(serving(result.server(one, health)))
        done = result.serve("mlflow-users")
        assert done.returncode == 0, done.stdout + done.stderr
        yield result
