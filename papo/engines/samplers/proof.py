"""Proof that a server serves the policy in a folder, and gives the log-probs that training needs.

Fixed token sequences are put to the server and to transformers, and their log-probs compared: those of the sequence itself, which only the
policy decides, and those of the five likeliest tokens after it, which are of softmax(logits / temperature) only if the server runs with
--logprobs-mode processed_logprobs. Two policies count as one where they differ by less than the limit on all of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from papo.engines.policy import encode_prompt
from papo.engines.samplers.completions import Endpoint, Sampling, only_choice
from papo.engines.samplers.rows import NEVER
from papo.errors import DataError, SetupError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIMITS = {"float32": 1e-4, "bfloat16": 1.0, "float16": 0.125}
"""Largest difference of a log-prob, by what a server computes in; the policy is read in float32 in any case.

SmolLM2-135M on vLLM 0.32.0 was 5e-5 away in float32 and 0.57 in bfloat16, the embedded policy 0.05 in bfloat16; float16 has three bits
more. So in float32 a policy is told from that of a step before, in 16 bits only from one that has nothing to do with it.
"""

TOP = 5
_TEXTS = ("3+5-2=?\n", "12-7+8=?\n3+4=", "9-9=?\n0\n1+2+3+4=?\n")
_RANDOM, _LENGTH = 5, 24


@dataclass(frozen=True)
class Fixed:
    """A sequence, the log-prob of each of its tokens but the first, and of every token after it: as sampled, and at temperature 1."""

    ids: list[int]
    logprobs: np.ndarray
    sampled: np.ndarray
    plain: np.ndarray


def compute_fixed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, temperature: float, top_p: float, room: int
) -> list[Fixed]:
    """The sequences with what transformers says of them; none is longer than `room` tokens."""
    import torch

    fixed = []
    with torch.inference_mode():
        for ids in _sequences(tokenizer, room):
            logits = model(torch.tensor([ids], device=model.device)).logits[0].double()
            everyone = logits.log_softmax(-1).cpu().numpy()
            read = everyone[np.arange(len(ids) - 1), ids[1:]]
            sampled = everyone[-1]
            if temperature > 0.0:  # at 0 the likeliest token is taken, and its log-prob is that at temperature 1
                sampled = _nucleus((logits[-1] / temperature).log_softmax(-1).cpu().numpy(), top_p)
            fixed.append(Fixed(ids, read, sampled, everyone[-1]))
    return fixed


def _sequences(tokenizer: PreTrainedTokenizerBase, room: int) -> list[list[int]]:
    """A few texts, and token ids at random, which touch more of a policy than any text does."""
    stream = np.random.Generator(np.random.Philox(key=2024))
    texts = [encode_prompt(tokenizer, text) for text in _TEXTS]
    drawn = [stream.integers(0, len(tokenizer), _LENGTH).tolist() for _ in range(_RANDOM)]
    return [ids[: min(room, 4 * _LENGTH)] for ids in (*texts, *drawn) if len(ids) > 1]


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


async def prove(server: Endpoint, fixed: Sequence[Fixed], sampling: Sampling, limit: float, policy: Path) -> float:
    """The largest difference of a log-prob.

    Raises:
        SetupError: the server serves another policy, or its log-probs are of another distribution than that which is sampled.
        NoAnswerError: it does not answer.
    """
    if not fixed:
        raise SetupError(
            "the context of the server has no room for a proof of what it serves",
            where=server.url,
            fix=f"start it with --max-model-len {_LENGTH + 1} or more",
        )
    extra = {"max_tokens": 1, "prompt_logprobs": 0, "logprobs": TOP}
    bodies = [sampling.body(server.model, one.ids, 0) | extra for one in fixed]
    read, after, plain = 0.0, 0.0, 0.0
    for one, reply in zip(fixed, await asyncio.gather(*map(server.complete, bodies)), strict=True):
        choice = only_choice(reply, server.url)
        read = max(read, _largest(_of_prompt(choice, one.ids, server.url), one.logprobs))
        ids, values = _of_next(choice, len(one.sampled), server.url)
        after = max(after, _largest(values, one.sampled[ids]))
        plain = max(plain, _largest(values, one.plain[ids]))
    if not read <= limit:
        raise SetupError(
            f"the server serves another policy than the checkpoint: their log-probs differ by up to {read:.3g}, allowed are {limit:g}",
            where=f"{server.url}, {policy}",
            fix="have the server load that folder (start it anew, or set reload); if it computes in another type than dtype says, set that",
        )
    if after <= limit:
        return max(read, after)
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
