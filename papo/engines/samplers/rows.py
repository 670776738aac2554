"""What the samplers that ask vLLM share: which prompts fit, which rows are believed, and rows put together to shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from papo.engines.policy import encode_prompt
from papo.engines.protocols import Progress, Sample, SampleRequest
from papo.errors import DataError, ParamsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_TEMPERATURE = 0.01
"""vLLM takes a lower one, but 0, for this."""

NEVER = -9999.0
"""What vLLM says for the log of 0."""

ROUNDING = 1e-4
"""A log-prob may be above 0 by so much, and is 0 then."""


@dataclass(frozen=True)
class Row:
    """A completion as vLLM gave it, checked."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Limits:
    """What a completion may be: so many tokens of a vocabulary, `eos` at the end of one that stopped and nowhere else."""

    max_new_tokens: int
    eos: int
    vocabulary: int


def fold_seed(seed: int) -> int:
    """The seed of a row, of 64 bits, as vLLM takes it: from 0 to 2**63 - 1."""
    return seed & (2**63 - 1)


def check_temperature(temperature: float) -> None:
    """
    Raises:
        ParamsError: vLLM would take another one.
    """
    if 0.0 < temperature < LEAST_TEMPERATURE:
        raise ParamsError(
            f"vLLM samples at no temperature between 0 and {LEAST_TEMPERATURE}",
            where=f"temperature {temperature:g}",
            fix=f"set it to 0, or to {LEAST_TEMPERATURE} or above",
        )


def check_row(ids: Any, values: Any, reason: Any, limits: Limits, where: str, giver: str) -> Row:
    """The row of these ids, log-probs and finish reason, which `giver` ("server", "engine") gave.

    Raises:
        DataError: naming `where`, if they cannot be what was asked for.
    """

    def wrong(what: str) -> DataError:
        return row_error(what, where, giver)

    if not are_ids(ids, limits.vocabulary):
        raise wrong(f"tokens that are none of the {limits.vocabulary} of the policy")
    if not isinstance(values, list) or len(values) != len(ids):
        raise wrong(f"{len(values) if isinstance(values, list) else 0} log-probs for {len(ids)} tokens")
    most = limits.max_new_tokens
    if reason not in ("stop", "length"):
        raise wrong(f"the finish reason {reason!r}, which is neither stop nor length")
    if len(ids) > most:
        raise wrong(f"{len(ids)} tokens, more than the {most} that it was asked for")
    ended = bool(ids) and ids[-1] == limits.eos
    if reason == "length" and len(ids) < most:
        raise wrong(f"{len(ids)} tokens, fewer than the {most} that it was asked for, and no end of text")
    if limits.eos in ids[:-1] or ended != (reason == "stop"):
        raise wrong(f"a completion that does not end as its finish reason {reason} says")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not NEVER < value <= ROUNDING:
            raise wrong(f"the log-prob {value}, which no token that was sampled can have")
    return Row(list(ids), [min(float(value), 0.0) for value in values], str(reason))


def row_error(what: str, where: str, giver: str, fix: str = "") -> DataError:
    seen = {"server": "see whether the server serves this policy, and its log", "engine": "see the log of the engine"}
    return DataError(f"the {giver} gave {what}", where=where, fix=fix or seen[giver])


def are_ids(values: Any, vocabulary: int | None) -> bool:
    most = math.inf if vocabulary is None else vocabulary
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < most for value in values
    )


@dataclass(frozen=True)
class Prompts:
    """Which prompts can be sampled. `positions`: of the policy, if it says how many it has."""

    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    max_prompt_tokens: int
    max_new_tokens: int

    def fits(self, prompt: str) -> str | None:
        """Why a prompt cannot be sampled; None if it can."""
        return self._misfit(encode_prompt(self.tokenizer, prompt))

    def encode(self, requests: Sequence[SampleRequest]) -> list[list[int]]:
        """
        Raises:
            DataError: a prompt does not fit.
        """
        ids = {prompt: encode_prompt(self.tokenizer, prompt) for prompt in {one.prompt for one in requests}}
        for prompt, encoded in ids.items():
            if (why := self._misfit(encoded)) is not None:
                raise DataError(
                    why,
                    where=f"prompt {prompt[:60]!r}",
                    fix="raise rollout.max_prompt_tokens, lower max_new_tokens, or drop the problem in prepare",
                )
        return [ids[request.prompt] for request in requests]

    def sample(self, prompt: list[int], row: Row) -> Sample:
        text = row.ids[:-1] if row.finish_reason == "stop" else row.ids
        completion = self.tokenizer.decode(text, skip_special_tokens=False)
        return Sample(prompt, row.ids, completion, row.logprobs, row.finish_reason)

    def _misfit(self, ids: Sequence[int]) -> str | None:
        if not 0 < len(ids) <= self.max_prompt_tokens:
            return f"a prompt has {len(ids)} tokens, allowed are 1 to {self.max_prompt_tokens}"
        if self.positions is not None and len(ids) + self.max_new_tokens > self.positions:
            return (
                f"a prompt of {len(ids)} tokens and {self.max_new_tokens} new ones do not fit into the {self.positions} "
                "positions of the policy"
            )
        return None


def by_shard(
    shards: Sequence[Sequence[SampleRequest]], rows: Iterable[tuple[int, Sample]], progress: Progress
) -> Iterator[tuple[int, list[Sample]]]:
    """Number and samples of each shard as it completes, of `rows`: (number over all shards, sample) in any order."""
    of_shard = [number for number, shard in enumerate(shards) for _ in shard]
    left = [len(shard) for shard in shards]
    starts = list(accumulate(left, initial=0))
    found: dict[int, Sample] = {}
    for number, shard in enumerate(shards):
        if not shard:
            yield number, []
    for row, sample in rows:
        found[row] = sample
        progress(1)
        number = of_shard[row]
        left[number] -= 1
        if not left[number]:
            yield number, [found.pop(starts[number] + index) for index in range(len(shards[number]))]
