"""infra/compose.yaml as `docker compose` reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).parents[1] / "infra/compose.yaml"

SECRETS = (
    "POSTGRES_PASSWORD", "PREFECT_DB_PASSWORD", "MLFLOW_DB_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_WORKER_PASSWORD",
    "MLFLOW_SECRET_KEY", "PREFECT_AUTH", "VLLM_API_KEY",
)  # fmt: skip
GIVEN = {name: f"the-{name}" for name in SECRETS}
"""A value for each, by which it is found again."""


class UnsetError(Exception):
    """A variable that has to be set is not; its text is the message."""


def compose(**variables: str) -> dict[str, Any]:
    """The file with variables in place: `${NAME:-default}`, and `${NAME:?message}`, without which nothing starts.

    Raises:
        UnsetError: one of the latter is empty or not there.
    """
    # Of the values, as in a comment nothing is a variable.
    found = _put(yaml.safe_load(COMPOSE.read_text()), variables)
    assert isinstance(found, dict)
    return found


def _put(value: Any, variables: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _put(one, variables) for name, one in value.items()}
    if isinstance(value, list):
        return [_put(one, variables) for one in value]
    if not isinstance(value, str):
        return value

    def put(found: re.Match[str]) -> str:
        name, sort, text = found.groups()
        if given := variables.get(name):
            return given
        if sort == "?":
            raise UnsetError(text)
        return text

    whole = re.sub(r"\$\{([A-Z_]+):([-?])([^}]*)\}", put, value)
    assert "$" not in whole, f"a variable of another sort: {value}"
    return whole
