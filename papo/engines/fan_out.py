"""Verifiers and judges that have their items scored elsewhere, in chunks, by those that they stand for; results come back in order."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from papo.engines.protocols import Judge, JudgeItem, Judgement, Progress, Verdict, Verifier, VerifyItem
from papo.errors import SetupError
from papo.store.manifest import Spread

Item = TypeVar("Item")
Score = TypeVar("Score")

Scored = tuple[list[Score], dict[str, str]]
"""Scores of a chunk in order, and the versions of what made them."""


class SpreadVerifier:
    """Verdicts of the verifier that `make` gives, wherever `spread` runs it.

    Args:
        make: gives the verifier, on each machine; has to be picklable.
        cpus: that a chunk takes.
    """

    def __init__(self, make: Callable[[], Verifier], spread: Spread, *, cpus: int = 1) -> None:
        self._make, self._spread, self._cpus = make, spread, cpus
        self._versions: dict[str, str] = {}

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        """One verdict an item, in order.

        Raises:
            PapoError: of the verifier, which says on which machine where one lacks something, or of `spread`.
            SetupError: two machines have different versions of what makes the verdicts.
        """
        work = partial(_verify, self._make)
        return _scores("verify", work, items, progress, self._spread, self._cpus, self._versions)

    def versions(self) -> dict[str, str]:
        """Those on the machines that verified."""
        return dict(self._versions) or self._make().versions()


class SpreadJudge:
    """Judgements of the judge that `make` gives, wherever `spread` runs it; for judges that ask nobody and store nothing.

    Args:
        make: gives the judge, on each machine; has to be picklable.
    """

    def __init__(self, make: Callable[[], Judge], spread: Spread) -> None:
        self._make, self._spread, self._here = make, spread, make()
        self.name, self.rubric, self.digest = self._here.name, self._here.rubric, self._here.digest
        self.apart = self._here.apart
        self._versions: dict[str, str] = {}

    def check(self) -> None:
        self._here.check()

    def judge(self, items: Sequence[JudgeItem], progress: Progress) -> list[Judgement]:
        """One judgement an item, in order.

        Raises:
            as `SpreadVerifier.verify`.
        """
        work = partial(_judge, self._make)
        return _scores("judge", work, items, progress, self._spread, 1, self._versions)

    def metrics(self, not_asked: int) -> dict[str, float]:
        return self._here.metrics(not_asked)

    def versions(self) -> dict[str, str]:
        """Those on the machines that judged."""
        return dict(self._versions) or self._here.versions()


def _scores(
    name: str,
    work: Callable[[Sequence[Item]], Scored[Score]],
    items: Sequence[Item],
    progress: Progress,
    spread: Spread,
    cpus: int,
    versions: dict[str, str],
) -> list[Score]:
    chunks = [items[start : start + spread.chunk] for start in range(0, len(items), spread.chunk)]
    scores: list[Score] = []
    for chunk, (found, made_by) in zip(chunks, spread.map(name, work, chunks, cpus=cpus), strict=True):
        _agree(versions, made_by)
        assert len(found) == len(chunk)
        scores += found
        progress(len(chunk))
    return scores


def _agree(versions: dict[str, str], more: dict[str, str]) -> None:
    """Takes `more` into `versions`.

    Raises:
        SetupError: something has two versions, so that one response could have two scores.
    """
    for name, version in more.items():
        if versions.setdefault(name, version) != version:
            raise SetupError(
                f"two machines that score have {name} {versions[name]} and {version}",
                where="run.ray",
                fix="install the same requirements.lock on every node, and run it again",
            )


# ---- on the machine that scores ----


def _verify(make: Callable[[], Verifier], items: Sequence[VerifyItem]) -> Scored[Verdict]:
    try:
        verifier = make()
        return verifier.verify(items, lambda done: None), verifier.versions()
    except SetupError as error:
        raise _here(error) from None


def _judge(make: Callable[[], Judge], items: Sequence[JudgeItem]) -> Scored[Judgement]:
    try:
        judge = make()
        return judge.judge(items, lambda done: None), judge.versions()
    except SetupError as error:
        raise _here(error) from None


def _here(error: SetupError) -> SetupError:
    """The error with the name of this machine, which need not be the one that it is read on."""
    return SetupError(error.what, where=f"{error.where}, on the machine {platform.node()}", fix=error.fix)
