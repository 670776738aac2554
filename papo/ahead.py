"""Scoring of the shards that are stored while others are being sampled, so that a round takes as long as its longest stage.

The verifier and the judge each have a thread of their own. What they find is what the stages would find: score_orm takes the outcomes from
here, and verdicts that are paid for lie in the store when score_prm asks for them. Whatever fails here is left to the stage, which
asks again and says what is wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.engines.protocols import Aligner, Judge, JudgeItem, Judgement, Progress, Verdict, Verifier, VerifyItem
from papo.params import AdvantageParams
from papo.stages import advantage, score_orm, score_prm
from papo.store.faults import reached

Rows = Sequence[Mapping[str, Any]]
Outcomes = list[float | None]


class Ahead:
    """Scores the shards of one round as they come; a context manager, which drops what has not begun.

    Args:
        problems: the training problems.
        judge: None: nobody is asked about the process.
        aligner: for variant capo.
    """

    def __init__(
        self,
        problems: Path,
        params: AdvantageParams,
        verifier: Verifier,
        judge: Judge | None,
        aligner: Aligner | None = None,
    ) -> None:
        self._problems, self._params = problems, params
        self._verifier, self._judge, self._aligner = verifier, judge, aligner
        self._verdicts: dict[VerifyItem, Verdict] = {}
        self._judgements: dict[JudgeItem, Judgement] = {}
        self._verifying = _Line("papo-verifying-ahead", self._verify)
        self._judging = _Line("papo-judging-ahead", self._ask, self._verifying)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing further begins; what has begun ends by itself."""
        self._verifying.close()
        self._judging.close()

    def add(self, rows: Rows) -> None:
        """Whole groups of the round's rollouts; returns at once."""
        self._verifying.submit(rows)

    def verifier(self) -> Verifier:
        """The verifier, which knows the outcomes that were found here, once all are there."""
        return _KnowingVerifier(self._verifier, self._verifying.join, self._verdicts)

    def judge(self) -> Judge | None:
        """The judge, which begins once nothing is under way here."""
        return None if self._judge is None else _WaitingJudge(self._judge, self._judging.join)

    def score(self, rows: Rows) -> list[tuple[float | None, float]]:
        """Outcome and total advantage of each row; the groups have to be whole, and were added before.

        Raises:
            PapoError: of the verifier or the judge.
        """
        self._judging.join(raising=True)
        items = score_orm.items_of(rows, self._problems)
        outcomes: Outcomes = [self._verdicts[item].score for item in items]
        orm = [
            {"problem_id": row["problem_id"], "orm_score": outcome} for row, outcome in zip(rows, outcomes, strict=True)
        ]
        prm = self._process(rows, outcomes)
        found, _ = advantage.compute(self._params, [dict(row) for row in rows], orm, prm, Path("prm"), self._aligner)
        return list(zip(outcomes, found.total.tolist(), strict=True))

    def _process(self, rows: Rows, outcomes: Outcomes) -> list[dict[str, Any]]:
        asked, items = score_prm.items_of(rows, outcomes, self._params.variant, self._problems)
        answers = (self._judgements[item] for item in items)
        given = [next(answers) if ask else score_prm.NOT_ASKED for ask in asked]
        return [{"prm_score": one.score, "status": one.status, "wrong_steps": one.wrong_steps} for one in given]

    # ---- in the threads ----

    def _verify(self, rows: Rows) -> None:
        items = score_orm.items_of(rows, self._problems)
        reached("verify")
        self._verdicts |= zip(items, self._verifier.verify(items, lambda done: None), strict=True)
        reached("verified")
        self._judging.submit(rows)

    def _ask(self, rows: Rows) -> None:
        if self._judge is None:
            return
        outcomes = [self._verdicts[item].score for item in score_orm.items_of(rows, self._problems)]
        _, items = score_prm.items_of(rows, outcomes, self._params.variant, self._problems)
        reached("judge")
        self._judgements |= zip(items, self._judge.judge(items, lambda done: None), strict=True)
        reached("judged")


class _Line:
    """Works in a thread on what is submitted, all that has come at a time: many small pieces would cost more. After an error it stops.

    Args:
        before: the line that submits to this one.
    """

    def __init__(self, name: str, work: Callable[[Rows], None], before: _Line | None = None) -> None:
        self._name, self._work, self._before = name, work, before
        self._rows: list[Mapping[str, Any]] = []
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def submit(self, rows: Rows) -> None:
        with self._changed:
            self._rows += rows
            if self._thread is None:
                # A daemon: an interrupted run need not wait for a judge to answer.
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def join(self, *, raising: bool = False) -> None:
        """Until all that was submitted is done or dropped; with `raising`, what failed is raised."""
        if self._before is not None:
            self._before.join(raising=raising)
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._closed or not (self._rows or self._busy))
        if raising and self._error is not None:
            raise self._error

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._rows or self._closed)
                if self._closed:
                    return
                rows, self._rows, self._busy = self._rows, [], True
            try:
                self._work(rows)
            except Exception as error:  # whatever it is: whoever needs the result is told, or finds out by asking again
                with self._changed:
                    self._error, self._busy = error, False
                    self._changed.notify_all()
                return


class _KnowingVerifier:
    def __init__(self, then: Verifier, wait: Callable[[], None], known: Mapping[VerifyItem, Verdict]) -> None:
        self._then, self._wait, self._known = then, wait, known

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        self._wait()
        # A verdict that failed is looked for anew.
        found = {
            item: verdict
            for item in items
            if (verdict := self._known.get(item)) is not None and verdict.score is not None
        }
        left = [item for item in items if item not in found]
        progress(len(items) - len(left))
        verdicts = iter(self._then.verify(left, progress))
        return [found[item] if item in found else next(verdicts) for item in items]

    def versions(self) -> dict[str, str]:
        return self._then.versions()


class _WaitingJudge:
    def __init__(self, then: Judge, wait: Callable[[], None]) -> None:
        self._then, self._wait = then, wait
        self.name, self.rubric, self.digest, self.apart = then.name, then.rubric, then.digest, then.apart

    def check(self) -> None:
        self._then.check()

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        self._wait()
        return self._then.judge(items, progress)

    def metrics(self, not_asked: int) -> dict[str, float]:
        return self._then.metrics(not_asked)

    def versions(self) -> dict[str, str]:
        return self._then.versions()
