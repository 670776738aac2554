"""A real MLflow server on a free port of loopback, which a test may kill, stop for a while and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from papo.engines.serving import free_port

START_S = 400.0  # beside other work; some ten seconds on a machine of its own


class MlflowServer:
    """`with` starts it; its database and artifacts lie in `folder` and outlive it.

    Args:
        backend: another database than an SQLite file in the folder.
        password: switches MLflow's basic auth on, with the user `admin`.
    """

    def __init__(self, folder: Path, *, backend: str | None = None, password: str | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.backend = backend or f"sqlite:///{folder}/server.db"
        self.url = f"http://127.0.0.1:{self.port}"
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MlflowServer:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self.backend, "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        if self._password is not None:
            config = self.folder / "auth.ini"
            config.write_text(
                "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
                f"database_uri = sqlite:///{self.folder}/auth.db\nadmin_username = admin\nadmin_password = {self._password}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test"}
            command += ["--app-name", "basic-auth"]
        with (self.folder / "server.log").open("ab") as log:
            # A group of its own, so that its workers end with it.
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        until = time.monotonic() + START_S
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError((self.folder / "server.log").read_text()[-3000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False
