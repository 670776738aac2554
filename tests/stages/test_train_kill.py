"""`papo train` killed while it trains, saves and writes: it goes on from the last saved step, to what a run that nobody killed gives."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from forks import Papo, papo_forks
from train_tables import write_tables

from papo.engines.protocols import SampleRequest, TrainRow
from papo.engines.training.state import RECORD, STATE_FILE, WEIGHTS_FILE, Reached
from papo.params import ModelParams, WarmstartParams
from papo.store.files import digest, read_sealed
from papo.store.layout import Workspace
from papo.store.manifest import Manifest

pytestmark = pytest.mark.slow

KILLS = 10
STEPS, GROUP = 14, 3
MODEL = ModelParams(hidden_size=64, intermediate_size=128, layers=2, heads=2)
IMPORTS = """
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import papo.engines.training.trainer
"""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "schedule": {"schedule": {"kind": "cosine", "rounds": 3, "warmup_rounds": 0.4}},
    "kl": {
        "kl": {"coefficient": 0.05, "target": 0.01, "horizon": 10},
        "importance": "token",
        "loss": "sequence_mean",
        "entropy_bonus": 0.01,
    },
}

Start = Callable[[Path], Workspace]


@pytest.fixture(scope="module")
def papo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Papo]:
    with papo_forks(tmp_path_factory.mktemp("here"), IMPORTS) as papo:
        yield papo


def sampled(policy: Path, round_: int) -> list[list[TrainRow]]:
    """A group for each step, with advantages that have no meaning."""
    from papo.engines.samplers.transformers import TransformersSampler

    sampler = TransformersSampler(policy, temperature=1.0, top_p=1.0, max_prompt_tokens=32, max_new_tokens=24)
    chance = random.Random(round_)
    requests = [
        SampleRequest(f"{number}+{round_}=?\n", 100 * round_ + 10 * number + index)
        for number in range(STEPS)
        for index in range(GROUP)
    ]
    rows = [
        TrainRow(sample.prompt_ids, sample.completion_ids, sample.logprobs, chance.gauss(0, 1))
        for sample in sampler.sample(requests, lambda _: None)
    ]
    return [rows[at : at + GROUP] for at in range(0, len(rows), GROUP)]


def add_tables(workspace: Workspace, round_: int) -> None:
    policy = workspace.policy(round_ - 1)
    workspace.round(round_).mkdir(parents=True, exist_ok=True)
    paths = (workspace.table(round_, name) for name in ("rollouts", "advantages"))
    write_tables(*paths, policy, sampled(policy, round_), round_)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Makes a workspace in which a first round, of a policy with dropout, can be trained on."""
    from transformers import set_seed

    from papo.engines.tokenizer import build_tokenizer
    from papo.engines.warmstart import _build_model

    made = Workspace(tmp_path_factory.mktemp("start"))
    set_seed(0)
    tokenizer = build_tokenizer()
    model = _build_model(WarmstartParams(model=MODEL), tokenizer)
    model.config.attention_dropout = 0.2
    model.save_pretrained(made.warmstart)
    tokenizer.save_pretrained(made.warmstart)
    add_tables(made, 0)

    def copy(folder: Path) -> Workspace:
        return Workspace(Path(shutil.copytree(made.root, folder)))

    return copy


def command(workspace: Workspace, name: str, round_: int = 0, **change: Any) -> list[str]:
    given = {"minibatch_prompts": 1, "learning_rate": 1e-3, "save_minutes": 0, "microbatch_tokens": 64}
    settings = given | dict(SETTINGS[name]) | change
    sets = [word for key, value in settings.items() for word in ("--set", f"train.{key}={json.dumps(value)}")]
    return ["train", "--round", str(round_), "--workspace", str(workspace.root), *sets]


def results(workspace: Workspace, round_: int = 0) -> tuple[str, str]:
    return digest(workspace.policy(round_)), digest(workspace.trainer(round_))


def records(workspace: Workspace, round_: int) -> list[Path]:
    return sorted(workspace.work.glob(f"work/train-{round_}-*/step-*/{RECORD}"))


def reached(workspace: Workspace, round_: int = 0) -> list[dict[str, float]]:
    """The metrics of the steps that a restart need not do again."""
    found = records(workspace, round_)
    return Reached.model_validate(read_sealed(found[-1])).history if found else []


def steps_saved(workspace: Workspace, round_: int = 0) -> int:
    return max((int(path.parent.name.split("-")[1]) for path in records(workspace, round_)), default=0)


def half_written(workspace: Workspace) -> list[Path]:
    return list(workspace.work.glob("work/*/.step-*.tmp"))


def soon(seen: Callable[[], object]) -> Callable[[], bool]:
    """Looks without a pause, for what is there for some milliseconds only."""

    def look() -> bool:
        until = time.monotonic() + 0.05
        with suppress(FileNotFoundError):  # gone between two looks
            while time.monotonic() < until:
                if seen():
                    return True
        return False

    return look


def went_on(workspace: Workspace, before: Sequence[Mapping[str, float]], round_: int = 0) -> bool:
    """Whether the steps done before the kill are those of the first process, by its clock, and all others are there too."""
    history = Manifest.read(workspace.policy(round_)).history
    assert len(history) == STEPS
    return history[: len(before)] == list(before)


@pytest.fixture(scope="module")
def undisturbed(papo: Papo, start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Policy and optimizer state of runs that nobody kills."""
    found = {}
    for name in SETTINGS:
        workspace = start(tmp_path_factory.mktemp("undisturbed") / name)
        papo.run(*command(workspace, name))
        found[name] = results(workspace)
    assert len(set(found.values())) == len(SETTINGS)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_rounds_each_killed_once_at_a_random_moment(
    papo: Papo,
    start: Start,
    undisturbed: Mapping[str, tuple[str, str]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    name: str,
) -> None:
    chance = random.Random(f"moments of {name}")
    moments: list[tuple[str, int]] = []
    halves = 0
    for number in range(KILLS):
        workspace = start(tmp_path / str(number))
        arguments = command(workspace, name)
        kind = "writing" if number < 3 else "end" if number == 3 else "step"
        after, wait_s = chance.randrange(0, STEPS - 3), chance.random() * 0.02
        if kind == "writing":
            due = soon(lambda of=workspace, n=after: steps_saved(of) >= n and half_written(of))
            killed = papo.kill_when(due, 0.0, *arguments)
            halves += bool(half_written(workspace))
        elif kind == "end":
            due = soon(lambda of=workspace: list(of.round(0).glob(".policy.*.tmp/*")))
            killed = papo.kill_when(due, 0.0, *arguments)
        else:
            killed = papo.kill_when(lambda of=workspace, n=after: steps_saved(of) >= n, wait_s, *arguments)
        assert killed
        assert not workspace.policy(0).exists()
        before = reached(workspace)
        moments.append((kind, len(before)))
        log = len(papo.log.read_text())
        papo.run(*arguments)
        assert " WARNING " not in papo.log.read_text()[log:]
        assert went_on(workspace, before)
        assert results(workspace) == undisturbed[name]
        assert list(workspace.work.glob("work/*")) == []
        assert not [path for path in workspace.round(0).iterdir() if path.name.startswith(".")]
    assert halves > 0
    assert sum(steps > 0 for _, steps in moments) >= KILLS // 2
    record_property(f"what was killed, and steps of {STEPS} that were saved", str(moments))


def test_two_rounds_killed_ten_times_in_a_row(
    papo: Papo, start: Start, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random("in a row")
    whole, workspace = start(tmp_path / "undisturbed"), start(tmp_path / "killed")
    saved = []
    for round_ in range(2):
        papo.run(*command(whole, "kl", round_))
        arguments = command(workspace, "kl", round_)
        for _ in range(KILLS // 2):
            before = reached(workspace, round_)
            due = len(before) + chance.randrange(1, 3)
            wait_s = chance.random() * 0.02
            killed = papo.kill_when(lambda due=due, r=round_: steps_saved(workspace, r) >= due, wait_s, *arguments)
            assert killed
            assert reached(workspace, round_)[: len(before)] == before
            saved.append(steps_saved(workspace, round_))
        papo.run(*arguments)
        assert went_on(workspace, reached(workspace, round_), round_)
        assert results(workspace, round_) == results(whole, round_)
        if round_ == 0:
            # The second round starts from what the first has left, optimizer and coefficient too.
            for one in (whole, workspace):
                add_tables(one, 1)
    record_property(f"steps of {STEPS} saved, by kill", str(saved))


def cut_off(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def flipped(folder: Path, name: str) -> None:
    """One bit of the last number, which safetensors reads like any other."""
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)


def lost(folder: Path, name: str) -> None:
    (folder / name).unlink()


def emptied(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        (cut_off, WEIGHTS_FILE),
        (flipped, WEIGHTS_FILE),
        (flipped, STATE_FILE),
        (lost, STATE_FILE),
        (lost, RECORD),
        (cut_off, RECORD),
        (emptied, RECORD),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_damaged_step_is_set_aside_and_the_round_starts_anew(
    papo: Papo,
    start: Start,
    undisturbed: Mapping[str, tuple[str, str]],
    tmp_path: Path,
    damage: Callable[[Path, str], None],
    file: str,
) -> None:
    workspace = start(tmp_path / "run")
    arguments = command(workspace, "schedule")
    assert papo.kill_when(lambda: steps_saved(workspace) >= 4, 0.0, *arguments)
    before = reached(workspace)
    # The one before, where the process was killed while it removed that, would be gone on from or be damaged, too.
    *older, newest = sorted(workspace.work.glob("work/train-0-*/step-*"))
    for folder in older:
        shutil.rmtree(folder)
    damage(newest, file)
    log = len(papo.log.read_text())
    papo.run(*arguments)
    (warning,) = [line for line in papo.log.read_text()[log:].splitlines() if " WARNING " in line]
    assert "a saved step of this round is damaged" in warning
    assert "/damaged-step-" in warning
    assert not went_on(workspace, before[:1])
    assert results(workspace) == undisturbed["schedule"]
