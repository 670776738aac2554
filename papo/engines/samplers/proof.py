"""Proof that a server serves the policy in a folder, and gives the log-probs that training needs.

Fixed token sequences are put to the server and to transformers, and their log-probs compared: those of the sequence itself, which only the
policy decides, and those of the five likeliest tokens after it, which are of softmax(logits / temperature) only if the server runs with
--logprobs-mode processed_logprobs. Two policies count as one where they differ by less than the limit on all of that; and where it is
known what else the server may serve, as the policy of the round before, its log-probs must be none of that one (comparison.py).

The weights are rounded to what the server computes in before transformers computes in float32: the rounding of weights is a difference
that all servers of the policy share, and policies that it makes one are one to the server.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from papo.engines.policy import encode_prompt, load_policy
from papo.engines.samplers.comparison import Place, place
from papo.engines.samplers.completions import Endpoint, Sampling, only_choice
from papo.engines.samplers.rows import NEVER
from papo.errors import CheckpointError, DataError, SetupError
from papo.store.files import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

LIMITS = {"float32": 5e-4, "bfloat16": 1.0, "float16": 0.125}
"""Largest difference of a log-prob, by what a server computes in.

SmolLM2-135M on vLLM 0.32.0 was 1.1e-4 away in float32 and 0.64 in bfloat16, the embedded policy 5e-5 and 0.29; float16 has three bits
more. A step of a learning rate of 1e-6 is 7e-3: in float32 a policy is told from that of a step before, in 16 bits this limit alone tells
it only from one that has nothing to do with it.
"""

TOP = 5
_TOGETHER = 8
_HAND_OVER = "have the server load that folder (start it anew, or set reload)"
_TEXTS = ("3+5-2=?\n", "12-7+8=?\n3+4=", "9-9=?\n0\n1+2+3+4=?\n")
_LENGTHS = (*[24] * 20, *[48] * 4)
"""Of the sequences of ids at random; of those of worked sums, of which there are as many."""


@dataclass(frozen=True)
class Fixed:
    """A sequence, the log-prob of each of its tokens but the first, and of every token after it: as sampled, and at temperature 1.

    `others`: by folder, the log-probs of the sequence of other policies that a server may serve.
    """

    ids: list[int]
    logprobs: np.ndarray
    sampled: np.ndarray
    plain: np.ndarray
    others: Mapping[Path, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Proof:
    """`difference`: the largest of a log-prob; `nearest`: of the other policies, the one that the server is told from the least."""

    difference: float
    nearest: tuple[Path, Place] | None


def compute_fixed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    temperature: float,
    top_p: float,
    room: int,
    dtype: str = "float32",
) -> list[Fixed]:
    """The sequences with what transformers says of them; none is longer than `room` tokens. It rounds the weights of `model` to `dtype`."""

    def fixed(logits: Any, ids: list[int]) -> Fixed:
        after = logits[-1].log_softmax(-1).cpu().numpy()
        sampled = after
        if temperature > 0.0:  # at 0 the likeliest token is taken, and its log-prob is that at temperature 1
            sampled = _nucleus((logits[-1] / temperature).log_softmax(-1).cpu().numpy(), top_p)
        return Fixed(ids, _read(logits, ids), sampled.astype(np.float32), after.astype(np.float32))

    return _each(model, _sequences(tokenizer, room), dtype, fixed)


_others_read: dict[tuple[str, str, str], list[np.ndarray]] = {}
"""What other policies say, by digest, dtype and sequences: an evaluation of many policies compares each with each."""


def with_others(
    fixed: Sequence[Fixed], policy: Path, others: Sequence[Path], dtype: str, warn: Callable[[str], None]
) -> list[Fixed]:
    """The sequences with what the other policies say of them; without those that are not there, or are this policy.

    Args:
        warn: told of one that is there and cannot be read, or has another vocabulary.
    """
    seen, found = {digest(policy)}, list(fixed)
    for other in others:
        if not other.is_dir() or digest(other) in seen:
            continue
        seen.add(digest(other))
        try:
            read = _read_other(other, fixed, dtype)
        except CheckpointError as error:
            warn(f"whether a server still serves the policy in {other} is not looked at: {error.what}")
            continue
        found = [replace(one, others={**one.others, other: values}) for one, values in zip(found, read, strict=True)]
    return found


def _read_other(other: Path, fixed: Sequence[Fixed], dtype: str) -> list[np.ndarray]:
    """
    Raises:
        CheckpointError: it is no policy, or one of another vocabulary.
    """
    key = (digest(other), dtype, hashlib.sha256(repr([one.ids for one in fixed]).encode()).hexdigest())
    if key not in _others_read:
        model = load_policy(other, device="cpu")[0].eval()
        vocabulary, wanted = int(model.config.get_text_config().vocab_size), len(fixed[0].plain) if fixed else 0
        if vocabulary != wanted:
            raise CheckpointError(f"it has {vocabulary} tokens, the wanted policy {wanted}", where=str(other))
        _others_read[key] = _each(model, [one.ids for one in fixed], dtype, _read)
    return _others_read[key]


def _each(
    model: PreTrainedModel, sequences: Sequence[list[int]], dtype: str, read: Callable[[Any, list[int]], T]
) -> list[T]:
    """What `read` makes of each sequence and its logits. The weights of `model` are rounded to `dtype`, and stay so."""
    import torch

    found: dict[int, T] = {}
    with torch.inference_mode():
        for weight in model.parameters():
            weight.copy_(weight.to(getattr(torch, dtype)))
        for length in {len(ids) for ids in sequences}:
            same = [number for number, ids in enumerate(sequences) if len(ids) == length]
            for start in range(0, len(same), _TOGETHER):
                batch = same[start : start + _TOGETHER]
                ids = torch.tensor([sequences[number] for number in batch], device=model.device)
                for number, logits in zip(batch, model(ids).logits, strict=True):
                    found[number] = read(logits.double(), sequences[number])
    return [found[number] for number in range(len(sequences))]


def _read(logits: Any, ids: Sequence[int]) -> np.ndarray:
    """The log-prob of each token but the first."""
    values: np.ndarray = logits[:-1].log_softmax(-1)[range(len(ids) - 1), list(ids[1:])].cpu().numpy()
    return values


def _sequences(tokenizer: PreTrainedTokenizerBase, room: int) -> list[list[int]]:
    """A few prompts, worked sums, and token ids at random, which touch more of a policy than any text does."""
    stream = np.random.Generator(np.random.Philox(key=2024))
    prompts = [encode_prompt(tokenizer, text)[:96] for text in _TEXTS]
    drawn = [stream.integers(0, len(tokenizer), length).tolist() for length in _LENGTHS]
    sums = [[int(id_) for id_ in tokenizer(_worked(stream))["input_ids"]][:length] for length in _LENGTHS]
    return [ids[:room] for ids in (*prompts, *drawn, *sums) if len(ids[:room]) > 1]


def _worked(stream: np.random.Generator) -> str:
    """Sums with all their steps, of at least as many characters as a sequence may have tokens."""
    text = ""
    while len(text) < 2 * max(_LENGTHS):
        terms = stream.integers(1, 10, size=4).tolist()
        values = np.cumsum(terms).tolist()
        steps = [f"{value}+{term}={value + term}\n" for value, term in zip(values, terms[1:], strict=False)]
        text += f"{'+'.join(map(str, terms))}=?\n{''.join(steps)}\\boxed{{{values[-1]}}}\n"
    return text


def _nucleus(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    """Log-probs of the smallest set of tokens whose probability reaches `top_p`, renormalised; of others -inf."""
    if top_p >= 1.0:
        return logprobs
    order = np.argsort(-logprobs)
    before = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order])
    kept = order[before < top_p]
    found = np.full_like(logprobs, -np.inf)
    found[kept] = logprobs[kept] - np.log(np.exp(logprobs[kept]).sum())
    return found


async def prove(server: Endpoint, fixed: Sequence[Fixed], sampling: Sampling, limit: float, policy: Path) -> Proof:
    """
    Raises:
        SetupError: the server serves another policy, or its log-probs are of another distribution than that which is sampled.
        NoAnswerError: it does not answer.
    """
    if not fixed:
        raise SetupError(
            "the context of the server has no room for a proof of what it serves",
            where=server.url,
            fix=f"start it with --max-model-len {min(_LENGTHS) + 1} or more",
        )
    extra = {"max_tokens": 1, "prompt_logprobs": 0, "logprobs": TOP}
    bodies = [sampling.body(server.model, one.ids, 0) | extra for one in fixed]
    found, after, plain = [], 0.0, 0.0
    for one, reply in zip(fixed, await asyncio.gather(*map(server.complete, bodies)), strict=True):
        choice = only_choice(reply, server.url)
        found.append(_of_prompt(choice, one.ids, server.url))
        ids, values = _of_next(choice, len(one.sampled), server.url)
        after = max(after, _largest(values, one.sampled[ids]))
        plain = max(plain, _largest(values, one.plain[ids]))
    read = max(_largest(values, one.logprobs) for values, one in zip(found, fixed, strict=True))
    places = _places(found, fixed) if np.isfinite(read) else {}
    if others := [other for other, of in places.items() if of.is_other]:
        other = min(others, key=lambda other: _apart(found, [one.others[other] for one in fixed]))
        raise SetupError(
            f"the server still serves the policy in {other}: its log-probs are nearer to those of that one than to the checkpoint's, "
            f"by {places[other].at / places[other].error:.0f} standard errors of its noise",
            where=f"{server.url}, {policy}",
            fix=_HAND_OVER,
        )
    if not read <= limit:
        raise SetupError(
            f"the server serves another policy than the checkpoint: their log-probs differ by up to {read:.3g}, allowed are {limit:g}",
            where=f"{server.url}, {policy}",
            fix=f"{_HAND_OVER}; if it computes in another type than dtype says, set that",
        )
    if after <= limit:
        nearest = min(places.items(), key=lambda item: item[1].margin, default=None)
        return Proof(max(read, after), nearest)
    if plain <= limit:
        raise SetupError(
            f"the server gives log-probs at temperature 1 for tokens that are sampled at temperature {sampling.temperature:g}, "
            f"top_p {sampling.top_p:g}: they differ by up to {after:.3g}",
            where=server.url,
            fix="start it with --logprobs-mode processed_logprobs",
        )
    raise SetupError(
        f"the server samples from another distribution than softmax(logits / {sampling.temperature:g}): "
        f"log-probs differ by up to {after:.3g}, allowed are {limit:g}",
        where=server.url,
        fix="start it with --logprobs-mode processed_logprobs and without settings that change the logits",
    )


def _places(found: Sequence[np.ndarray], fixed: Sequence[Fixed]) -> dict[Path, Place]:
    ours = [one.logprobs for one in fixed]
    return {other: place(found, ours, [one.others[other] for one in fixed]) for other in fixed[0].others}


def _apart(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Sum of squared differences."""
    return float(np.square(np.concatenate(found) - np.concatenate(expected)).sum())


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    """NaN where one of them is."""
    return float(np.abs(found - np.maximum(expected, NEVER)).max())


def _of_prompt(choice: Mapping[str, Any], ids: Sequence[int], where: str) -> np.ndarray:
    given: Any = choice.get("prompt_logprobs")
    try:
        values = [given[index][str(token)]["logprob"] for index, token in enumerate(ids) if index > 0]
        return np.array(values, dtype=float)
    except (KeyError, IndexError, TypeError, ValueError):
        raise _unproven("no log-probs of the tokens of a prompt (prompt_logprobs)", where) from None


def _of_next(choice: Mapping[str, Any], vocabulary: int, where: str) -> tuple[list[int], np.ndarray]:
    """Ids and log-probs of the likeliest tokens and the sampled one."""
    try:
        top = choice["logprobs"]["top_logprobs"][0]
        ids = [int(name.removeprefix("token_id:")) for name in top]
        if not ids or not all(0 <= token < vocabulary for token in ids):
            raise ValueError
        return ids, np.array(list(top.values()), dtype=float)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise _unproven("no log-probs by token id of the next token (return_tokens_as_token_ids)", where) from None


def _unproven(what: str, where: str) -> DataError:
    return DataError(
        f"which policy the server serves cannot be seen: it gave {what}",
        where=where,
        fix="ask a server of vLLM 0.10.2 or later",
    )
