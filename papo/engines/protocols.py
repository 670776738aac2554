"""What a stage asks of the outside world. A test hands in a small fake, a GPU machine hands in vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from papo.schemas import Grading

Progress = Callable[[int], None]
"""Called with the number of items done since the last call."""


@dataclass(frozen=True)
class SampleRequest:
    """One completion to sample; `seed` alone decides its randomness."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Sample:
    """A completion as token ids, with the log-probs (natural log, at the sampling temperature) of each id."""

    prompt_ids: list[int]
    completion_ids: list[int]
    completion: str
    logprobs: list[float]
    finish_reason: str  # stop | length


class Sampler(Protocol):
    """Samples completions from one policy; `name` is that of `rollout.engine`.

    `repeatable`: the requests of a shard give the same samples to the last bit, whatever was sampled before and beside them.
    """

    name: str
    repeatable: bool

    def check(self) -> None:
        """Raises SetupError where this machine lacks what it takes to sample."""
        ...

    def fits(self, prompt: str) -> str | None:
        """Why `sample` would refuse the prompt; None if it would not."""
        ...

    def sample(self, requests: Sequence[SampleRequest], progress: Progress) -> list[Sample]:
        """One sample a request, in order. `progress` counts finished completions."""
        ...

    def sample_shards(
        self, shards: Sequence[Sequence[SampleRequest]], progress: Progress
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Number and samples of each shard, each as it completes."""
        ...

    def metrics(self) -> dict[str, float]:
        """What is worth knowing of how the sampling went so far."""
        ...

    def versions(self) -> dict[str, str]:
        """Library name -> version, for the manifest."""
        ...

    def close(self) -> None:
        """Ends what it started; the memory that this held is free then."""
        ...


class Recomputer(Protocol):
    """Computes the log-probs of completions by the model that training goes on from."""

    def logprobs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """For each pair of a prompt and a completion, in token ids, the log-prob of each token of the completion as it is sampled."""
        ...


class Scorer(Protocol):
    """Scores whole groups while the round that they belong to is being sampled."""

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float | None, float]]:
        """Outcome (None: missing) and total advantage of each row of a table of rollouts."""
        ...


class VerifyItem(NamedTuple):
    """One completion to verify against a gold answer."""

    gold: str
    completion: str
    grading: Grading = Grading()


@dataclass(frozen=True)
class Verdict:
    """Outcome of one completion: `score` is 0.0 or 1.0, or None where `status` is a failure."""

    score: float | None
    extracted: str | None
    status: str  # schemas.ORM_STATUSES
    detail: str | None = None  # what became of a program: sandbox.VERDICTS


class Verifier(Protocol):
    """Compares the final answer of a completion with the gold answer, by the grading of its problem."""

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        """One verdict an item, in order."""
        ...

    def versions(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Question:
    """A gold answer and an answer that the verifier holds for another: does a model think so, too?"""

    problem: str
    gold: str
    answer: str
    grading: Grading = Grading()


@dataclass(frozen=True)
class Opinion:
    """What a model says: `score` is 1.0 (equivalent), 0.0 (different), or None where `status` is a failure, whose `cause` is brief."""

    score: float | None
    status: str  # schemas.OPINION_STATUSES
    cause: str = ""


class SecondOpinion(Protocol):
    """Asks a model about answers that the verifier calls wrong. Beside the outcome, so that no failure of it stops a run."""

    def check(self) -> None:
        """Raises SetupError where this machine lacks what it takes to ask."""
        ...

    def ask(self, questions: Sequence[Question], progress: Progress) -> list[Opinion]:
        """One opinion a question, in order."""
        ...

    def versions(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class JudgeItem:
    """One response to judge."""

    problem: str
    reference_solution: str | None
    response: str
    grading: Grading = Grading()


@dataclass(frozen=True)
class Judgement:
    """Process score of one response: `score` is None where `status` is not `ok`.

    `wrong_steps`: for each step of the response, as papo.core.credit.split_steps numbers them, the combined vote in [0, 1] that it is
    wrong; None where there is no critique.
    """

    score: float | None
    status: str  # schemas.PRM_STATUSES
    reason: str
    votes: list[float] = field(default_factory=list)
    wrong_steps: list[float] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached: bool = False


class Judge(Protocol):
    """Scores the reasoning of a response by a rubric; `digest` of what the code alone does not decide, "" if there is no such thing.

    `apart`: each response is judged by itself, so that a round may be handed over in parts.
    """

    name: str
    rubric: str
    digest: str
    apart: bool

    def check(self) -> None:
        """Raises SetupError where this machine lacks what it takes to judge."""
        ...

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        """One judgement an item, in order."""
        ...

    def metrics(self, not_asked: int) -> dict[str, float]:
        """What the last `judge` cost, and what it would have cost to ask about so many more responses; empty where nothing is paid."""
        ...

    def versions(self) -> dict[str, str]: ...


class Aligner(Protocol):
    """Knows where in a completion each of its tokens stands."""

    def starts(self, completion_ids: Sequence[int], completion: str) -> list[int]:
        """The character of the completion at which each token starts; its length for a token without text, such as end of text.

        Raises:
            DataError: the completion is not the text of the ids.
        """
        ...

    def versions(self) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One response with its advantage, as the trainer takes it; `problem_id` and `sample_index` are how errors name it."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    logprobs: Sequence[float]
    advantage: float
    token_advantages: Sequence[float] | None = None
    truncated: bool = False
    problem_id: str = ""
    sample_index: int = 0


@dataclass(frozen=True)
class TrainJob:
    """One pass over a round's groups, in order.

    Args:
        policy, state: where it starts from: the policy that sampled the groups, and the optimizer state that goes with it; None: none yet.
        reference: the policy that the KL penalty is about, and that adapters are laid over; None where neither is.
        out, out_state: folders for the next of both.
        work: folder for what a restart goes on from; may be deleted at any time.
    """

    round: int
    groups: Sequence[Sequence[TrainRow]]
    policy: Path
    state: Path | None
    reference: Path | None
    out: Path
    out_state: Path
    work: Path


class Trainer(Protocol):
    """Turns a table of advantages into the next policy."""

    def train(self, job: TrainJob, progress: Progress) -> list[dict[str, float]]:
        """Writes policy and optimizer state; metrics by optimizer step. `progress` counts steps."""
        ...

    def versions(self) -> dict[str, str]: ...


class WarmStarter(Protocol):
    """Makes the first policy from traces, or takes one that exists."""

    def steps(self) -> int:
        """How many times `progress` will be told of one step."""
        ...

    def fit(self, traces: Sequence[tuple[str, str]], out: Path, progress: Progress) -> list[dict[str, float]]:
        """Writes a policy in Hugging Face form to `out`; metrics by logging step."""
        ...

    def versions(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Problem:
    """One problem as a source gives it; the prepare stage adds the id."""

    prompt: str
    answer: str
    reference_solution: str | None
    source: str
    tier: str | None = None
    pass_rate: float | None = None
    grading: Grading = Grading()
    row: int | None = field(default=None, compare=False)  # number of its row in the source
    format: str = field(default="", compare=False)  # what its row was read as


@dataclass(frozen=True)
class Drop:
    """A row of a source that gives no problem, and why; `benchmark`, `match_id` and `score` where a benchmark holds it."""

    source: str
    row: int | None
    reason: str
    detail: str
    prompt: str
    benchmark: str | None = None
    match_id: str | None = None
    score: float | None = None


class Source(Protocol):
    """Where problems come from; rows that give none are said to be dropped, never left out."""

    def train(self) -> Iterator[Problem | Drop]: ...

    def benchmarks(self) -> Mapping[str, Iterator[Problem | Drop]]: ...

    def traces(self) -> Iterator[tuple[str, str]]:
        """(prompt, completion) pairs for the warm start; none for a source without traces."""
        ...


class Tracker(Protocol):
    """The record of a run; write-only, and never a reason for a run to stop."""

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None: ...

    def stage(self, stage: str, round_: int | None, manifest: Mapping[str, Any]) -> None: ...

    def trace(self, call: Mapping[str, Any]) -> None:
        """Notes one call of a model, at once and in any thread, whether or not the record has been started; some of them are kept.

        Args:
            call: `key` (hex digits of a digest), `name`, `inputs`, `outputs`, `attributes`, `started` (Unix seconds), `seconds`.
        """
        ...

    def tag(self, key: str, value: str) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def policy(self, path: Path, name: str, metrics: Mapping[str, float]) -> None: ...

    def finish(self, status: str, metrics: Mapping[str, float]) -> None: ...

    def settle(self) -> None:
        """In place of `start` to `finish` where there is nothing to record: waits a while for what earlier runs left to be delivered."""
        ...

    def link(self) -> str | None:
        """Where a person sees the run."""
        ...
