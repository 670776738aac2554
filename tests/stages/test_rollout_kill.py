"""`papo rollout` killed in the middle of sampling, and servers killed under it: each row is there once, and is what it would have been."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from forks import Papo, papo_forks
from servers.chat import ChatProcess
from servers.completions import BOXES, completions_process, save_policy

from papo.engines.samplers.completions import fold_seed
from papo.schemas import PROBLEMS, ROLLOUTS, TRIED, problem_id, row_seed
from papo.store.layout import Workspace
from papo.store.tables import read_rows, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("keyless")]

KILLS = 10
PROMPTS, GROUP, SHARD = 60, 4, 2
ROWS = PROMPTS * GROUP
CONCURRENCY = 8
SLOW = {"policy": BOXES, "latency_s": 0.02, "token_s": 0.004}
IMPORTS = """
import aiohttp, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import papo.engines.recompute, papo.engines.samplers.transformers, papo.engines.samplers.vllm_server, papo.engines.serving
import papo.ahead, papo.engines.verifiers.math_verify
"""

Row = tuple[str, int]


@pytest.fixture(scope="module")
def papo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Papo]:
    with papo_forks(tmp_path_factory.mktemp("here"), IMPORTS) as papo:
        yield papo


@pytest.fixture(scope="module")
def server() -> Iterator[ChatProcess]:
    with completions_process(**SLOW) as server:
        yield server


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Workspace]:
    """Makes a workspace in which a first round can begin."""
    made = Workspace(tmp_path_factory.mktemp("start"))
    save_policy(made.warmstart, BOXES)
    made.train_problems.parent.mkdir(parents=True)
    write_rows(made.train_problems, PROBLEMS, [_problem(number) for number in range(PROMPTS)])

    def copy(folder: Path) -> Workspace:
        return Workspace(Path(shutil.copytree(made.root, folder)))

    return copy


def _problem(number: int) -> dict[str, Any]:
    left, right = number % 10, 1 + number // 10
    prompt, answer = f"{left}+{right}-{right}=?\n", str(left)
    return {"problem_id": problem_id(prompt, answer), "prompt": prompt, "answer": answer, "grading": "{}", "source": "test",
            "reference_solution": "", "split": "train"}  # fmt: skip


def command(workspace: Workspace, *servers: ChatProcess, **change: Any) -> list[str]:
    """`papo rollout --round 0`, from servers where there are any, else by transformers."""
    server = {
        "base_urls": [one.url for one in servers],
        "concurrency": CONCURRENCY // max(len(servers), 1),
        "timeout_s": 20.0,
        "dtype": "float32",
    }
    rollout = {
        "engine": "vllm-server" if servers else "transformers",
        "prompts_per_round": PROMPTS,
        "group_size": GROUP,
        "prompts_per_shard": SHARD,
        "max_new_tokens": 16,
        "max_prompt_tokens": 32,
        **({"server": server | change.pop("server", {})} if servers else {}),
    }
    settings = {f"rollout.{name}": value for name, value in rollout.items()} | {"train.minibatch_prompts": 4} | change
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return ["rollout", "--round", "0", "--workspace", str(workspace.root), *sets]


def tables(workspace: Workspace) -> dict[str, bytes]:
    return {name: workspace.table(0, name).read_bytes() for name in ("rollouts", "tried")}


def rows_in(path: Path) -> Counter[Row]:
    return Counter((row["problem_id"], row["sample_index"]) for row in read_rows(path, ROLLOUTS))


def all_rows() -> list[Row]:
    return [(str(_problem(number)["problem_id"]), index) for number in range(PROMPTS) for index in range(GROUP)]


def each_once(workspace: Workspace) -> bool:
    return rows_in(workspace.table(0, "rollouts")) == Counter(all_rows())


def shards(workspace: Workspace) -> list[Path]:
    """Those that are stored while the stage has not finished."""
    return sorted(workspace.work.glob("work/rollout-0-*/rollouts-*.parquet"))


def stored(workspace: Workspace) -> Counter[Row]:
    return sum(map(rows_in, shards(workspace)), Counter[Row]())


def asked(*servers: ChatProcess) -> Counter[Row]:
    """How often the servers were asked for each row."""
    rows = {fold_seed(row_seed(0, 0, name, index)): (name, index) for name, index in all_rows()}
    return Counter(rows[request["body"]["seed"]] for server in servers for request in server.asked)


def requests(server: ChatProcess) -> int:
    return server.seen.requests.total()


@pytest.fixture(scope="module")
def undisturbed(
    server: ChatProcess, papo: Papo, start: Callable[[Path], Workspace], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The tables of a run that nobody kills."""
    workspace = start(tmp_path_factory.mktemp("undisturbed") / "run")
    server.set()
    papo.run(*command(workspace, server))
    assert asked(server) == Counter(all_rows())
    assert each_once(workspace)
    assert shards(workspace) == []
    return tables(workspace)


# ---- the stage is killed ----


def test_ten_stages_each_killed_once_at_a_random_moment(
    server: ChatProcess,
    papo: Papo,
    start: Callable[[Path], Workspace],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    chance = random.Random(21)
    twice = []
    for number in range(KILLS):
        workspace = start(tmp_path / str(number))
        arguments = command(workspace, server)
        server.set()
        due = chance.randrange(1, ROWS - 2 * CONCURRENCY)
        assert papo.kill_when(lambda due=due: requests(server) >= due, chance.random() * 0.05, *arguments)
        assert not workspace.table(0, "rollouts").exists()
        first, kept = asked(server), stored(workspace)
        server.set()
        papo.run(*arguments)
        again = asked(server)
        assert again == Counter(all_rows()) - kept
        twice.append((again & first).total())
        assert twice[-1] <= (first - kept).total()
        assert each_once(workspace)
        assert tables(workspace) == undisturbed
        assert shards(workspace) == []
    record_property("rows sampled twice, by kill", str(twice))


def test_one_stage_killed_ten_times_in_a_row(
    server: ChatProcess,
    papo: Papo,
    start: Callable[[Path], Workspace],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    chance = random.Random(22)
    workspace = start(tmp_path / "run")
    arguments = command(workspace, server)
    total, kept = Counter[Row](), Counter[Row]()
    for _ in range(KILLS):
        server.set()
        due = chance.randrange(1, CONCURRENCY)
        assert papo.kill_when(lambda due=due: requests(server) >= due, chance.random() * 0.05, *arguments)
        now = asked(server)
        assert not now & kept
        total, before, kept = total + now, kept, stored(workspace)
        assert before <= kept
    server.set()
    papo.run(*arguments)
    assert asked(server) == Counter(all_rows()) - kept
    total += asked(server)
    beyond = total.total() - ROWS
    record_property("rows sampled again, by 10 kills", f"{beyond}, one row {max(total.values())} times in all")
    assert each_once(workspace)
    assert tables(workspace) == undisturbed


def test_ten_stages_of_transformers_each_killed_once(
    papo: Papo,
    start: Callable[[Path], Workspace],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    chance = random.Random(23)
    whole = start(tmp_path / "undisturbed")
    settings = {"rollout.prompts_per_shard": 3, "rollout.batch_rows": 8}
    papo.run(*command(whole, **settings))
    count = PROMPTS // 3
    found = []
    for number in range(KILLS):
        workspace = start(tmp_path / str(number))
        arguments = command(workspace, **settings)
        due = chance.randrange(1, count - 3)
        assert papo.kill_when(lambda due=due, of=workspace: len(shards(of)) >= due, chance.random() * 0.05, *arguments)
        assert not workspace.table(0, "rollouts").exists()
        found.append(len(shards(workspace)))
        papo.run(*arguments)
        assert each_once(workspace)
        assert tables(workspace) == tables(whole)
    record_property(f"shards of {count} that were stored, by kill", str(found))


def test_ten_rounds_that_look_for_groups_with_an_advantage_each_killed_once(
    server: ChatProcess,
    papo: Papo,
    start: Callable[[Path], Workspace],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    chance = random.Random(24)
    settings = {
        "rollout.prompts_per_round": 8,
        "rollout.max_prompts": PROMPTS,
        "rollout.prompts_per_shard": 1,
        "advantage.variant": "orm",
    }
    whole = start(tmp_path / "undisturbed")
    server.set()
    papo.run(*command(whole, server, **settings))
    asked_whole = asked(server)
    statuses = Counter(row["status"] for row in read_rows(whole.table(0, "tried"), TRIED))
    # There is something to look for, and it is found before all is tried.
    assert statuses["kept"] == 8
    assert statuses["no_advantage"] >= 3
    assert statuses.total() < PROMPTS
    assert set(asked_whole.values()) == {1}
    record_property("prompts tried", str(statuses))
    found = []
    for number in range(KILLS):
        workspace = start(tmp_path / str(number))
        arguments = command(workspace, server, **settings)
        server.set()
        due = chance.randrange(1, asked_whole.total() - CONCURRENCY)
        assert papo.kill_when(lambda due=due: requests(server) >= due, chance.random() * 0.05, *arguments)
        kept = stored(workspace)
        found.append(kept.total())
        server.set()
        papo.run(*arguments)
        assert asked(server) == asked_whole - kept
        assert tables(workspace) == tables(whole)
    record_property(f"rows of {asked_whole.total()} that were stored, by kill", str(found))


# ---- servers are killed ----


def said(papo: Papo, before: int) -> str:
    return papo.log.read_text()[before:]


def ended(papo: Papo, pid: int, server: ChatProcess, due: int, wait_s: float, *victims: ChatProcess) -> int:
    """The exit code of the stage, under which the victims are killed so long after the server has been asked for so many rows."""
    until = time.monotonic() + 60
    while requests(server) < due:
        assert time.monotonic() < until, papo.log.read_text()
        time.sleep(0.005)
    time.sleep(wait_s)
    for victim in victims:
        victim.process.kill()
    return papo.wait(pid)


def test_one_of_two_servers_killed_at_ten_random_moments(
    papo: Papo,
    start: Callable[[Path], Workspace],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    chance = random.Random(25)
    lost = []
    for number in range(KILLS):
        workspace = start(tmp_path / str(number))
        with completions_process(**SLOW) as one, completions_process(**SLOW) as two:
            before = len(papo.log.read_text())
            pid = papo.start(*command(workspace, one, two))
            # The first one maybe before it has proven itself.
            due, wait_s = (chance.randrange(1, ROWS // 4), 0.03) if number else (0, 1.0)
            assert ended(papo, pid, one, due, chance.random() * wait_s, one) == 0, papo.log.read_text()
            # What the server that lives was asked for, and once more what was lost with the other one.
            assert set(asked(two).values()) == {1}
            lost.append(ROWS - asked(two).total())
            warnings = [line for line in said(papo, before).splitlines() if " WARNING " in line]
            assert [one.url in line for line in warnings] == [True], warnings
        assert each_once(workspace)
        assert tables(workspace) == undisturbed
    record_property("rows that the killed server had answered, by kill", str(lost))


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
def test_both_servers_killed_and_the_stage_started_again_with_others(
    papo: Papo,
    start: Callable[[Path], Workspace],
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    same: bool,
) -> None:
    chance = random.Random(26 + same)
    found = []
    for number in range(3):
        workspace = start(tmp_path / str(number))
        with completions_process(**SLOW) as one, completions_process(**SLOW) as two:
            arguments = command(workspace, one, two, server={"tries": 1})
            before = len(papo.log.read_text())
            due = chance.randrange(1, ROWS // 4)
            assert ended(papo, papo.start(*arguments), one, due, chance.random() * 0.03, one, two) == 1
            assert "papo: no server is left" in said(papo, before)
            assert one.url in said(papo, before)
            assert two.url in said(papo, before)
        assert not workspace.table(0, "rollouts").exists()
        kept = stored(workspace)
        found.append(kept.total())
        # As long as there are none, it says so and keeps what it has.
        assert papo.wait(papo.start(*arguments)) == 1
        assert stored(workspace) == kept
        ports = [int(server.url.split(":")[2].split("/")[0]) if same else 0 for server in (one, two)]
        with ExitStack() as stack:
            others = [stack.enter_context(completions_process(port, **SLOW)) for port in ports]
            papo.run(*(arguments if same else command(workspace, *others)))
            assert asked(*others) == Counter(all_rows()) - kept
        assert each_once(workspace)
        assert tables(workspace) == undisturbed
    record_property("rows that were stored, by kill", str(found))
