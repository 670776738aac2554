"""No secret of the environment gets out of it: a run with all that could carry one, and everything that it left is looked through."""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from checkout import TINIEST
from forks import with_tests
from leaks import leaks
from sandboxes import sandboxed
from servers import echoing
from servers.chat import Plan, process_of

from papo.engines.sandbox import Program, Sandbox
from papo.params import validate_params

ROOT = Path(__file__).parents[1]
JUDGE, MLFLOW, HUB, PROXY, STORE = (
    f"plantedin{name}4f7a1c93e2" for name in ("judge", "mlflow", "hub", "proxy", "store")
)
PLANTED = (JUDGE, MLFLOW, HUB, PROXY, STORE)
CANARY = "canary-of-the-params"


def environment(home: Path) -> dict[str, str]:
    """Secrets wherever people have them; whatever is cached or logged goes below `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    (home / "tmp").mkdir(parents=True)
    return inherited | {
        "JUDGE_KEY": f"sk-{JUDGE}",
        "RECORD": f"http://somebody:{MLFLOW}@127.0.0.1:9",
        "MLFLOW_TRACKING_USERNAME": "somebody",
        "MLFLOW_TRACKING_PASSWORD": MLFLOW,
        "HF_TOKEN": f"hf_{HUB}",
        "HTTP_PROXY": f"http://somebody:{PROXY}@127.0.0.1:9",
        "HTTPS_PROXY": f"http://somebody:{PROXY}@127.0.0.1:9",
        "NO_PROXY": "127.0.0.1,localhost",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": STORE,
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "240",
        "PYTHONPATH": with_tests()["PYTHONPATH"],
        "HF_HOME": str(home / "hf"),
        "TMPDIR": str(home / "tmp"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with planted secrets left: a checkout with git and DVC, Prefect's home, caches, and all that was said."""
    world = tmp_path_factory.mktemp("world")
    checkout, home = world / "checkout", world / "home"
    checkout.mkdir()
    shutil.copytree(ROOT / "papo", checkout / "papo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, checkout)
    subprocess.run(["git", "init", "--quiet", str(checkout)], check=True)
    (checkout / ".dvc").mkdir()
    (checkout / ".dvc/config").write_text("[core]\n    analytics = false\n")
    variables = environment(home)

    def said(name: str, *command: str) -> int:
        """The exit code; what was printed lies beside the checkout, and nothing that was started is left."""
        with (world / f"{name}.stdout").open("wb") as out, (world / f"{name}.stderr").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=checkout,
                env=variables,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
            try:
                return process.wait(600)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    with process_of(echoing.__file__, Plan()) as server:
        values = TINIEST | {
            "advantage": {"variant": "prm"},
            "score_prm": {
                "judge": "model",
                "model": {"model": "m", "base_url": server.url, "api_key_env": "JUDGE_KEY", "temperature": 0.0},
                "prices": {"m": {"prompt": 1.0, "completion": 1.0}},
            },
            "report": {"title": CANARY},
            "tracking": {"judge_traces": 1.0},
        }
        whole = validate_params(values, origin="a test").model_dump(mode="json")  # DVC wants all that dvc.yaml names
        (checkout / "params.yaml").write_text(yaml.safe_dump(whole))
        assert said("dvc", "-m", "papo", "dvc") == 0
        assert said("flow", "-m", "flows.pipeline", "--set", f"report.title={CANARY}") == 0, (
            world / "flow.stderr"
        ).read_text()[-3000:]
        assert said("explain", "-m", "papo", "advantage", "--round", "0", "--compare") == 0
    # The judge is gone, and nobody is where the record should go; other seeds, so that there is something to do.
    gone = ("run.seed=1", "tracking.uri_env=RECORD", "score_prm.model.tries=1", "score_prm.model.breaker=1")
    given = [word for override in gone for word in ("--set", override)]
    assert said("gone", "-m", "papo", "run", "--no-dvc", "--workspace", "runs/gone", *given) == 1
    (checkout / "broken.py").write_text(
        "import papo.stages.score_orm as s\ns.run = None\nfrom papo.cli import main\nmain(['score-orm', '--round', '0'])\n"
    )
    said("crash", "broken.py")
    return world


@pytest.mark.ops
def test_no_secret_is_anywhere(world: Path) -> None:
    assert leaks(world, PLANTED) == []


@pytest.mark.ops
def test_what_goes_the_same_ways_is_found_there(world: Path) -> None:
    found = {(path, kind) for path, kind, _ in leaks(world, [CANARY, "canary-of-the-judge"])}
    places = {
        ("checkout/artifacts/rounds/0/prm.parquet", "parquet"),
        ("checkout/.papo/verdicts.sqlite", "sqlite"),
        ("checkout/mlflow.db", "sqlite"),
        ("checkout/artifacts/report.manifest.json", "file"),
        ("checkout/artifacts/report/index.html", "file"),
        ("checkout/dvc.lock", "file"),
        ("home/prefect/prefect.db", "sqlite"),
    }
    assert found >= places
    assert any(path.startswith("checkout/mlartifacts/") for path, _ in found)
    assert any(path.startswith("checkout/.dvc/cache/") for path, _ in found)
    # Each failure was said: a judge that does not answer, a record that is not to be had, a crash.
    gone = (world / "gone.stderr").read_text()
    assert "MLflow is unreachable at http://***@127.0.0.1:9" in gone
    assert "the server of the model m is down" in gone
    assert "Traceback" in (world / "crash.stderr").read_text()


def _row(folder: Path, secret: str) -> None:
    with closing(sqlite3.connect(folder / "a.db")) as database:
        database.execute("pragma journal_mode = wal")
        database.execute("create table notes (id integer, text text)")
        database.execute(
            "insert into notes values (1, ?)", ["x" * 3990 + secret + "x" * 9000]
        )  # over the end of a page
        database.commit()


def _column(folder: Path, secret: str) -> None:
    table = pa.table({"votes": [[{"why": f"because {secret}"}]] * 100})
    pq.write_table(table, folder / "a.parquet", compression="zstd")


def _zip(folder: Path, secret: str) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside.txt", secret * 3)


def _named(folder: Path, secret: str) -> None:
    (folder / f"run-{secret}").mkdir()


PLACES: dict[str, Callable[[Path, str], object]] = {
    "a log": lambda folder, secret: (folder / "a.log").write_text(f"Authorization: Bearer {secret}\n"),
    "a JSON": lambda folder, secret: (folder / "a.json").write_text(f'{{"params": ["{secret}"]}}'),
    "a header": lambda folder, secret: (folder / "a.log").write_bytes(base64.b64encode(f"me:{secret}".encode())),
    "a URL": lambda folder, secret: (folder / "a.log").write_text(f"http://h/?q={secret.replace('/', '%2F')}"),
    "a column": _column,
    "a row": _row,
    "an object of git": lambda folder, secret: (folder / "a").write_bytes(zlib.compress(f"blob {secret}".encode())),
    "a compressed log": lambda folder, secret: (folder / "a.gz").write_bytes(gzip.compress(secret.encode())),
    "an archive": _zip,
    "a name": _named,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_leak_is_found_in_each_kind_of_place(tmp_path: Path, place: str) -> None:
    secret = "hf_PlantedInATest/0123456789"
    (tmp_path / "deep/below").mkdir(parents=True)
    assert leaks(tmp_path, [secret]) == []
    (tmp_path / "clean.json").write_text("{}")
    PLACES[place](tmp_path / "deep/below", secret.replace("/", "-") if place == "a name" else secret)
    wanted = secret.replace("/", "-") if place == "a name" else secret
    assert {text for _, _, text in leaks(tmp_path, [wanted])} == {wanted}


@sandboxed
def test_a_program_sees_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB)
    code = f"""
import glob, os

seen = str(dict(os.environ))
for path in glob.glob("/proc/*/environ"):
    try:
        seen += open(path).read()
    except OSError:
        pass
assert {HUB[:10]!r} + {HUB[10:]!r} not in seen, seen
assert os.environ["PATH"]
"""
    ran = list(Sandbox().run_many([Program(code, "pass", None)], 1))
    assert [one is not None and one.verdict for one in ran] == ["passed"]
