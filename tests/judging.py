"""A round whose process is judged by a model: its tables, the stage on them, and its command.

The judge is tests/servers/chat.py with `servers.replies:strict`, which goes by the words of a response and by no seed, as a model at
temperature 0 does: a response that is asked about twice has the same score twice.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sampling import SAMPLING
from servers.chat import USAGE_FAULTS, ChatProcess, Plan, State, content_of

from papo.engines.judges import make_judge
from papo.engines.judges.model import Purpose
from papo.params import ScorePrmParams, Variant
from papo.schemas import ORM, PRM, PROBLEMS, ROLLOUTS, problem_id, row_seed
from papo.stages import score_prm
from papo.store.layout import Workspace
from papo.store.manifest import Context, Manifest
from papo.store.tables import read_rows, write_rows

CONCURRENCY = 16
REPLY = "servers.replies:strict"
SCORES = {"good": 1.0, "short": 0.5, "bad": 0.0}
"""What the judge makes of a response with this word."""

# One line a group: outcomes of its eight responses, 1 correct, 0 wrong, ? without a verdict.
GROUPS = ("11111111", "11111111", "11111110", "11111000", "11100000", "11?10010", "10000000", "00000000")


def write_round(workspace: Workspace, groups: Sequence[str] = GROUPS, *, seed: int = 0) -> None:
    """Problems, rollouts and outcomes of round 0. The last two responses of the first group are the same text."""
    chance = random.Random(seed)
    problems: list[dict[str, Any]] = []
    rollouts: list[dict[str, Any]] = []
    orm: list[dict[str, Any]] = []
    for number, outcomes in enumerate(groups):
        left, right = 10 * number + 21, 7 * number + 6
        prompt, answer = f"What is {left} + {right}?\n", str(left + right)
        name = problem_id(prompt, answer)
        solution = f"{left} + {right} = {answer}"
        problems.append({"problem_id": name, "prompt": prompt, "answer": answer, "grading": "{}", "source": "test",
                         "reference_solution": solution, "split": "train"})  # fmt: skip
        texts = [
            _response(f"{number}.{index}", solution, chance.choice(list(SCORES))) for index in range(len(outcomes))
        ]
        if not number:
            texts[-1] = texts[-2]
        for index, (text, outcome) in enumerate(zip(texts, outcomes, strict=True)):
            key = {"round": 0, "problem_id": name, "sample_index": index}
            rollouts.append(key | {
                "prompt": prompt, "completion": text, "completion_ids": [5, 6], "logprobs": [-0.1, -0.2], "finish_reason": "stop",
                "policy_digest": "0", **SAMPLING, "prompt_ids": [1], "seed": row_seed(0, 0, name, index),
            })  # fmt: skip
            score = None if outcome == "?" else float(outcome)
            status = "timeout" if score is None else "ok"
            orm.append(key | {"orm_score": score, "status": status, "second_opinion_status": "not_asked"})
    for path, table, rows in (
        (workspace.train_problems, PROBLEMS, problems),
        (workspace.table(0, "rollouts"), ROLLOUTS, rollouts),
        (workspace.table(0, "orm"), ORM, orm),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, table, rows)


def _response(name: str, solution: str, word: str) -> str:
    return f"Attempt {name}\nThe sum is asked for.\nThis step is {word}: {solution}\n\\boxed{{{solution.split()[-1]}}}"


def attempt(text: str) -> str:
    """Which response a text, or the prompt about it, is; identical ones are one."""
    found = re.search(r"Attempt (\d+\.\d+)", text)
    assert found is not None
    return found[1]


def attempt_of(body: dict[str, Any]) -> str:
    """Which response a request to the server is about."""
    return attempt(str(body["messages"][1]["content"]))


def judging(server: ChatProcess | str, **change: Any) -> dict[str, Any]:
    """The params of the stage; those of the model are changed by `model`."""
    url = server if isinstance(server, str) else server.url
    model = {
        "model": "m",
        "base_url": url,
        "timeout_s": 60.0,
        "tries": 3,
        "breaker": 100_000,
        "concurrency": CONCURRENCY,
    }
    model |= change.pop("model", {})
    return {
        "judge": "model",
        "rubric": "levels",
        "max_failed_share": 1.0,
        "prices": {"m": {"prompt": 1.0, "completion": 2.0}},
        "model": model,
        **change,
    }


def run_stage(
    workspace: Workspace,
    params: dict[str, Any],
    *,
    variant: Variant = "prm",
    out: str = "prm",
    run: str = "run",
    context: Context | None = None,
) -> Manifest:
    """The stage on the tables of `write_round`; its own table is `out`."""
    chosen = ScorePrmParams.model_validate(params)
    context = context or Context(work=workspace.work)
    engine = make_judge(chosen, Purpose(store_of(workspace), run, 0, variant, warn=context.warn))
    inputs = score_prm.Inputs(
        round=0,
        variant=variant,
        rollouts=workspace.table(0, "rollouts"),
        orm=workspace.table(0, "orm"),
        problems=workspace.train_problems,
        rubric=engine.digest,
    )
    return score_prm.run(chosen, inputs, workspace.table(0, out), engine=engine, context=context)


def store_of(workspace: Workspace) -> Path:
    return workspace.work / "verdicts.sqlite"


def paid_tries(store: Path) -> int:
    """What the ledger says was billed."""
    with closing(sqlite3.connect(store)) as connection:
        return int(connection.execute("SELECT coalesce(sum(tries), 0) FROM paid_calls").fetchone()[0])


def prm_rows(workspace: Workspace, out: str = "prm") -> list[dict[str, Any]]:
    return read_rows(workspace.table(0, out), PRM)


def attempts(workspace: Workspace) -> list[str]:
    """Which response each row is."""
    return [attempt(row["completion"]) for row in read_rows(workspace.table(0, "rollouts"), ROLLOUTS)]


def delivered(server: ChatProcess) -> Counter[str]:
    """How often the server sent a whole verdict about each response, by its own plan."""
    state, found = State(Plan()), Counter[str]()
    state.plan = server.plan
    for asked in server.asked:
        body, content = asked["body"], content_of(asked["body"])
        state.seen.requests[content] += 1
        if state.fault(body, content) in ("none", *USAGE_FAULTS):
            found[attempt_of(body)] += 1
    return found


# ---- commands ----

IMPORTS = """
import aiohttp, httpx2, openai, tenacity
from openai import AsyncOpenAI, DefaultAioHttpClient
import papo.engines.chat, papo.engines.judges.model
"""
"""What `papo score-prm` needs, for tests/forks.py."""


def score_prm_command(workspace: Workspace, params: dict[str, Any], *, variant: Variant = "prm") -> list[str]:
    """`papo score-prm --round 0` with these params."""
    settings = [
        f"advantage.variant={variant}",
        *(f"score_prm.{key}={json.dumps(value)}" for key, value in params.items()),
    ]
    sets = [text for setting in settings for text in ("--set", setting)]
    return ["score-prm", "--round", "0", "--workspace", str(workspace.root), *sets]
