"""A Postgres of Debian's packages for a test: a cluster in a folder of its own, on a free port of the loopback interface.

    with postgres("prefect", "mlflow") as server:                       # a database and a role of that name each
        server.uri("prefect", driver="postgresql+asyncpg")              # with the password of the role
        server.kill(); server.start()                                   # as after a crash

It takes the packages `postgresql` and no installation beyond them: no service is started or asked.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from .processes import Server, clean_environment, free_port, serving

SUPERUSER = "postgres"


def binaries() -> Path | None:
    """Where initdb and postgres lie, the newest of Debian's, or on the PATH; None where they are not."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def why_not() -> str | None:
    """Why no Postgres can be started here; None where it can."""
    if binaries() is None:
        return "Postgres is not installed: apt install postgresql"
    if os.getuid() == 0:
        try:
            pwd.getpwnam(SUPERUSER)
        except KeyError:
            return "Postgres refuses root, and there is no user `postgres`: apt install postgresql"
    return None


needs_postgres = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@dataclass
class Postgres(Server):
    """A running cluster; every role's password is `password(role)`, the superuser is `postgres`."""

    def password(self, role: str) -> str:
        return f"{role}-of-a-test"

    def uri(self, database: str, *, role: str | None = None, driver: str = "postgresql") -> str:
        """As SQLAlchemy reads it, as the role that owns the database unless told otherwise."""
        role = role or database
        return f"{driver}://{role}:{self.password(role)}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres", *, role: str = SUPERUSER) -> list[tuple[object, ...]]:
        """The rows of one statement, each in a transaction of its own.

        Raises:
            psycopg2.Error: as the server says it.
        """
        import psycopg2

        connection = psycopg2.connect(self.uri(database, role=role), connect_timeout=10)
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def create(self, name: str) -> None:
        """A role, and a database that it owns and no other role but the superuser may enter."""
        self.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{self.password(name)}'")
        self.execute(f"CREATE DATABASE {name} OWNER {name}")
        self.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")


@contextmanager
def postgres(*databases: str) -> Iterator[Postgres]:
    """A cluster with these databases; its files are gone when the `with` ends.

    What it writes is not forced to the disk: it survives kill -9, not a power cut, and a test takes seconds.
    """
    if reason := why_not():
        pytest.skip(reason)
    tools = binaries()
    assert tools is not None
    user = SUPERUSER if os.getuid() == 0 else None
    # Not below pytest's folder: Postgres as another user could not enter it, and a socket's path has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="papo-postgres-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, port = Path(name), free_port()
        data = folder / "data"
        if user is not None:
            shutil.chown(folder, user, user)
        secret = folder / "password"
        secret.write_text(f"{SUPERUSER}-of-a-test\n")
        secret.chmod(0o600)
        if user is not None:
            shutil.chown(secret, user, user)
        made = subprocess.run(
            [tools / "initdb", "--pgdata", data, "--username", SUPERUSER, "--pwfile", secret, "--auth", "scram-sha-256",
             "--encoding", "UTF8", "--locale", "C", "--no-sync"],
            cwd=folder, env=clean_environment(), user=user, group=user, extra_groups=None if user is None else [],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        options = {"listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": name, "fsync": "off"}
        command = [
            tools / "postgres",
            "-D",
            data,
            *(word for key in options for word in ("-c", f"{key}={options[key]}")),
        ]
        server = Postgres(
            command, folder, "postgres", f"http://127.0.0.1:{port}", lambda: _ready(server), user=user,
            stop_signal=signal.SIGINT,  # connections are ended, not awaited
        )  # fmt: skip
        with serving(server):
            for database in databases:
                server.create(database)
            yield server


def _ready(server: Postgres) -> bool:
    import psycopg2

    try:
        return server.execute("SELECT 1") == [(1,)]
    except psycopg2.OperationalError:
        return False
