"""Log-probs of stored completions, computed anew by the model that training goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from papo.engines.policy import load_policy
from papo.engines.protocols import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyRecomputer:
    """Implements `Recomputer` by the policy in a folder: log softmax(logits / temperature) of each token, in float32.

    Args:
        device: None: the GPU where there is one; a server or an engine may have its memory.
    """

    def __init__(self, policy: Path, *, temperature: float, device: str | None = None) -> None:
        self._policy, self._temperature, self._device = policy, temperature, device

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_policy(self._policy, device=self._device)[0].eval()

    def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """One sample at a time: there are few of them, and memory is for those who sample."""
        import torch

        found = []
        with torch.inference_mode():
            for sample in samples:
                ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]], device=self._model.device)
                count = len(sample.completion_ids)
                logits = self._model(ids, logits_to_keep=count + 1).logits[0, :-1].float() / self._temperature
                taken = logits.log_softmax(-1).gather(1, ids[0, -count:, None])
                found.append([float(value) for value in taken[:, 0]])
        return found
