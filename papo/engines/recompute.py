"""Log-probs of stored completions, computed anew by the model that training goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from papo.engines.policy import load_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyRecomputer:
    """Implements `Recomputer` by the policy in a folder: log softmax(logits / temperature) of each token, in float32.

    On the GPU if it has room for the model twice over, as a server may hold its memory; else on the CPU.
    """

    def __init__(self, policy: Path, *, temperature: float) -> None:
        self._policy, self._temperature = policy, temperature

    @cached_property
    def _model(self) -> PreTrainedModel:
        import torch

        # In float32 weights take up to twice what they take on disk.
        need = 4 * sum(path.stat().st_size for path in self._policy.glob("*.safetensors"))
        room = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > need
        return load_policy(self._policy, device="cuda" if room else "cpu")[0].eval()

    def logprobs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """One completion at a time: there are few of them."""
        import torch

        found = []
        with torch.inference_mode():
            for prompt, completion in pairs:
                ids = torch.tensor([[*prompt, *completion]], device=self._model.device)
                count = len(completion)
                logits = self._model(ids, logits_to_keep=count + 1).logits[0, :-1].float() / self._temperature
                taken = logits.log_softmax(-1).gather(1, ids[0, -count:, None])
                found.append([float(value) for value in taken[:, 0]])
        return found
