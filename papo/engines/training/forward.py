"""From the rows of a micro-batch to the hidden states of their completions, by one of three layouts.

padded   each row is prompt and completion, padded on the right. Attention is causal, so what is real never sees the padding and no mask
         is needed.
shared   each prompt once; its keys and values, gradient included, are what the completions of all its rows attend to.
packed   one row after another in a single sequence, told apart by positions that start anew; for attention that takes that without a
         dense mask, such as flash_attention_2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from papo.engines.protocols import TrainRow
from papo.engines.training.batches import MicroBatch
from papo.engines.training.projection import Objective, Projected, Projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Tokens:
    """The N completion tokens of a micro-batch, row by row: ids, the row that each belongs to, and what stands stored beside each."""

    ids: torch.Tensor
    rows: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor


def tokens_of(batch: MicroBatch, device: torch.device) -> Tokens:
    """What is stored of a micro-batch, as flat tensors."""
    lengths = torch.tensor([item.completion for item in batch.items])
    rows = torch.repeat_interleave(torch.arange(len(batch.items)), lengths)

    def flat(values: list[Sequence[float]]) -> torch.Tensor:
        return torch.tensor([value for row in values for value in row], dtype=torch.float32)

    stored = [item.row for item in batch.items]
    return Tokens(
        torch.tensor([token for row in stored for token in row.completion_ids], dtype=torch.long).to(device),
        rows.to(device),
        flat([row.logprobs for row in stored]).to(device),
        flat([row.token_advantages or [row.advantage] * len(row.completion_ids) for row in stored]).to(device),
        torch.tensor([item.weight for item in batch.items], dtype=torch.float32)[rows].to(device),
    )


class PolicyLoss(nn.Module):
    """A causal language model whose forward pass gives the loss of a micro-batch instead of logits.

    All that needs the model's weights happens within one call of it, as sharded training gathers them for a call.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, logits_mb: int | None, packed: bool) -> None:
        super().__init__()
        self.model = model
        self.packed, self._temperature, self._logits_mb = packed, temperature, logits_mb

    def forward(self, batch: MicroBatch, tokens: Tokens, objective: Objective | None) -> Projected:
        """Loss, log-probs and entropies of the completion tokens; without `objective` the log-probs alone."""
        states = self._states(batch, tokens.ids.device)
        head = self.model.get_output_embeddings()
        projection = Projection(head.weight, getattr(head, "bias", None), self._temperature, self._logits_mb)
        if objective is None:
            logprobs = projection.logprobs(states, tokens.ids)
            return Projected(logprobs.new_zeros(()), logprobs, torch.zeros_like(logprobs))
        return projection.loss(states, tokens.ids, objective)

    def _states(self, batch: MicroBatch, device: torch.device) -> torch.Tensor:
        """(N, d) the state from which each completion token is predicted."""
        rows = [item.row for item in batch.items]
        if batch.shared:
            return self._shared(rows, device)
        return self._one_sequence(rows, device) if self.packed else self._padded(rows, device)

    def _padded(self, rows: Sequence[TrainRow], device: torch.device) -> torch.Tensor:
        sequences = [[*row.prompt_ids, *row.completion_ids[:-1]] for row in rows]
        states = self._backbone(input_ids=_right_padded(sequences, device))
        wanted = [
            (index, len(row.prompt_ids) - 1 + at)
            for index, row in enumerate(rows)
            for at in range(len(row.completion_ids))
        ]
        return _at(states, wanted)

    def _one_sequence(self, rows: Sequence[TrainRow], device: torch.device) -> torch.Tensor:
        sequences = [[*row.prompt_ids, *row.completion_ids[:-1]] for row in rows]
        ids = torch.tensor([[token for sequence in sequences for token in sequence]], device=device)
        positions = torch.tensor([[at for sequence in sequences for at in range(len(sequence))]], device=device)
        states = self._backbone(input_ids=ids, position_ids=positions)
        wanted, start = [], 0
        for row, sequence in zip(rows, sequences, strict=True):
            wanted += [(0, start + len(row.prompt_ids) - 1 + at) for at in range(len(row.completion_ids))]
            start += len(sequence)
        return _at(states, wanted)

    def _shared(self, rows: Sequence[TrainRow], device: torch.device) -> torch.Tensor:
        from transformers import DynamicCache

        prompts = list(dict.fromkeys(tuple(row.prompt_ids) for row in rows))
        of_row = [prompts.index(tuple(row.prompt_ids)) for row in rows]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        cache = DynamicCache()
        first = self._backbone(input_ids=_right_padded(prompts, device), past_key_values=cache, use_cache=True)
        last_of_prompt = first[torch.arange(len(prompts), device=device), lengths - 1]
        before = first.shape[1]
        index = torch.tensor(of_row, device=device)
        completions = [row.completion_ids[:-1] for row in rows]
        longest = max(map(len, completions))
        wanted = [(row, at) for row, completion in enumerate(completions) for at in range(-1, len(completion))]
        opening = last_of_prompt[index][:, None]
        if longest == 0:
            return opening[:, 0]
        keys = DynamicCache()
        for layer, stored in enumerate(cache.layers):
            keys.update(stored.keys[index], stored.values[index], layer)
        seen = torch.arange(before, device=device)[None, :] < lengths[index][:, None]
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        mask = torch.cat([seen[:, None, :].expand(-1, longest, -1), causal.expand(len(rows), -1, -1)], dim=2)[:, None]
        positions = lengths[index][:, None] + torch.arange(longest, device=device)
        states = self._backbone(
            input_ids=_right_padded(completions, device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=keys,
            use_cache=True,
        )
        return _at(torch.cat([opening, states], dim=1), [(row, at + 1) for row, at in wanted])

    def _backbone(self, **inputs: Any) -> torch.Tensor:
        states: torch.Tensor = self.model.get_decoder()(**{"use_cache": False} | inputs).last_hidden_state
        return states


def _right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], dtype=torch.long).to(
        device
    )


def _at(states: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(N, d) of (B, T, d): the states at the given rows and positions."""
    flat = torch.tensor([row * states.shape[1] + at for row, at in places], dtype=torch.long, device=states.device)
    return states.flatten(0, 1).index_select(0, flat)
