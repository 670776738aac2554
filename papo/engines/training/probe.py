"""What a model can do, found by trying it on a few tokens: what a class promises in its config is not the same everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from papo.engines.protocols import TrainRow
from papo.engines.training.batches import Item, MicroBatch
from papo.engines.training.forward import PolicyLoss, tokens_of
from papo.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Able(NamedTuple):
    """`scale`: logits are that times the projection of the last states. `shares`: completions can go on from the keys and values of their
    prompt. `packs`: rows in one sequence are told apart by positions; `packs_without_mask`: and for that no dense mask is made."""

    scale: float
    shares: bool
    packs: bool
    packs_without_mask: bool
    attention: str


@torch.no_grad()
def probe(model: PreTrainedModel) -> Able:
    """Tries a model, which is left as it was.

    Raises:
        CheckpointError: its logits are no multiple of the projection of its last states, so that their chunks cannot be computed alone.
    """
    training = model.training
    model.eval()
    try:
        scale = _scale(model)
        # Positions from 1 on: id 0 may be padding, which some models mask on their own.
        first, second = TrainRow([1, 2, 3], [4, 5, 6], [0.0] * 3, 1.0), TrainRow([1, 2, 3], [5, 4], [0.0] * 2, 1.0)
        attention = str(model.config._attn_implementation)
        plain = _logprobs(model, (first, second), shared=False, packed=False)
        shares = attention == "sdpa" and _close(plain, model, (first, second), shared=True, packed=False)
        packs = _close(plain, model, (first, second), shared=False, packed=True)
    finally:
        model.train(training)
    return Able(scale, shares, packs, packs and "flash" in attention, attention)


def _scale(model: PreTrainedModel) -> float:
    ids = torch.tensor([[1, 2, 3, 4]], device=model.device)
    head = model.get_output_embeddings()
    projected = head(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state).float()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    scale = (logits * projected).sum() / projected.square().sum()
    if not torch.allclose(logits, scale * projected, rtol=1e-2, atol=1e-3 * float(logits.abs().max())):
        raise CheckpointError(
            "the logits of this model are no multiple of the projection of its last states (it may cap them)",
            where=f"{type(model).__name__}",
            fix="train another model",
        )
    # A model without a scale of its own is not to get one from rounding.
    return 1.0 if abs(float(scale) - 1.0) < 1e-3 else float(scale)


def _logprobs(model: PreTrainedModel, rows: tuple[TrainRow, ...], *, shared: bool, packed: bool) -> torch.Tensor:
    items = tuple(Item(place, row, 1.0) for place, row in enumerate(rows))
    batch = MicroBatch(items, shared, 0, 0)
    module = PolicyLoss(model, temperature=1.0, logits_mb=None, packed=packed)
    logprobs: torch.Tensor = module(batch, tokens_of(batch, model.device), None).logprobs
    return logprobs


def _close(
    plain: torch.Tensor, model: PreTrainedModel, rows: tuple[TrainRow, ...], *, shared: bool, packed: bool
) -> bool:
    try:
        found = _logprobs(model, rows, shared=shared, packed=packed)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False  # the class takes no cache, mask or positions of this form
    near = 0.1 if torch.is_autocast_enabled(model.device.type) else 1e-3  # nats
    return torch.allclose(plain, found, rtol=0.0, atol=near)
