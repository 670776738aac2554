"""The judge that is a model: a rubric, a server that is asked, and a store in which every verdict is paid for once.

What becomes of a response:

    more than half of its votes were given       their combination     ok
    otherwise                                    None                  what became of most of the others: timeout, refused, unparsable,
                                                                       too_long, rate_limited, error

A reply that is no verdict is asked for again, once. Identical responses to a problem share their votes. Verdicts that are stored are not
asked for; those that another process is asking for are waited for. Whatever was paid for before a stop is kept, whatever the reason.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from papo.core.credit import combine_votes, split_steps
from papo.core.fence import draw_mark
from papo.core.votes import VOTES, combine_scores, vote_agreement
from papo.engines.chat import ChatClient, ChatReply, ChatRequest
from papo.engines.judges.rubrics import Reading, Rubric, load_rubric
from papo.engines.protocols import JudgeItem, Judgement, Progress
from papo.errors import BudgetError, PapoError
from papo.params import ChatParams, Price, ScorePrmParams
from papo.schemas import PRM_STATUSES
from papo.store.ledger import PaidCall, Spent
from papo.store.verdicts import StoredVerdict, VerdictStore, new_owner, verdict_key, verdict_parts

_Texts = tuple[str, str | None, str]
"""Problem, reference solution and response."""

ASKED = 2
"""How often a reply is asked for that turns out to be no verdict, the first time included."""


@dataclass(frozen=True)
class Purpose:
    """What verdicts are asked for, and by whom; none of it decides one.

    Args:
        run: name of the run that pays; a stage that is started again goes on with the name.
        round: -1 outside of rounds.
        warn: told of damage to the store.
        trace: told of every call, with what was sent and what came.
    """

    store: Path
    run: str = "no run"
    round: int = -1
    variant: str = "none"
    warn: Callable[[str], None] = lambda message: None
    trace: Callable[[Mapping[str, Any]], None] = lambda call: None


class _Vote(NamedTuple):
    """One vote on one question."""

    question: int
    number: int
    key: str


class _Verdict(NamedTuple):
    """A stored verdict and what the rubric makes of it."""

    stored: StoredVerdict
    reading: Reading


class _Failure(NamedTuple):
    """Why there is no verdict."""

    status: str
    cause: str


def _failure(vote: _Verdict | _Failure) -> _Failure | None:
    """What is wrong with it; None if it is a vote."""
    if isinstance(vote, _Failure):
        return vote
    return None if vote.reading.score is not None else _Failure(vote.reading.status, vote.reading.reason)


class ModelJudge:
    """Implements `Judge` by a model behind an OpenAI-compatible server."""

    apart = False

    def __init__(self, params: ScorePrmParams, purpose: Purpose) -> None:
        """
        Raises:
            ParamsError: there is no such rubric, or it cannot be used.
        """
        assert params.model is not None
        self._params, self._purpose, self._rubric = params, purpose, load_rubric(params.rubric)
        self._client = ChatClient(params.model)
        self._metrics: dict[str, float] = {}
        self._mean_tokens = self._mean_cost = 0.0
        self.name, self.rubric, self.digest = params.model.model, self._rubric.label, self._rubric.digest()

    def check(self) -> None:
        """
        Raises:
            SetupError: a package is not installed, or there is no key, or it cannot be one; or the store cannot be written.
            UserError: what is named as the store is none.
        """
        self._client.check()
        VerdictStore.open(self._purpose.store, warn=self._purpose.warn).close()

    def versions(self) -> dict[str, str]:
        return {"openai": metadata.version("openai")}

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        """One judgement an item, in order.

        Raises:
            SetupError, UserError: as `check`, or the disk is full; no server and no key is needed where all is stored.
            ServerDownError: the server does not answer; started again, the judge goes on where it was.
            BudgetError: a further call could cost more than is left.
        """
        numbers: dict[_Texts, int] = {}
        of_items = [
            numbers.setdefault((item.problem, item.reference_solution, item.response), len(numbers)) for item in items
        ]
        questions = list(numbers)
        shares = Counter(of_items)
        with VerdictStore.open(self._purpose.store, warn=self._purpose.warn) as store:
            asking = _Asking(self._params, self._purpose, self._rubric, self._client, store, questions)
            asking.on_done = lambda question: progress(shares[question])
            asking.run()
            paid = store.paid_keys(self._purpose.run, self._purpose.round)
            spent = store.spent(self._purpose.run, round=self._purpose.round)
        judgements: list[Judgement] = []
        seen: set[int] = set()
        uses: list[tuple[StoredVerdict, bool]] = []
        for question in of_items:
            votes = [asking.found[vote.key] for vote in asking.votes[question]]
            given = [vote for vote in votes if isinstance(vote, _Verdict) and not _failure(vote)]
            # The second of two identical responses is answered by the first.
            bought = [question not in seen and vote.stored.key in paid for vote in given]
            seen.add(question)
            uses += zip((vote.stored for vote in given), bought, strict=True)
            judgements.append(self._judgement(votes, given, cached=bool(given) and not any(bought)))
        self._count(uses, judgements, spent)
        return judgements

    def metrics(self, not_asked: int) -> dict[str, float]:
        """Of the last `judge`, as docs/judge.md names them."""
        calls = not_asked * self._params.votes
        found = self._metrics | {"not_asked_calls": float(calls), "not_asked_tokens": calls * self._mean_tokens}
        return found | ({"not_asked_saved": calls * self._mean_cost} if self._params.price else {})

    def _judgement(self, votes: Sequence[_Verdict | _Failure], given: Sequence[_Verdict], *, cached: bool) -> Judgement:
        scores = [float(vote.reading.score) for vote in given if vote.reading.score is not None]
        prompt_tokens = sum(vote.stored.prompt_tokens for vote in given)
        completion_tokens = sum(vote.stored.completion_tokens for vote in given)
        if 2 * len(given) <= len(votes):
            failures = [failure for vote in votes if (failure := _failure(vote))]
            counts = Counter(failure.status for failure in failures)
            status = max(counts, key=lambda status: (counts[status], -PRM_STATUSES.index(status)))
            cause = next(failure.cause for failure in failures if failure.status == status)
            return Judgement(None, status, cause, scores, None, prompt_tokens, completion_tokens, cached)
        score = combine_scores(scores, self._params.vote)
        critiques = [vote.reading.wrong_steps for vote in given if vote.reading.wrong_steps is not None]
        wrong = combine_votes(critiques, VOTES[self._params.vote]).tolist() if critiques else None
        # The reason of a vote for that score, or of the one that is nearest to it.
        reason = min(given, key=lambda vote: abs((vote.reading.score or 0.0) - score)).reading.reason
        return Judgement(score, "ok", reason, scores, wrong, prompt_tokens, completion_tokens, cached)

    def _count(self, uses: Sequence[tuple[StoredVerdict, bool]], judgements: Sequence[Judgement], spent: Spent) -> None:
        price = self._params.price
        tokens = [verdict.prompt_tokens + verdict.completion_tokens for verdict, _ in uses]
        costs = [cost_of(price, verdict.prompt_tokens, verdict.completion_tokens) or 0.0 for verdict, _ in uses]
        cached = [not bought for _, bought in uses]
        self._mean_tokens = sum(tokens) / len(uses) if uses else 0.0
        self._mean_cost = math.fsum(costs) / len(uses) if uses else 0.0
        saved = math.fsum(cost for cost, is_cached in zip(costs, cached, strict=True) if is_cached)
        found = {
            "calls": spent.calls,
            "calls_failed": spent.failed,
            "prompt_tokens": spent.prompt_tokens,
            "completion_tokens": spent.completion_tokens,
            "cost": (spent.cost or 0.0) if price else None,
            "cached_share": sum(cached) / len(uses) if uses else None,
            "cache_tokens": sum(count for count, is_cached in zip(tokens, cached, strict=True) if is_cached),
            "cache_saved": saved if price else None,
            "vote_agreement": vote_agreement(judgement.votes for judgement in judgements),
        }
        self._metrics = {name: float(value) for name, value in found.items() if value is not None}


class _Asking:
    """One look through the store and, for what it lacks, one conversation with the server.

    `found` has what became of each key in the end.
    """

    def __init__(
        self,
        params: ScorePrmParams,
        purpose: Purpose,
        rubric: Rubric,
        client: ChatClient,
        store: VerdictStore,
        questions: Sequence[_Texts],
    ) -> None:
        self.params, self.purpose, self.rubric, self.client, self.store = params, purpose, rubric, client, store
        self.model: ChatParams = client.params
        self.questions = questions
        self.digest = rubric.asking()
        self.votes = [
            [_Vote(n, vote, verdict_key(self._parts(texts, vote))) for vote in range(params.votes)]
            for n, texts in enumerate(questions)
        ]
        self.by_key = {vote.key: vote for votes in self.votes for vote in votes}
        self.found: dict[str, _Verdict | _Failure] = {}
        self.left = [params.votes] * len(questions)
        self.steps: dict[int, int] = {}
        self.on_done: Callable[[int], None] = lambda question: None
        self.stop: PapoError | None = None

    def run(self) -> None:
        """Fills `found`.

        Raises:
            PapoError: as `ModelJudge.judge`.
        """
        for key, verdict in self.store.get_many(self.by_key).items():
            self._has(key, verdict)
        if len(self.found) < len(self.by_key):
            asyncio.run(self._ask())
        if self.stop is not None:
            raise self.stop

    def _parts(self, texts: _Texts, vote: int) -> str:
        # The texts and what decides how they are put: the prompt itself has a mark that is drawn for each call.
        prompt = json.dumps([self.digest, *texts])
        sampling = {"temperature": self.model.temperature, "max_tokens": self.model.max_tokens}
        return verdict_parts(self.model.model, self.rubric.label, prompt, sampling, vote)

    def _has(self, key: str, verdict: StoredVerdict) -> None:
        """Takes a verdict from the store. One that this version of the rubric cannot read any more is not paid for again."""
        self._end(key, _Verdict(verdict, self._read(self.by_key[key].question, verdict.answer, verdict.finish_reason)))

    def _read(self, question: int, answer: str, finish_reason: str | None) -> Reading:
        if question not in self.steps:
            self.steps[question] = len(split_steps(self.questions[question][2])) if self.rubric.kind == "steps" else 0
        return self.rubric.read(answer, steps=self.steps[question], finish_reason=finish_reason)

    def _end(self, key: str, found: _Verdict | _Failure) -> None:
        self.found[key] = found
        question = self.by_key[key].question
        self.left[question] -= 1
        if not self.left[question]:
            self.on_done(question)

    # ---- in the event loop ----

    async def _ask(self) -> None:
        self.owner, self.ready, self.hungry = new_owner(), asyncio.Queue[_Vote | None](), asyncio.Event()
        spent = self.store.spent(self.purpose.run) if self.params.budget is not None else None
        self.purse = _Purse(self.params.budget, spent.cost or 0.0 if spent else 0.0)
        async with self.client, asyncio.TaskGroup() as group:
            self.feeder = group.create_task(self._feed())
            for _ in range(self.model.concurrency):
                group.create_task(self._work())
        if self.stop is None:
            self.client.raise_if_down()

    async def _feed(self) -> None:
        """Claims what nobody has, a few more than can be asked at once, and takes what others have brought."""
        wanted = dict.fromkeys(key for key in self.by_key if key not in self.found)
        width = self.model.concurrency
        try:
            while wanted:
                found, mine = await self.store.wait(list(wanted), self.owner, limit=width)
                for key, verdict in found.items():
                    self._has(key, verdict)
                for key in [key for key in wanted if key in mine]:
                    self.ready.put_nowait(self.by_key[key])
                for key in found.keys() | mine:
                    del wanted[key]
                while self.ready.qsize() >= width:
                    self.hungry.clear()
                    await self.hungry.wait()
        except PapoError as error:
            self.stop = self.stop or error
        finally:
            for _ in range(width):
                self.ready.put_nowait(None)

    async def _work(self) -> None:
        while (vote := await self.ready.get()) is not None and self.stop is None:
            self.hungry.set()
            try:
                self._end(vote.key, await self._one(vote))
            except PapoError as error:
                # The others end what they have begun, which is paid for; what was claimed is free when the store is closed.
                self.stop = self.stop or error
                self.feeder.cancel()

    async def _one(self, vote: _Vote) -> _Verdict | _Failure:
        """What became of one vote; whatever was paid for is in the store when this returns."""
        for number in range(ASKED):
            request = self._request(vote, number)
            tokens = math.ceil((len(request.system) + len(request.user)) / 4)
            worst = cost_of(self.params.price, tokens, self.model.max_tokens) or 0.0
            await self.purse.reserve(worst)
            call = None
            try:
                started = time.time()
                reply = await self.client.ask(request)
                reading = self._read(vote.question, reply.text or "", reply.finish_reason)
                status, cause = (
                    (reading.status, reading.reason) if reply.status == "ok" else (reply.status, reply.cause)
                )
                call = self._call(vote, reply, status, tokens)
                self._trace(vote, request, reply, status, call, started)
                if status == "ok":
                    return await self._keep(vote, reply, call)
                if call is not None:
                    await self.store.charged(call)
            finally:
                self.purse.settle(worst, (call.cost or 0.0) if call is not None else 0.0)
            if status != "unparsable":
                break
        await asyncio.to_thread(self.store.release, [vote.key], self.owner)
        return _Failure(status, cause)

    def _request(self, vote: _Vote, number: int) -> ChatRequest:
        texts = self.questions[vote.question]
        mark = draw_mark(*(text for text in texts if text is not None))
        system, user, _ = self.rubric.render(*texts, mark=mark)
        # Every vote and every further try has a seed of its own, the same in all runs.
        return ChatRequest(system, user, self.rubric.schema(), seed=ASKED * vote.number + number)

    def _call(self, vote: _Vote, reply: ChatReply, status: str, tokens: int) -> PaidCall | None:
        """What is paid for a reply; for a try that was billed and brought no count, the prompt as it is estimated. None if nothing is."""
        if not reply.billed_tries:
            return None
        counted = reply.prompt_tokens > 0 or reply.completion_tokens > 0
        prompt_tokens = reply.prompt_tokens + tokens * (reply.billed_tries - counted)
        return PaidCall(
            run=self.purpose.run,
            round=self.purpose.round,
            variant=self.purpose.variant,
            key=vote.key,
            model=self.model.model,
            rubric=self.rubric.label,
            status=status,
            tries=reply.billed_tries,
            prompt_tokens=prompt_tokens,
            completion_tokens=reply.completion_tokens,
            cost=cost_of(self.params.price, prompt_tokens, reply.completion_tokens),
            seconds=reply.seconds,
        )

    async def _keep(self, vote: _Vote, reply: ChatReply, call: PaidCall | None) -> _Verdict:
        verdict = StoredVerdict(
            key=vote.key,
            model=self.model.model,
            rubric=self.rubric.label,
            answer=reply.text or "",
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            seconds=reply.seconds,
            parts=self._parts(self.questions[vote.question], vote.number),
        )
        kept = await self.store.keep(verdict, call)
        return _Verdict(kept, self._read(vote.question, kept.answer, kept.finish_reason))

    def _trace(
        self, vote: _Vote, request: ChatRequest, reply: ChatReply, status: str, call: PaidCall | None, started: float
    ) -> None:
        attributes = {
            "model": self.model.model,
            "rubric": self.rubric.label,
            "status": status,
            "tries": reply.tries,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "cost": call.cost if call is not None else None,
            "round": self.purpose.round,
            "variant": self.purpose.variant,
            "vote": vote.number,
        }
        self.purpose.trace(
            {
                "key": vote.key,
                "name": "judge",
                "inputs": {"system": request.system, "user": request.user},
                "outputs": {"text": reply.text},
                "attributes": attributes,
                "started": started,
                "seconds": reply.seconds,
            }
        )


class _Purse:
    """Lets a call begin only if the dearest that it and those under way can become is within the budget; others wait for those."""

    def __init__(self, budget: float | None, spent: float) -> None:
        self._budget, self._spent = budget, spent
        self._held: list[float] = []
        self._settled = asyncio.Event()

    async def reserve(self, worst: float) -> None:
        """
        Raises:
            BudgetError: it is not, and none is under way.
        """
        if self._budget is None:
            return
        while math.fsum([self._spent, *self._held, worst]) > self._budget:
            if not self._held:
                raise BudgetError(
                    f"the judge has cost {self._spent:.4g} in this run, and another call may cost {worst:.4g}",
                    where=f"score_prm.budget, {self._budget:g}",
                    fix="raise score_prm.budget and start again: all that was paid for is kept",
                )
            self._settled.clear()
            await self._settled.wait()
        self._held.append(worst)

    def settle(self, worst: float, cost: float) -> None:
        if self._budget is not None:
            self._held.remove(worst)
            self._spent += cost
            self._settled.set()


def cost_of(price: Price | None, prompt_tokens: int, completion_tokens: int) -> float | None:
    """(price of a prompt token x prompt tokens + price of a completion token x completion tokens); None without a price."""
    if price is None:
        return None
    return (price.prompt * prompt_tokens + price.completion * completion_tokens) / 1e6
