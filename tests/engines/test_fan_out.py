"""Scoring in chunks elsewhere: the scores, versions and errors are those of the verifier and the judge themselves."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest

from papo.engines.fan_out import SpreadJudge, SpreadVerifier
from papo.engines.judges import make_judge
from papo.engines.protocols import JudgeItem, Progress, Verdict, VerifyItem
from papo.engines.verifiers import make_verifier
from papo.errors import PapoError, SetupError, StageError
from papo.params import Params, ScoreOrmParams, ScorePrmParams, load_params
from papo.pipeline import CODE, _judge, _verifier, lineage
from papo.schemas import Grading
from papo.store.layout import Workspace
from papo.store.manifest import Context

P = TypeVar("P")
R = TypeVar("R")


class Pickled:
    """A spread whose work, pieces and results are pickled on their way, as they are between machines."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.sizes: list[int] = []
        self.cpus: set[int] = set()

    def map(self, name: str, work: Callable[[P], R], pieces: Sequence[P], *, cpus: int) -> Iterator[R]:
        self.cpus.add(cpus)
        for piece in pieces:
            self.sizes.append(len(piece))  # type: ignore[arg-type]  # a piece is a sequence
            there, given = pickle.loads(pickle.dumps((work, piece)))
            yield pickle.loads(pickle.dumps(there(given)))


class Flawed:
    """Its version is the gold answer of the first item; it lacks what it takes to verify the answer `none`."""

    def __init__(self, error: type[PapoError] = SetupError) -> None:
        self._error, self._version = error, "1"

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        self._version = items[0].gold
        if any(item.gold == "none" for item in items):
            raise self._error("no sandbox", where="PATH", fix="install one")
        return [Verdict(1.0, item.gold, "ok") for item in items]

    def versions(self) -> dict[str, str]:
        return {"flawed": self._version}


ITEMS = [VerifyItem(str(n % 3), f"so \\boxed{{{n % 4}}}") for n in range(23)] + [
    VerifyItem("x+1", "\\boxed{1+x}"),
    VerifyItem("7", "no answer"),
    VerifyItem("A", "\\boxed{B}", Grading(kind="choice")),
]
RESPONSES = [
    JudgeItem("3+5-2=?\n", None, text)
    for text in ("3+5=8\n8-2=6\n\\boxed{6}", "3+5=9\n9-2=7\n\\boxed{7}", "\\boxed{6}", "")
]


@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
def test_verdicts_are_those_of_the_verifier_in_order_whatever_the_chunk(chunk: int) -> None:
    make = partial(make_verifier, ScoreOrmParams())
    here, spread, done = make(), Pickled(chunk), list[int]()
    there = SpreadVerifier(make, spread, cpus=3)
    assert there.verify(ITEMS, done.append) == here.verify(ITEMS, lambda n: None)
    assert there.versions() == here.versions()
    assert sum(done) == sum(spread.sizes) == len(ITEMS)
    assert max(spread.sizes) <= chunk
    assert spread.cpus == {3}


@pytest.mark.parametrize("name", ["steps", "steps-gullible", "readability"])
def test_judgements_are_those_of_the_judge_in_order(name: str) -> None:
    make = partial(make_judge, ScorePrmParams.model_validate({"judge": name}))
    here, there = make(), SpreadJudge(make, Pickled(3))
    there.check()
    assert there.judge(RESPONSES, lambda n: None) == here.judge(RESPONSES, lambda n: None)
    assert (there.name, there.rubric, there.digest) == (here.name, here.rubric, here.digest)
    assert (there.versions(), there.metrics(5)) == (here.versions(), here.metrics(5))


def test_nothing_to_score_asks_nobody_and_has_the_versions_of_this_machine() -> None:
    make = partial(make_verifier, ScoreOrmParams())
    spread = Pickled(4)
    there = SpreadVerifier(make, spread)
    assert there.verify([], lambda n: None) == []
    assert spread.sizes == []
    assert there.versions() == make().versions()


def test_what_a_machine_lacks_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "node-7")
    there = SpreadVerifier(Flawed, Pickled(2))
    with pytest.raises(SetupError, match="no sandbox") as caught:
        there.verify([VerifyItem("none", "x")], lambda n: None)
    assert (caught.value.where, caught.value.fix) == ("PATH, on the machine node-7", "install one")


def test_another_error_is_the_one_that_was_raised() -> None:
    there = SpreadVerifier(partial(Flawed, StageError), Pickled(2))
    with pytest.raises(StageError, match="no sandbox") as caught:
        there.verify([VerifyItem("none", "x")], lambda n: None)
    assert caught.value.where == "PATH"


def test_two_versions_among_the_machines_are_refused() -> None:
    there = SpreadVerifier(Flawed, Pickled(1))
    with pytest.raises(SetupError, match="two machines that score have flawed 1 and 2"):
        there.verify([VerifyItem("1", "x"), VerifyItem("2", "x")], lambda n: None)


# ---- in the pipeline ----

RAY = "run.ray={address: 'head:6379', chunk: 5}"


def params(*overrides: str) -> Params:
    return load_params(None, overrides=list(overrides))


def test_the_pipeline_spreads_the_verifier_and_judges_that_ask_nobody(tmp_path: Any) -> None:
    spread, workspace = Context(spread=Pickled(5)), Workspace(tmp_path)
    given = {"round_": 0, "variant": "papo"}
    assert isinstance(_verifier(params("score_orm.workers=2"), spread), SpreadVerifier)
    assert isinstance(_judge(params(), workspace, spread, **given), SpreadJudge)
    model = params("score_prm.judge=model", "score_prm.model={model: m, base_url: 'http://localhost:1/v1'}")
    assert not isinstance(_judge(model, workspace, spread, **given), SpreadJudge)
    assert not isinstance(_verifier(params(), Context()), SpreadVerifier)


def test_where_scores_are_made_is_part_of_no_identity() -> None:
    assert lineage(params(RAY)) == lineage(params()) == lineage(params("run.overlap=false"))
    assert lineage(params("run.rounds=3")) != lineage(params())
    assert not any("fan_out" in path for paths in CODE.values() for path in paths)


@pytest.mark.parametrize(
    "address",
    ["auto", "local", "10.0.0.1:6379", "ray://head.example:10001", "[::1]:6379", "ray://[fe80::1]:10001"],
)
def test_an_address_of_ray_is_taken(address: str) -> None:
    ray = params(f"run.ray={{address: '{address}'}}").run.ray
    assert ray is not None
    assert (ray.address, ray.chunk) == (address, 2048)


@pytest.mark.parametrize("address", ["", "head", "http://head:6379", "ray://head", "user:secret@head:6379", "a b:1"])
def test_what_is_no_address_of_ray_is_refused(address: str) -> None:
    with pytest.raises(PapoError, match=r"run\.ray\.address"):
        params(f"run.ray={{address: '{address}'}}")


@pytest.mark.parametrize("chunk", [0, -1, 1_000_001])
def test_a_chunk_has_at_least_one_response(chunk: int) -> None:
    with pytest.raises(PapoError, match=r"run\.ray\.chunk"):
        params(f"run.ray={{chunk: {chunk}}}")
