"""The commands as a person meets them: exit codes, messages, and what is left when one is interrupted."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from chat_server import chat_server
from checkout import HEAVY
from servers.completions import __file__ as stand_in
from servers.completions import save_policy
from tracked import record

from papo.cli import STAGE_HELP, main
from papo.core.advantages import VARIANTS
from papo.engines.serving import answers, free_port
from papo.engines.tracking import make_tracker
from papo.params import TrackingParams
from papo.pipeline import ROUND_STAGES, STAGES
from papo.schemas import ADVANTAGES, ORM, ROLLOUTS, VERDICTS
from papo.store.files import digest
from papo.store.layout import Workspace
from papo.store.lock import exclusive
from papo.store.manifest import Manifest
from papo.store.tables import read_columns, read_rows, write_rows
from papo.store.verdicts import PaidCall, StoredVerdict, VerdictStore, default_store


def tree(folder: Path) -> dict[str, str]:
    """Path -> digest of every result in a folder; what is under .papo is none."""
    return {
        str(path.relative_to(folder)): digest(path)
        for path in folder.rglob("*")
        if path.is_file() and ".papo" not in path.parts
    }


BAD = {
    "unknown key": (["prepare", "--set", "advantage.lamb=2"], "did you mean advantage.lam?"),
    "misspelt override": (["prepare", "--set", "advantage.lam"], "not of the form key=value"),
    "G = 1": (
        ["prepare", "--set", "rollout.group_size=1"],
        "rollout.group_size: input should be greater than or equal to 2",
    ),
    "lam < 0": (["prepare", "--set", "advantage.lam=-1"], "advantage.lam: input should be greater than or equal to 0"),
    "temperature 0": (["prepare", "--set", "rollout.temperature=0"], "temperature 0 with group_size 8"),
    "two at once": (["prepare", "--set", "run.rounds=0", "--set", "run.sed=1"], "did you mean run.seed?"),
    "unknown preset": (["prepare", "--preset", "nope"], "there is no preset 'nope'"),
    "round missing": (["rollout"], "rollout needs --round"),
    "round too large": (["rollout", "--round", "1"], "there is no round 1: run.rounds is 1"),
    "round below 0": (["train", "--round", "-1"], "there is no round -1"),
    "round where there is none": (["prepare", "--round", "0"], "prepare takes no --round"),
    "prepare has not run": (["warmstart"], "run `papo prepare` first"),
    "warmstart has not run": (["evaluate"], "run `papo warmstart` first"),
    "rollout has not run": (["score-orm", "--round", "0"], "run `papo rollout --round 0` first"),
    "dvc.yaml is old": (["dvc", "--check"], "dvc.yaml is not what params.yaml asks for"),
    "workspace is a file": (["prepare", "--workspace", "params.yaml"], "where: params.yaml"),
    "no git": (["run"], "not a git checkout"),
    "unknown variant": (["advantage", "--round", "0", "--variant", "ppo"], "unknown variant 'ppo'"),
    "all variants at once": (["advantage", "--round", "0", "--variant", "all"], "all needs --compare"),
    "unknown variant to compare": (["advantage", "--variant", "ppo", "--compare"], "choose one of orm, prm, mult"),
    "nothing to compare": (["advantage", "--compare"], "no round has advantages yet"),
    "nothing to explain": (["explain", "abcd"], "no round has advantages yet"),
    "no verdicts to count": (["judge-cache", "stats"], "there are no verdicts yet"),
    "no verdicts to verify": (["judge-cache", "verify"], "there are no verdicts yet"),
    "no verdicts to export": (["judge-cache", "export", "out.jsonl"], "there are no verdicts yet"),
    "export to nowhere": (["judge-cache", "export"], "export needs the file to write"),
    "a file for nothing": (["judge-cache", "stats", "out.jsonl"], "stats takes no file"),
    "no such policy to serve": (["serve-policy", "round-x"], "there is no policy 'round-x'"),
    "a file to serve": (["serve-policy", "params.yaml"], "name warmstart, final, last-good, round-<k> or a folder"),
    "a policy to serve that has not been made": (["serve-policy", "round-0"], "run `papo train --round 0` first"),
    "no warm start to serve": (["serve-policy"], "run `papo warmstart` first"),
    "a folder to serve that is no policy": (["serve-policy", "."], "config.json is missing"),
    "a server for everybody": (["serve-policy", ".", "--host", "0.0.0.0"], "others could reach the server"),
    "a server for everybody by its options": (
        ["serve-policy", "--set", "rollout.server.options.host=0.0.0.0"],
        "papo's own servers are for this machine alone",
    ),
    "a status of elsewhere": (["track", "status", "--to", "sqlite:///other.db"], "only sync delivers to somewhere"),
    "nothing to deliver from": (["track", "sync", "--workspace", "runs/none"], "name a workspace with --workspace"),
    "no store of verdicts": (["judge-cache", "stats", "--store", "params.yaml"], "ends in .sqlite"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_wrong_input_ends_with_2_and_says_what_where_and_what_to_do(
    checkout: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = tree(checkout)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("papo: ")
    assert message in shown
    assert "  where: " in shown
    assert "  to do: " in shown
    assert "Traceback" not in shown
    assert tree(checkout) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rolout"],
        ["rollout", "--round", "first"],
        ["run", "--no-dvcs"],
        ["prepare", "--se", "a=1"],
        ["serve-policy", "--port", "0"],
        ["serve-policy", "--port", "70000"],
        ["serve-policy", "--port", "http"],
    ],
)
def test_a_command_line_that_is_none_ends_with_2(
    checkout: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: papo" in capsys.readouterr().err


def test_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["params"]) == 2
    assert "there is no such params file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert tuple(name.replace("-", "_") for name in STAGE_HELP) == STAGES
    for stage in STAGES:
        assert re.search(rf"^    {stage.replace('_', '-')}\s", shown, re.MULTILINE)
    for stage in ROUND_STAGES:
        assert "needs --round" in STAGE_HELP[stage.replace("_", "-")]


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys, papo.cli\n"
        "try: papo.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "papo" in done.stderr.split()
    assert (HEAVY | {"numpy", "pyarrow", "pydantic"}) & set(done.stderr.split()) == set()


def test_params_prints_what_is_in_force(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--set", "advantage.lam=0.25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "advantage.lam = 0.25" in lines
    assert "warmstart.steps = 2" in lines
    assert "prepare.sums.eval.sums-hard.problems = 4" in lines
    assert len(lines) == len({line.split(" = ")[0] for line in lines})


def test_dvc_writes_what_check_asks_for(checkout: Path) -> None:
    assert main(["dvc"]) == 0
    assert main(["dvc", "--check"]) == 0
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["run"]["rounds"] = 2
    Path("params.yaml").write_text(yaml.safe_dump(params))
    before = Path("dvc.yaml").read_text()
    assert main(["dvc", "--check"]) == 2
    assert Path("dvc.yaml").read_text() == before
    assert main(["dvc"]) == 0
    assert Path("dvc.yaml").read_text() != before


def test_a_stage_says_when_it_had_been_done_before(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare"]) == 0
    assert "prepare: done in" in capsys.readouterr().err
    before = tree(checkout)
    assert main(["prepare"]) == 0
    assert "prepare: had been done before" in capsys.readouterr().err
    assert tree(checkout) == before


def test_a_preset_lies_over_the_params(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("advantage: {lam: 0.125}\n")
    assert main(["params", "--preset", "mine.yaml"]) == 0
    assert "advantage.lam = 0.125" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["prepare"], ["run", "--no-dvc"]])
def test_a_workspace_that_is_in_use(checkout: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with exclusive(Workspace(Path())):
        assert main(command) == 2
    assert "another run is going on in this workspace (process " in capsys.readouterr().err
    assert not (checkout / "data").exists()


def test_another_workspace_is_another_run(checkout: Path) -> None:
    with exclusive(Workspace(Path())):
        assert main(["prepare", "--workspace", "runs/other"]) == 0
    assert (checkout / "runs/other/data/problems/train.parquet").exists()
    assert not (checkout / "data").exists()


def test_too_many_failed_rows_end_with_1(started_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The step judge reads sums only: every response to a problem worded otherwise is unparsable.
    Path("words.jsonl").write_text("".join(f'{{"prompt": "{n} and {n}", "answer": "{2 * n}"}}\n' for n in range(4)))
    source = [
        "prepare.source=words.jsonl",
        "prepare.holdout=1",
        "evaluate.benchmarks=[holdout]",
        "advantage.variant=prm",
    ]
    given = [item for value in source for item in ("--set", value)]
    assert main(["prepare", *given]) == 0
    for command in ("rollout", "score-orm"):
        assert main([command, "--round", "0", *given]) == 0
    capsys.readouterr()
    assert main(["score-prm", "--round", "0", *given]) == 1
    shown = capsys.readouterr().err
    assert "16 of 16 rows failed: 16 unparsable" in shown
    assert "score_prm.max_failed_share" in shown


@pytest.mark.parametrize("checkpoint", ["/nope", "params.yaml", "data"])
def test_a_checkpoint_that_is_none(started_checkout: Path, capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    before = tree(started_checkout)
    assert main(["warmstart", "--set", f"warmstart.checkpoint={checkpoint}"]) == 2
    shown = capsys.readouterr().err
    assert checkpoint in shown
    assert "to do: " in shown
    assert tree(started_checkout) == before


@pytest.mark.parametrize(
    ("table", "reader", "maker"),
    [
        ("data/problems/train.parquet", ["rollout", "--round", "0"], ["prepare"]),
        ("data/problems/traces.parquet", ["warmstart"], ["prepare"]),
        ("artifacts/rounds/0/rollouts.parquet", ["score-orm", "--round", "0"], ["rollout", "--round", "0"]),
    ],
)
def test_a_truncated_table_is_named_and_made_again(
    started_checkout: Path, capsys: pytest.CaptureFixture[str], table: str, reader: list[str], maker: list[str]
) -> None:
    path = started_checkout / table
    before = tree(started_checkout)
    path.write_bytes(path.read_bytes()[:-30])
    assert main(reader) == 2
    shown = capsys.readouterr().err
    assert "not a whole Parquet file" in shown
    assert f"where: {table}" in shown
    assert main(maker) == 0
    assert "changed after" in capsys.readouterr().err
    assert tree(started_checkout)[table] == before[table]
    assert main(reader) == 0


@pytest.fixture
def scored_checkout(started_checkout: Path) -> Path:
    for command in ("score-orm", "score-prm", "advantage"):
        assert main([command, "--round", "0"]) == 0
    return started_checkout


def test_compare_shows_every_variant_and_writes_nothing(
    scored_checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(scored_checkout)
    assert main(["advantage", "--round", "0", "--compare"]) == 0
    shown = capsys.readouterr().out
    for variant in VARIANTS:
        assert re.search(rf"│ +0 │ papo +│ {variant} +│ +16 │", shown), variant
    assert "computed with lam=1 " in shown
    assert main(["advantage", "--variant", "mult", "--compare", "--set", "advantage.lam=0.5"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"│ +0 │ papo lam=1 +│ mult +│", shown)
    assert "fullnorm" not in shown
    assert tree(scored_checkout) == before
    assert main(["advantage", "--variant", "convex", "--compare", "--set", "advantage.lam=2"]) == 2
    assert "convex needs 0 <= lam <= 1" in capsys.readouterr().err


def test_variant_is_short_for_set(scored_checkout: Path) -> None:
    assert main(["advantage", "--round", "0", "--variant", "mult"]) == 0
    short = tree(scored_checkout)["artifacts/rounds/0/advantages.parquet"]
    manifest = Manifest.read(Workspace(Path()).table(0, "advantages"))
    assert manifest.params["variant"] == "mult"
    assert main(["advantage", "--round", "0"]) == 0
    assert main(["advantage", "--round", "0", "--set", "advantage.variant=mult"]) == 0
    assert tree(scored_checkout)["artifacts/rounds/0/advantages.parquet"] == short


def test_explain_shows_scores_reasons_and_texts(scored_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollouts = read_columns(Workspace(Path()).table(0, "rollouts"), ROLLOUTS, "problem_id", "prompt", "completion")
    problem, prompt = rollouts[0]["problem_id"], rollouts[0]["prompt"]
    assert main(["explain", problem[:8]]) == 0
    shown = capsys.readouterr().out
    assert f"Problem {problem}, round 0" in shown
    assert prompt.strip() in shown
    assert "variant=papo lam=1 scale=std eps=1e-06 guard=none" in shown
    assert "8 responses: " in shown
    assert not re.search(r"\.\.\.  |…", shown)  # wide enough for every cell
    assert "Response 0" not in shown
    assert main(["explain", problem, "--round", "0", "--text"]) == 0
    with_text = capsys.readouterr().out
    assert with_text.startswith(shown)
    assert with_text.count("\nResponse ") == 8
    assert main(["explain", "ffff", "--round", "0"]) == 2
    assert "no problem of round 0 begins with ffff" in capsys.readouterr().err


def test_a_second_opinion_is_asked_recorded_and_shown(
    started_checkout: Path, capsys: pytest.CaptureFixture[str], keyless: None
) -> None:
    rollouts = Workspace(Path()).table(0, "rollouts")
    rows = read_rows(rollouts, ROLLOUTS)
    write_rows(rollouts, ROLLOUTS, [rows[0] | {"completion": "\\boxed{1234}"}, *rows[1:]])
    with chat_server(lambda asked: "equivalent" if asked.answer == "1234" else "different") as server:
        setting = f"score_orm.second_opinion={{model: m, base_url: '{server.url}'}}"
        assert main(["score-orm", "--round", "0", "--set", setting]) == 0
    assert "1234" in [asked.answer for asked in server.asked]
    orm = read_columns(Workspace(Path()).table(0, "orm"), ORM, "orm_score", "second_opinion")
    assert orm[0] == {"orm_score": 0.0, "second_opinion": 1.0}
    assert main(["score-prm", "--round", "0"]) == main(["advantage", "--round", "0"]) == 0
    capsys.readouterr()
    assert main(["explain", rows[0]["problem_id"], "--round", "0"]) == 0
    line = "the model calls 1234 equivalent to the gold answer; the outcome stays the verifier's: wrong"
    assert f"Second opinion\n   {rows[0]['sample_index']}  {line}\nWhat" in capsys.readouterr().out


def test_a_second_opinion_without_a_key_is_refused(
    started_checkout: Path, capsys: pytest.CaptureFixture[str], keyless: None
) -> None:
    assert main(["score-orm", "--round", "0", "--set", "score_orm.second_opinion.model=m"]) == 2
    assert "the environment variable OPENAI_API_KEY holds no key" in capsys.readouterr().err
    assert not Workspace(Path()).table(0, "orm").exists()


# Served: a real process, a stand-in for vLLM.


@pytest.fixture
def served_checkout(checkout: Path, keyless: None) -> Path:
    """With a warm start that the stand-in can serve."""
    save_policy(checkout / "artifacts/warmstart", 0)
    return checkout


SERVER = ["--set", f"rollout.server.command={sys.executable} {stand_in} serve"]


def says_it_answers(process: subprocess.Popen[str]) -> str:
    """What it said until then."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if " answers: " in line:
            return said
    raise AssertionError(said)


def test_a_policy_is_served_beside_a_run_until_ctrl_c(
    served_checkout: Path, start_papo: Callable[..., subprocess.Popen[str]]
) -> None:
    before, port = tree(served_checkout), free_port()
    with exclusive(Workspace(Path())):
        process = start_papo("serve-policy", "--port", str(port), *SERVER, cwd=served_checkout)
        url = f"http://127.0.0.1:{port}/v1"
        said = says_it_answers(process)
        assert f'artifacts/warmstart answers: base_urls: ["{url}"], model: policy' in said
        assert answers(url)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) == 2  # the watchdog and the server
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "ending the server" in errors
    assert "Traceback" not in errors
    assert not answers(url)
    assert psutil.wait_procs(below, timeout=0)[1] == []
    assert tree(served_checkout) == before


def test_a_policy_in_any_folder_is_served_and_a_kill_leaves_no_server(
    served_checkout: Path, start_papo: Callable[..., subprocess.Popen[str]]
) -> None:
    shutil.move("artifacts/warmstart", "mine")
    port = free_port()
    process = start_papo("serve-policy", "mine", "--port", str(port), *SERVER, cwd=served_checkout)
    says_it_answers(process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(below, timeout=30)[1] == []


def test_what_cannot_serve_a_policy_ends_with_2(served_checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-policy", "--set", "rollout.server.command=no-such-vllm serve"]) == 2
    assert "pip install vllm" in capsys.readouterr().err
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve-policy", "--port", str(port), *SERVER]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err


def test_a_server_that_ends_by_itself_ends_with_1(
    served_checkout: Path, start_papo: Callable[..., subprocess.Popen[str]]
) -> None:
    port = free_port()
    process = start_papo("serve-policy", "--port", str(port), *SERVER, cwd=served_checkout)
    says_it_answers(process)
    psutil.Process(process.pid).children()[0].children()[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the server ended by itself, with" in errors
    assert f"where: .papo/servers/port-{port}.log" in errors


# Interrupted: a real process, a real SIGINT, the real engines.


def has_shards(folder: Path) -> Callable[[], bool]:
    return lambda: any(folder.rglob("*.parquet"))


def has_folders(folder: Path) -> Callable[[], bool]:
    return lambda: any(path.is_dir() for path in folder.iterdir())


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG = {
    "warmstart": (
        ["warmstart", "--set", "warmstart={steps: 60, batch_size: 4, microbatch: 4}"],
        "artifacts/warmstart",
    ),
    "rollout": (["rollout", "--round", "0"], "artifacts/rounds/0/rollouts.parquet"),
    "train": (["train", "--round", "0"], "artifacts/rounds/0/policy"),
    "evaluate": (["evaluate"], "artifacts/evaluation/metrics.json"),
}


@pytest.fixture
def long_checkout(started_checkout: Path) -> Path:
    """Many small shards and steps, so that there is a half-way."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["prepare"]["sums"]["train"]["problems"] = 24
    for tier in params["prepare"]["sums"]["eval"].values():
        tier["problems"] = 8
    params["rollout"] |= {"prompts_per_round": 24, "prompts_per_shard": 1}
    params["train"] |= {"minibatch_prompts": 1, "save_minutes": 0.0}
    params["evaluate"] |= {"problems_per_shard": 1}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    shutil.rmtree("artifacts/rounds")
    return started_checkout


@pytest.mark.parametrize("stage", LONG)
def test_ctrl_c_leaves_nothing_half_and_the_same_command_goes_on(
    long_checkout: Path, tmp_path: Path, start_papo: Callable[..., subprocess.Popen[str]], stage: str
) -> None:
    command, output = LONG[stage]
    assert main(["prepare"]) == 0
    if stage == "train":
        whole = ["--set", "rollout.prompts_per_shard=24"]
        assert main(["rollout", "--round", "0", *whole]) == 0
        for name in ("score-orm", "score-prm", "advantage"):
            assert main([name, "--round", "0"]) == 0
    if stage == "evaluate":
        shutil.copytree("artifacts/warmstart", "artifacts/rounds/0/policy")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = tree(long_checkout)

    process = start_papo(*command, cwd=long_checkout, TMPDIR=str(scratch))
    shards = long_checkout / ".papo" / "work"
    if stage in ("rollout", "evaluate"):
        wait_until(has_shards(shards), process)
    elif stage == "train":
        wait_until(lambda: any(shards.glob("train-0-*/step-*")), process)
    else:
        wait_until(has_folders(scratch), process)
        # Into the training: what is compiled before it has many objects with a `__del__`, in which Python ignores an interrupt.
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "papo: interrupted" in errors
    assert "Traceback" not in errors
    assert tree(long_checkout) == before
    kept = len(list(shards.rglob("*.parquet"))) if shards.exists() else 0
    assert (kept > 0) == (stage in ("rollout", "evaluate"))

    assert main(command) == 0
    made = tree(long_checkout)
    assert any(name.startswith(output) for name in set(made) - set(before)) or stage == "warmstart"
    assert not any(name.endswith(".tmp") for name in made)
    assert main(command) == 0
    assert tree(long_checkout) == made
    if stage == "rollout":
        shutil.rmtree("artifacts/rounds")
        assert main(command) == 0
        assert tree(long_checkout)[output] == made[output]


def test_a_signal_that_kills_leaves_a_workspace_that_goes_on(
    started_checkout: Path, start_papo: Callable[..., subprocess.Popen[str]]
) -> None:
    lock = started_checkout / ".papo" / "lock.json"
    shutil.rmtree("artifacts/warmstart")
    process = start_papo("warmstart", cwd=started_checkout)
    wait_until(lock.exists, process)
    process.kill()
    process.communicate()
    assert main(["warmstart"]) == 0
    assert not lock.exists()


def test_what_waits_for_mlflow_is_shown_and_delivered(
    checkout: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["track", "status", "--all"]) == 0
    assert capsys.readouterr().out == "nothing waits\n"
    for name in ("here", "there"):
        outbox = Path("runs") / name / ".papo/outbox"
        params = TrackingParams(uri="http://me:secret@127.0.0.1:9")
        tracker = make_tracker(params, outbox=outbox, warn=lambda message: None)
        for _ in record(tracker, rounds=1, lineage=name):
            pass
        assert b"secret" not in b"".join(path.read_bytes() for path in outbox.rglob("*") if path.is_file())
    assert main(["track", "status", "--all"]) == 0
    shown = capsys.readouterr().out
    assert "runs/here: a run (FINISHED): 9 records wait for http://***@127.0.0.1:9, experiment papo; 0.0 MB" in shown
    assert "18 records of 2 runs wait; `papo track sync` delivers them" in shown

    assert main(["track", "sync", "--workspace", "runs/here"]) == 1
    shown = capsys.readouterr().out
    assert "0 records delivered to http://***@127.0.0.1:9, 9 wait: the user and the password" in shown
    assert "set MLFLOW_TRACKING_URI to the whole address" in shown
    assert main(["track", "sync", "--all", "--to", f"sqlite:///{checkout}/other.db"]) == 0
    shown = capsys.readouterr().out
    assert "runs/here: a run: 9 records delivered to sqlite:///" in shown
    assert "runs/there: a run: 9 records delivered to sqlite:///" in shown
    assert main(["track", "sync", "--all"]) == 0
    assert capsys.readouterr().out == "nothing waits\n"
    assert "secret" not in caplog.text


def test_stored_verdicts_are_counted_copied_and_verified(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with VerdictStore.open(default_store(Workspace(Path()))) as store:
        for number in range(3):
            store.put(StoredVerdict(f"{number:064x}", "judge-7b", "levels/1", "1.0", "stop", 1000, 50, 2.0, 1.7e9))
    assert main(["judge-cache", "stats"]) == 0
    shown = capsys.readouterr().out
    assert "Paid calls" not in shown
    assert re.search(r"judge-7b .* levels/1 .* 3 .* 3,000 .* 150 .* 2.00 .* 2023-11-1\d", shown)
    assert "3 verdicts, 0 being asked for" in shown
    with VerdictStore.open(default_store(Workspace(Path()))) as store:
        for run, cost in (("a" * 30 + "0123456789" + "[/b]", 1234.5), ("nightly", None)):
            call = ("papo", "f" * 64, "judge-7b", "levels/1", "unparsable", 2, 1800, 100, cost, 2.0)
            store.charge(PaidCall(run, 0, *call))
    assert main(["judge-cache", "stats"]) == 0
    shown = capsys.readouterr().out
    first, second = re.findall(r"^.* papo .*$", shown.partition("Paid calls by run")[2], re.MULTILINE)
    assert re.search(r" aaaaaaaaaaaa…456789\[/b\] .* papo .* 1 .* 1 .* 1,800 .* 100 .* 1,234 ", first)
    assert re.search(r" nightly .* papo .* 1 .* 1 .* 1,800 .* 100 \W+$", second)
    assert main(["judge-cache", "export", "out.parquet", "--workspace", "runs/other"]) == 0
    assert len(read_rows(Path("out.parquet"), VERDICTS)) == 3
    assert main(["judge-cache", "verify"]) == 0
    assert "3 verdicts, 0 keys computed anew, 2 paid calls, all is whole" in capsys.readouterr().out

    path = default_store(Workspace(Path()))
    path.write_bytes(path.read_bytes().replace(b"judge-7b", b"judge-9b", 1))
    assert main(["judge-cache", "verify", "--store", str(path)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^row \d, verdict 0{12}: its digest is not that of its content$", shown, re.MULTILINE)
    assert "3 verdicts, 0 keys computed anew, 2 paid calls, damages: 1" in shown
    path.write_text("no database")
    assert main(["judge-cache", "verify"]) == 1
    assert main(["judge-cache", "stats"]) == 2


PAPER = str(Path(__file__).parents[1] / "infra/presets/paper-qwen2.5-7b.yaml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--preset", PAPER], ["a GPU that torch can use", "train.devices.device = cuda", "the package flash-attn"]),
        (["--set", "train.devices.device=cuda"], ["a GPU that torch can use", "where: train.devices.device = cuda"]),
        (["--set", "train.attention=flash"], ["there is no attention 'flash'", "where: train.attention", "sdpa"]),
    ],
)  # fmt: skip
def test_training_that_this_machine_cannot_do_is_refused_before_anything_is_made(
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    said: list[str],
) -> None:
    monkeypatch.setattr("papo.engines.training.checks._gpu", lambda: False)
    assert main(["run", "--no-dvc", *options, "--set", "tracking.enabled=false"]) == 2
    error = capsys.readouterr().err
    assert error.count("papo: ") == 1
    for text in said:
        assert text in error
    assert tree(checkout) == {"params.yaml": digest(checkout / "params.yaml")}


def test_train_alone_says_what_the_machine_lacks(
    started_checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("papo.engines.training.checks._gpu", lambda: False)
    for stage in ("score-orm", "score-prm", "advantage"):
        assert main([stage, "--round", "0"]) == 0
    before = tree(started_checkout)
    assert main(["train", "--round", "0", "--set", "train.devices.device=cuda"]) == 2
    assert "where: train.devices.device = cuda" in capsys.readouterr().err
    assert tree(started_checkout) == before


def test_the_last_good_policy_of_a_stage_that_stopped_can_be_evaluated(
    started_checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("score-orm", "score-prm", "advantage"):
        assert main([stage, "--round", "0"]) == 0
    here = Workspace(started_checkout)
    rollouts, advantages = (
        read_rows(here.table(0, "rollouts"), ROLLOUTS),
        read_rows(here.table(0, "advantages"), ADVANTAGES),
    )
    rollouts[0]["logprobs"] = [-300.0] * len(rollouts[0]["logprobs"])
    advantages[0] |= {"advantage": -1.0, "token_advantages": None}
    write_rows(here.table(0, "rollouts"), ROLLOUTS, rollouts)
    write_rows(here.table(0, "advantages"), ADVANTAGES, advantages)
    one = ["--set", "train.minibatch_prompts=1", "--set", "train.max_broken_steps=1"]
    assert main(["train", "--round", "0", *one]) == 1
    error = capsys.readouterr().err
    name = f"{rollouts[0]['problem_id']}/{rollouts[0]['sample_index']}"
    assert f"papo: loss or gradient are not finite in 1 of 2 steps: step 1 by {name}" in error
    assert not here.policy(0).exists()
    (good,) = here.work.glob("work/train-0-*/last_good")
    assert main(["evaluate", "--policy", str(good), "--benchmark", "sums-in-range", "--k", "1"]) == 0
    assert (here.comparisons / "last_good/metrics.json").is_file()
