"""Low-rank adapters: a linear layer W of the base becomes W + (alpha / rank) B A, and A and B alone are trained.

The base is the warm start in every round; A and B go from round to round beside the optimizer's state. The policy that is written has them
merged, so that samplers load it as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from papo.engines.training.batches import MicroBatch
from papo.engines.training.forward import PolicyLoss, Tokens
from papo.engines.training.projection import Projected
from papo.errors import CheckpointError, ParamsError, SetupError
from papo.params import LoraParams
from papo.store.files import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"
TARGETS = "train.lora.targets"


def check_start(policy: Path, base: Path) -> None:
    """For a run's first round: adapters that are not there yet make the base and nothing else.

    Raises:
        CheckpointError: the policy that sampled is another.
    """
    if digest(policy) != digest(base):
        raise CheckpointError(
            f"there are no adapters yet, and the policy {digest(policy)[:12]} is not the base {digest(base)[:12]} that they are laid over",
            where=str(policy),
            fix=f"begin with the policy {base}, or hand in the state of the round that made this one",
        )


def lay(model: PreTrainedModel, params: LoraParams, *, seed: int) -> None:
    """Lays fresh adapters over `model`, in place, and freezes all else: B is zero, A is drawn by `seed`, the same on every device.

    Raises:
        SetupError: peft is not installed.
        ParamsError: `targets` names what is no linear layer of this model.
    """
    targets = _targets(model, params.targets)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise SetupError(
            "peft is not installed", where="train.lora", fix='pip install "papo[lora]", or set it to null'
        ) from None
    of_conv = isinstance(model.get_submodule(targets[0]), _linear_classes()[1])
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=of_conv,
    )
    inject_adapter_in_model(config, model, NAME)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in _layers(model):
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            a.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape), a=5**0.5, generator=stream))
            b.zero_()


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Adds the adapters to the layers that they lie over and takes them off, in place: what is left is a model as any other."""
    for name, layer in _layers(model):
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())


class Base:
    """What the adapters lie over, called as the policy is: the reference of the KL penalty, without a second copy of the weights."""

    def __init__(self, module: PolicyLoss) -> None:
        self._module = module

    @torch.no_grad()
    def __call__(self, batch: MicroBatch, tokens: Tokens, objective: None) -> Projected:
        with _taken_off(self._module.model):
            found: Projected = self._module(batch, tokens, None)
        return found


@contextmanager
def _taken_off(model: PreTrainedModel) -> Iterator[None]:
    training, layers = model.training, [layer for _, layer in _layers(model)]
    model.eval()
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
        model.train(training)


def _layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _linear_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's form of a linear layer

    return nn.Linear, Conv1D


def _targets(model: PreTrainedModel, wanted: list[str] | str) -> list[str]:
    """Full names of the layers that `wanted` means; the projection to the vocabulary stays as it is."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _linear_classes()) and module is not head
    ]  # fmt: skip
    ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
    if isinstance(wanted, str):
        if not linear:
            raise ParamsError(
                f"{type(model).__name__} has no linear layers that adapters could be laid over",
                where=TARGETS,
                fix="set train.lora to null",
            )
        return linear
    if not wanted:
        raise ParamsError("no module is named", where=TARGETS, fix=f"name some of {ends}, or set it to all-linear")
    found = [name for name in linear if any(_ends_with(name, end) for end in wanted)]
    for end in wanted:
        meant = [name for name, _ in model.named_modules() if _ends_with(name, end)]
        if not meant or not set(meant) <= set(found):
            raise ParamsError(
                f"{end!r} is no linear layer of {type(model).__name__} that adapters can be laid over",
                where=TARGETS,
                fix=f"name some of {ends}, or set it to all-linear",
            )
    return found


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
