"""Sampling with transformers' `generate`, each row from a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from papo.engines.policy import encode_prompt, load_policy
from papo.engines.protocols import Progress, Sample, SampleRequest
from papo.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


class TransformersSampler:
    """All requests of one call are one batch; the result depends on the batch only by the rounding of its arithmetic.

    A row's token at step t is the smallest v with CDF(v) >= u_t, where CDF is that of softmax(logits / temperature) and
    u_1, u_2, ... come from a Philox stream keyed by the row's seed. Log-probs are those of the same distribution.
    """

    def __init__(
        self, policy: Path, *, temperature: float, top_p: float, max_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._max_prompt_tokens, self._max_new_tokens = max_prompt_tokens, max_new_tokens
        self._policy = policy

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

    def sample(self, requests: Sequence[SampleRequest], progress: Progress) -> list[Sample]:
        if not requests:
            return []
        import torch
        from transformers import LogitsProcessorList

        prompts = [self._encode(request.prompt) for request in requests]
        ids, mask = self._left_padded(prompts)
        draw = _row_processor(self._uniforms(requests), self._temperature, self._top_p)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([draw]),
                do_sample=False,
                max_new_tokens=self._max_new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
                eos_token_id=self._tokenizer.eos_token_id,
            )
        completions = output[:, ids.shape[1] :].tolist()
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()
        samples = [self._sample(*row) for row in zip(prompts, completions, logprobs, strict=True)]
        progress(len(samples))
        return samples

    def _encode(self, prompt: str) -> list[int]:
        ids = encode_prompt(self._tokenizer, prompt)
        if not 0 < len(ids) <= self._max_prompt_tokens:
            raise DataError(
                f"a prompt has {len(ids)} tokens, allowed are 1 to {self._max_prompt_tokens}",
                where=f"prompt {prompt[:60]!r}",
                fix="raise rollout.max_prompt_tokens or drop the problem in prepare",
            )
        # Beyond its positions a policy crashes or, with rotary embeddings, goes on as it was never trained to.
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and len(ids) + self._max_new_tokens > positions:
            raise DataError(
                f"a prompt of {len(ids)} tokens and {self._max_new_tokens} new ones do not fit into the {positions} "
                "positions of the policy",
                where=f"prompt {prompt[:60]!r}",
                fix="lower max_new_tokens of the stage, or leave the problem out",
            )
        return ids

    def _left_padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self._tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self._model.device), mask.to(self._model.device)

    def _uniforms(self, requests: Sequence[SampleRequest]) -> torch.Tensor:
        import torch

        streams = (np.random.Generator(np.random.Philox(key=request.seed)) for request in requests)
        rows = np.stack([stream.random(self._max_new_tokens) for stream in streams])
        return torch.from_numpy(rows).to(self._model.device)

    def _sample(self, prompt: list[int], completion: list[int], logprobs: list[float]) -> Sample:
        eos = self._tokenizer.eos_token_id
        stopped = eos in completion
        length = completion.index(eos) + 1 if stopped else len(completion)
        text = completion[: length - 1] if stopped else completion
        return Sample(
            prompt_ids=prompt,
            completion_ids=completion[:length],
            completion=self._tokenizer.decode(text, skip_special_tokens=False),
            logprobs=logprobs[:length],
            finish_reason="stop" if stopped else "length",
        )


def _row_processor(uniforms: torch.Tensor, temperature: float, top_p: float) -> LogitsProcessor:
    """A processor that draws each row's token itself and leaves `generate` no other choice."""
    import torch
    from transformers import LogitsProcessor

    class RowProcessor(LogitsProcessor):  # type: ignore[misc]  # transformers' base class is untyped
        def __init__(self) -> None:
            self.logprobs: list[torch.Tensor] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if temperature == 0.0:
                chosen = scores.argmax(-1, keepdim=True)
                logprobs = torch.log_softmax(scores.float(), -1)
            else:
                logprobs = torch.log_softmax(scores.float() / temperature, -1)
                if top_p < 1.0:
                    logprobs = _nucleus(logprobs, top_p)
                cumulative = logprobs.double().exp().cumsum(-1)
                step = uniforms[:, len(self.logprobs), None] * cumulative[:, -1:]
                chosen = torch.searchsorted(cumulative, step, right=False).clamp(max=scores.shape[-1] - 1)
            self.logprobs.append(logprobs.gather(-1, chosen).squeeze(-1))
            return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)

    return RowProcessor()


def _nucleus(logprobs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probs of the smallest set of tokens whose probability reaches `top_p`, renormalised."""
    import torch

    ordered, index = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, index, before < top_p)
    return torch.log_softmax(logprobs.masked_fill(~kept, -torch.inf), -1)
