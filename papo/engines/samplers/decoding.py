"""Decoding of one static batch with transformers: equal prompts are computed once, and rows that ended leave the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

Ended = Callable[[int, list[int], list[float]], None]
"""Called once a row: its number in the batch, its token ids and their log-probs; what follows the end-of-text token is void."""

BLOCK = 256  # tokens whose probabilities are added up before it is known which of them is drawn
ENDED_SHARE = 1 / 8  # of the rows of a batch that may have ended and are still computed
ROOM = 64  # tokens that a cache takes before it is copied into a larger one


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: torch.Tensor,
    *,
    temperature: float,
    top_p: float,
    eos: int,
    pad_token: int,
    ended: Ended,
) -> None:
    """Samples a completion for each of `prompts`, row t of `uniforms` (rows, new tokens) deciding the tokens of row t.

    The model has to be one that `has_plain_cache`.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    number = {prompt: index for index, prompt in enumerate(distinct)}
    ids, mask = left_padded(distinct, pad_token, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() for _ in cache.layers]

    def logits(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        found: torch.Tensor = output.logits[:, -1]
        return found

    copies = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=model.device)
    scores = logits(ids, mask, positions)[copies]
    cache.batch_select_indices(copies)
    width, steps = mask.shape[1], uniforms.shape[1]
    mask, positions = pad(mask[copies], (0, steps), value=1), positions[copies, -1:]
    rows = torch.arange(len(prompts), device=model.device)
    tokens = torch.empty(uniforms.shape, dtype=torch.long, device=model.device)
    logprobs = torch.empty(uniforms.shape, device=model.device)
    over = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(steps):
        tokens[:, step], logprobs[:, step] = draw(scores, uniforms[:, step], temperature, top_p)
        over |= tokens[:, step] == eos
        if step + 1 == steps:
            over[:] = True
        if (count := int(over.sum())) and count >= ENDED_SHARE * len(over):
            leaving = (part[over].tolist() for part in (rows, tokens[:, : step + 1], logprobs[:, : step + 1]))
            for row in zip(*leaving, strict=True):
                ended(*row)
            if count == len(over):
                return
            stay = (~over).nonzero().squeeze(-1)
            rows, uniforms, tokens, logprobs, mask, positions, over = (
                part[stay] for part in (rows, uniforms, tokens, logprobs, mask, positions, over)
            )
            cache.batch_select_indices(stay)
        positions = positions + 1
        scores = logits(tokens[:, step : step + 1], mask[:, : width + step + 1], positions)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: torch.Tensor,
    *,
    temperature: float,
    top_p: float,
    eos: int,
    pad_token: int,
    ended: Ended,
) -> None:
    """As `decode`, by one call of transformers' `generate`: for any model, every row computed until the last has ended."""
    ids, mask = left_padded(prompts, pad_token, model.device)
    draws = _DrawEachRow(uniforms, temperature, top_p)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([draws]),
        do_sample=False,
        max_new_tokens=uniforms.shape[1],
        pad_token_id=pad_token,
        eos_token_id=eos,
    )
    logprobs = torch.stack(draws.logprobs, dim=1).tolist()
    for row, completion in enumerate(output[:, ids.shape[1] :].tolist()):
        ended(row, completion, logprobs[row])


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether `decode` does for this model what `generate` does: keys and values of all tokens, and no preparation of its own."""
    taken = inspect.signature(model.forward).parameters
    return (
        {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"} <= set(taken)
        and type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    )


def left_padded(
    prompts: Sequence[Sequence[int]], pad_token: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row of logits (rows, vocabulary), and its log-prob in the distribution that it was drawn from."""
    scores = logits.float()
    if temperature == 0.0:
        chosen = scores.argmax(-1, keepdim=True)
        return chosen.squeeze(-1), torch.log_softmax(scores, -1).gather(-1, chosen).squeeze(-1)
    if temperature != 1.0:
        scores = scores / temperature
    if top_p < 1.0:
        scores = _nucleus(torch.log_softmax(scores, -1), top_p)
    probabilities = torch.softmax(scores, -1)
    chosen = _smallest_above(probabilities, uniforms)
    return chosen, probabilities.gather(-1, chosen[:, None]).log().squeeze(-1)


def _smallest_above(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """(rows,) the smallest v with CDF(v) >= u, never one of probability 0; sums over blocks of the vocabulary, then within one."""
    rows, size = probabilities.shape
    width = min(size, BLOCK)
    blocks = pad(probabilities, (0, -size % width)).view(rows, -1, width)
    upto = blocks.sum(-1).double().cumsum(-1)
    wanted = (uniforms * upto[:, -1]).clamp(min=torch.finfo(torch.double).tiny)[:, None]
    block = torch.searchsorted(upto, wanted).clamp(max=upto.shape[1] - 1)
    before = pad(upto, (1, 0)).gather(-1, block)
    within = blocks[torch.arange(rows, device=block.device), block.squeeze(-1)].double().cumsum(-1)
    # The rounding of the two sums may differ: what is wanted is to lie in the block.
    place = torch.searchsorted(within, torch.minimum(wanted - before, within[:, -1:]))
    return (block * width + place).squeeze(-1).clamp(max=size - 1)  # where probabilities are NaN, any token is as good


def _nucleus(logprobs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probs of the smallest set of tokens whose probability reaches `top_p`, not yet renormalised; of the others, minus infinity."""
    ordered, index = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, index, before < top_p)
    return logprobs.masked_fill(~kept, -torch.inf)


class _DrawEachRow(LogitsProcessor):  # type: ignore[misc]  # transformers' base class is untyped
    """Draws each row's token itself and leaves `generate` no other choice."""

    def __init__(self, uniforms: torch.Tensor, temperature: float, top_p: float) -> None:
        self.logprobs: list[torch.Tensor] = []
        self._uniforms, self._temperature, self._top_p = uniforms, temperature, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = self._uniforms[:, len(self.logprobs)]
        chosen, logprobs = draw(scores, step, self._temperature, self._top_p)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers' base class is untyped
    """Keys and values of one layer with room for more tokens, so that not all of them are copied at each one."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        end = start + keys.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._rooms = [keys[:, :, :0], values[:, :, :0]]
        for place, new in enumerate((keys, values)):
            room = self._rooms[place]
            if end > room.shape[-2]:
                room = new.new_empty((*new.shape[:2], end + ROOM, new.shape[3]))
                room[:, :, :start] = self._rooms[place][:, :, :start]
                self._rooms[place] = room
            room[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rooms = [room[indices] for room in self._rooms]
        self._show(self.get_seq_length())

    def _show(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)
