"""What the generated worlds share: how problems, benchmarks and traces are drawn; a world says what a draft of a problem is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar, Generic, Protocol, TypeVar

from papo.engines.protocols import Problem
from papo.errors import DataError


class SizedTier(Protocol):
    """A tier of any world."""

    @property
    def problems(self) -> int: ...


T = TypeVar("T", bound=SizedTier)
D = TypeVar("D")


class GeneratedSource(Generic[T, D]):
    """Generates problems, held-out tiers that share no problem with training, and warm-start traces.

    Everything is decided by `seed`; the three parts draw from streams of their own, so that asking for more traces changes no problem.

    Args:
        train, benchmarks: tiers of the world.
        traces: how many.

    Raises:
        DataError: a tier has fewer different problems than are asked for.
    """

    world: ClassVar[str]
    unit: ClassVar[str]
    """What makes a problem harder: `terms`."""
    patience: ClassVar[int]
    """Draws in vain for each problem, above which there are too few."""

    def __init__(self, train: T, benchmarks: Mapping[str, T], traces: int, *, seed: int, prompt_template: str) -> None:
        self._tier, self._traces = train, traces
        self._seed, self._template = seed, prompt_template
        self._benchmarks: dict[str, list[Problem]] = {}
        self._held_out: set[str] = set()
        for name, tier in benchmarks.items():
            self._benchmarks[name] = list(self._distinct(self._stream(f"eval/{name}"), tier, name))
            self._held_out |= {problem.prompt for problem in self._benchmarks[name]}
        self._train = list(self._distinct(self._stream("train"), train, "train"))

    def train(self) -> Iterator[Problem]:
        return map(self._worded, self._train)

    def benchmarks(self) -> Mapping[str, Iterator[Problem]]:
        return {name: map(self._worded, problems) for name, problems in self._benchmarks.items()}

    def traces(self) -> Iterator[tuple[str, str]]:
        """Mixed traces on fresh problems of the training tier, none of them held out."""
        stream = self._stream("traces")
        made = 0
        while made < self._traces:
            draft = self._draw(stream, self._tier)
            if self._prompt(draft) in self._held_out:
                continue
            yield self._wording(self._prompt(draft)), self._trace(stream, draft)
            made += 1

    # ---- what a world says ----

    def _draw(self, stream: random.Random, tier: T) -> D:
        raise NotImplementedError

    def _prompt(self, draft: D) -> str:
        raise NotImplementedError

    def _problem(self, draft: D) -> Problem:
        raise NotImplementedError

    def _trace(self, stream: random.Random, draft: D) -> str:
        raise NotImplementedError

    def _range(self, tier: T) -> tuple[int, int]:
        """Fewest and most units of a problem."""
        raise NotImplementedError

    # ---- what follows ----

    def _tier_name(self, tier: T) -> str:
        low, high = self._range(tier)
        return f"{low}-{high} {self.unit}" if low < high else f"{low} {self.unit}"

    def _distinct(self, stream: random.Random, tier: T, name: str) -> Iterator[Problem]:
        """As many problems as the tier has, all different, none of them held out."""
        seen: set[str] = set()
        misses = 0
        while len(seen) < tier.problems:
            draft = self._draw(stream, tier)
            prompt = self._prompt(draft)
            if prompt in seen or prompt in self._held_out:
                misses += 1
                if misses > 1000 + self.patience * tier.problems:
                    raise DataError(
                        f"only {len(seen)} different problems of {self._tier_name(tier)} found, {tier.problems} asked for",
                        where=f"prepare.{self.world}, {name}",
                        fix=f"ask for fewer problems or for more {self.unit}",
                    )
                continue
            seen.add(prompt)
            yield self._problem(draft)

    def _worded(self, problem: Problem) -> Problem:
        return replace(problem, prompt=self._wording(problem.prompt))

    def _wording(self, prompt: str) -> str:
        return prompt if self._template == "{prompt}" else self._template.format(prompt=prompt.strip())

    def _stream(self, part: str) -> random.Random:
        return random.Random(f"{self._seed}/{part}")
