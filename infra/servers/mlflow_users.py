"""Makes the experiment and the MLflow user of the workers, who may write to this experiment and is no administrator.

    infra/servers/serve mlflow-users

Run again, it changes what has to be changed: the user's password is that of the environment, its permission on the experiment is EDIT.
Variables: MLFLOW_TRACKING_URI, MLFLOW_ADMIN_PASSWORD, MLFLOW_WORKER_PASSWORD; EXPERIMENT=papo, MLFLOW_WORKER=papo-worker.

By MLflow's REST API alone, as importing MLflow's client takes longer than all of this.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

PERMISSION = "EDIT"  # reads and writes; neither deletes the experiment nor hands permissions on


class RefusedError(Exception):
    """The server does not do what it was asked for; `status` is HTTP's, 0 where it does not answer."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


class Api:
    """Requests in the name of one user. Proxies are for others."""

    def __init__(self, uri: str, user: str, password: str) -> None:
        self._uri, self._user = uri.rstrip("/"), user
        self._signed = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path: str, **query: str) -> Any:
        return self._ask("GET", f"{path}?{urllib.parse.urlencode(query)}", None)

    def send(self, method: str, path: str, **body: Any) -> Any:
        return self._ask(method, path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        url = f"{self._uri}/api/{path}"
        headers = {"Authorization": self._signed, "Content-Type": "application/json"}
        try:
            with self._direct.open(urllib.request.Request(url, body, headers, method=method), timeout=120) as reply:
                return json.loads(reply.read() or b"{}")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip()
            raise RefusedError(error.code, f"{method} {url} as {self._user}: HTTP {error.code}: {said}") from None
        except OSError as error:
            raise RefusedError(0, f"{self._uri} does not answer: {error}") from None


def set_up(uri: str, experiment: str, user: str, *, admin: str, password: str) -> Iterator[str]:
    """Does what is not so yet, and says what, a line each.

    Args:
        admin: the administrator's password.
        password: the user's.
    """
    api = Api(uri, "admin", admin)
    try:
        identifier = api.get("2.0/mlflow/experiments/get-by-name", experiment_name=experiment)["experiment"][
            "experiment_id"
        ]
    except RefusedError as error:
        if error.status != 404:
            raise
        identifier = api.send("POST", "2.0/mlflow/experiments/create", name=experiment)["experiment_id"]
        yield f"experiment {experiment} is made"
    try:
        known = api.get("2.0/mlflow/users/get", username=user)["user"]
    except RefusedError as error:
        if error.status != 404:
            raise
        api.send("POST", "2.0/mlflow/users/create", username=user, password=password)
        yield f"user {user} is made"
    else:
        if known["is_admin"]:
            api.send("PATCH", "2.0/mlflow/users/update-admin", username=user, is_admin=False)
            yield f"user {user} is an administrator no more"
        try:
            Api(uri, user, password).get("2.0/mlflow/users/get", username=user)
        except RefusedError as error:
            if error.status != 401:
                raise
            api.send("PATCH", "2.0/mlflow/users/update-password", username=user, password=password)
            yield f"user {user} has the password of the environment"
    where = {"username": user, "resource_type": "experiment", "resource_id": identifier}
    if api.get("3.0/mlflow/users/permissions/get", **where)["permission"] != PERMISSION:
        api.send("POST", "3.0/mlflow/users/permissions/grant", **where, permission=PERMISSION)
        yield f"user {user} may write to experiment {experiment}"


def main() -> None:
    given = {"EXPERIMENT": "papo", "MLFLOW_WORKER": "papo-worker", **os.environ}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_WORKER_PASSWORD"):
        if not given.get(name):
            sys.exit(f"{name} is not set; infra/servers/secrets makes passwords")
    done = 0
    try:
        for line in set_up(
            given["MLFLOW_TRACKING_URI"], given["EXPERIMENT"], given["MLFLOW_WORKER"],
            admin=given["MLFLOW_ADMIN_PASSWORD"], password=given["MLFLOW_WORKER_PASSWORD"],
        ):  # fmt: skip
            done += 1
            sys.stdout.write(f"{line}\n")
    except RefusedError as error:
        hint = (
            "; MLFLOW_ADMIN_PASSWORD counts when the server first starts, later it is changed in MLflow"
            if error.status == 401
            else ""
        )
        sys.exit(f"{error}{hint}")
    if not done:
        sys.stdout.write("nothing to do\n")


if __name__ == "__main__":
    main()
