"""Sampling with transformers, each row from a random stream of its own, in batches of rows of about one length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from papo.engines.policy import encode_prompt, load_policy
from papo.engines.protocols import Progress, Sample, SampleRequest
from papo.errors import CheckpointError, DataError, StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_ROWS = 512
MEMORY_SHARE = 0.25
LOGIT_BYTES = 24  # of a token of the vocabulary, for each row: logits, probabilities, and what lies between them
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class TransformersSampler:
    """The requests of one call, sorted by the length of their prompts, in static batches; a row that has ended leaves its batch.

    A row's token at step t is the smallest v with CDF(v) >= u_t, where CDF is that of softmax(logits / temperature) and
    u_1, u_2, ... come from a Philox stream keyed by the row's seed. Log-probs are those of the same distribution. On the batch they
    depend only by the rounding of arithmetic, and the same requests make the same batches, whatever their order: at most `batch_rows`
    rows each or, where that is None, the largest power of two up to 512 whose keys, values and logits fit into a quarter of the memory
    that the machine, its container or its GPU has (not: has free). Where memory runs out nevertheless, batches are halved, which
    `warn` is told of once.
    """

    name = "transformers"
    repeatable = True

    def __init__(
        self,
        policy: Path,
        *,
        temperature: float,
        top_p: float,
        max_prompt_tokens: int,
        max_new_tokens: int,
        batch_rows: int | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._max_prompt_tokens, self._max_new_tokens = max_prompt_tokens, max_new_tokens
        self._policy, self._batch_rows, self._warn = policy, batch_rows, warn
        self._most: int | None = None  # rows, since memory ran out
        self._sizes: list[int] = []  # of the batches so far
        self._halvings = 0

    @cached_property
    def _model(self) -> PreTrainedModel:
        from transformers import GenerationConfig

        model = self._loaded[0].eval()
        # A checkpoint's own settings (repetition_penalty, min_new_tokens, ...) would bend the distribution behind our back.
        model.generation_config = GenerationConfig()
        return model

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_policy(self._policy)

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers")}

    def metrics(self) -> dict[str, float]:
        """What the batches were so far: how many, rows of the largest, and how often memory ran out."""
        return {
            "batches": float(len(self._sizes)),
            "batch_rows": float(max(self._sizes, default=0)),
            "batch_halvings": float(self._halvings),
        }

    def close(self) -> None:
        """Its model goes with it."""

    def fits(self, prompt: str) -> str | None:
        """Why `sample` would refuse the prompt; None if it would not."""
        unfit = self._unfit(encode_prompt(self._tokenizer, prompt))
        return unfit[0] if unfit else None

    def check(self) -> None:
        """Its libraries are papo's own."""

    def sample_shards(
        self, shards: Sequence[Sequence[SampleRequest]], progress: Progress
    ) -> Iterator[tuple[int, list[Sample]]]:
        """One after the other: the batches of a shard are its own, whichever others are missing."""
        for number, shard in enumerate(shards):
            yield number, self.sample(shard, progress)

    def sample(self, requests: Sequence[SampleRequest], progress: Progress) -> list[Sample]:
        encoded = {prompt: self._encode(prompt) for prompt in dict.fromkeys(request.prompt for request in requests)}
        prompts = [encoded[request.prompt] for request in requests]
        found: dict[int, Sample] = {}
        # Long prompts first, so that memory runs out at once or never; equal ones side by side.
        rows = sorted(range(len(requests)), key=lambda row: (-len(prompts[row]), prompts[row], requests[row].seed))
        while rows:
            batch = rows[: self._rows(len(prompts[rows[0]]))]
            try:
                self._sample_batch(batch, prompts, requests, found, progress)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                self._halve(len(batch))
            else:
                self._sizes.append(len(batch))
            rows = [row for row in rows if row not in found]
        return [found[row] for row in range(len(requests))]

    def _sample_batch(
        self,
        batch: Sequence[int],
        prompts: Sequence[list[int]],
        requests: Sequence[SampleRequest],
        found: dict[int, Sample],
        progress: Progress,
    ) -> None:
        """Puts the samples of the rows `batch` into `found`, each as it ends: an error leaves there what was done before it."""
        import torch

        from papo.engines.samplers.decoding import decode, generate, has_plain_cache

        def ended(number: int, ids: list[int], logprobs: list[float]) -> None:
            row = batch[number]
            found[row] = self._sample(prompts[row], ids, logprobs)
            progress(1)

        with torch.inference_mode():
            (decode if has_plain_cache(self._model) else generate)(
                self._model,
                [prompts[row] for row in batch],
                self._uniforms([requests[row] for row in batch]),
                temperature=self._temperature,
                top_p=self._top_p,
                eos=self._tokenizer.eos_token_id,
                pad_token=self._tokenizer.pad_token_id,
                ended=ended,
            )

    def _rows(self, prompt_tokens: int) -> int:
        """Rows of a batch whose longest prompt has so many tokens."""
        rows = self._batch_rows
        if rows is None:
            config = self._model.config.get_text_config()
            row = _cache_bytes(config, self._model.dtype.itemsize) * (prompt_tokens + self._max_new_tokens)
            row += LOGIT_BYTES * config.vocab_size
            fitting = int(MEMORY_SHARE * memory_bytes(self._model.device)) // row
            # Machines of about the same memory make the same batches.
            rows = 2 ** int(math.log2(min(MOST_ROWS, max(fitting, 1))))
        return rows if self._most is None else min(rows, self._most)

    def _halve(self, rows: int) -> None:
        if rows == 1:
            raise StageError(
                "the memory does not suffice to sample one row",
                where=str(self._policy),
                fix="lower max_new_tokens of the stage, or give the process more memory",
            )
        if not self._halvings:
            self._warn(
                f"out of memory with {rows} rows at a time: sampling goes on with half as many, and again if need be; other batches "
                "change log-probs by rounding, batch_rows of the sampler keeps them the same"
            )
        self._halvings += 1
        self._most = rows // 2

    def _encode(self, prompt: str) -> list[int]:
        ids = encode_prompt(self._tokenizer, prompt)
        if unfit := self._unfit(ids):
            raise DataError(unfit[0], where=f"prompt {prompt[:60]!r}", fix=unfit[1])
        return ids

    def _unfit(self, ids: list[int]) -> tuple[str, str] | None:
        """Why a prompt of these ids cannot be sampled from, and what to do."""
        if not 0 < len(ids) <= self._max_prompt_tokens:
            return (
                f"a prompt has {len(ids)} tokens, allowed are 1 to {self._max_prompt_tokens}",
                "raise rollout.max_prompt_tokens or drop the problem in prepare",
            )
        # Beyond its positions a policy crashes or, with rotary embeddings, goes on as it was never trained to.
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and len(ids) + self._max_new_tokens > positions:
            return (
                f"a prompt of {len(ids)} tokens and {self._max_new_tokens} new ones do not fit into the {positions} "
                "positions of the policy",
                "lower max_new_tokens of the stage, or leave the problem out",
            )
        return None

    def _uniforms(self, requests: Sequence[SampleRequest]) -> torch.Tensor:
        import torch

        streams = (np.random.Generator(np.random.Philox(key=request.seed)) for request in requests)
        rows = np.stack([stream.random(self._max_new_tokens) for stream in streams])
        return torch.from_numpy(rows).to(self._model.device)

    def _sample(self, prompt: list[int], completion: list[int], logprobs: list[float]) -> Sample:
        eos = self._tokenizer.eos_token_id
        stopped = eos in completion
        length = completion.index(eos) + 1 if stopped else len(completion)
        if not all(map(math.isfinite, logprobs[:length])):
            raise CheckpointError(
                "the policy gives log-probs that are no finite numbers",
                where=str(self._policy),
                fix="go on from an earlier policy, with a lower train.learning_rate",
            )
        text = completion[: length - 1] if stopped else completion
        return Sample(
            prompt_ids=prompt,
            completion_ids=completion[:length],
            completion=self._tokenizer.decode(text, skip_special_tokens=False),
            logprobs=logprobs[:length],
            finish_reason="stop" if stopped else "length",
        )


def memory_bytes(device: torch.device) -> int:
    """All memory of the GPU; without one, of this machine or of the container that the process is in."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    limits = [path.read_text().strip() for path in map(Path, CGROUP_LIMITS) if path.is_file()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])


def _cache_bytes(config: object, itemsize: int) -> int:
    """Of the keys and values of one token."""
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return 2 * getattr(config, "num_hidden_layers", 1) * kept * width * itemsize


def _out_of_memory(error: Exception) -> bool:
    """torch has a class of its own for a GPU only; the allocator of the CPU says it in words."""
    import torch

    words = ("not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
