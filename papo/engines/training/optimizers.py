"""The optimizer of `train.optimizer`, and its state as tensors to store."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from papo.errors import SetupError
from papo.params import TrainParams

Tensors = dict[str, torch.Tensor]
PLAIN = 'pip install "papo[optimizer-8bit]", or set it to adamw'


def make_optimizer(parameters: Iterable[torch.nn.Parameter], params: TrainParams) -> torch.optim.Optimizer:
    """AdamW with its moments in float32, or in 8 bits by bitsandbytes, which keeps those of fewer than 4096 weights in float32.

    Raises:
        SetupError: bitsandbytes is not installed, or cannot compute on the device of the parameters.
    """
    rate, betas, decay = params.learning_rate, params.betas, params.weight_decay
    if params.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=True)
    parameters = list(parameters)
    make = _adamw_8bit(parameters[0].device)
    made: torch.optim.Optimizer = make(parameters, lr=rate, betas=betas, weight_decay=decay)
    return made


def _adamw_8bit(device: torch.device) -> Any:
    """The class, once it has made a step on the device: a build for another GPU says nothing until then."""
    # It warns of a kernel for 4-bit weights that it does not have.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    where = "train.optimizer = adamw_8bit"
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise SetupError("bitsandbytes is not installed", where=where, fix=PLAIN) from None
    tried = torch.nn.Parameter(torch.ones(4096, device=device))
    tried.grad = torch.ones_like(tried)
    try:
        AdamW8bit([tried], lr=1e-3).step()
    except (RuntimeError, ValueError, AttributeError) as error:
        raise SetupError(
            f"bitsandbytes cannot make a step on {device}: {next(iter(str(error).splitlines()), type(error).__name__)}",
            where=where,
            fix="install a build of it for this device (python -m bitsandbytes says what it finds), or set it to adamw",
        ) from error
    return AdamW8bit


def stored(optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]) -> Tensors:
    """The state as `<parameter>/<key>`, on the CPU. A plain whole number, as some count their steps in, is an int64 without dimensions."""
    return {
        f"{name}/{key}": _as_tensor(value, parameter)
        for name, parameter in named.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter], moments: Mapping[str, torch.Tensor]
) -> None:
    """Gives an optimizer the state that `stored` gave."""
    states: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in moments.items():
        name, _, part = key.rpartition("/")
        states[name][part] = value
    for name, parameter in named.items():
        optimizer.state[parameter] = {
            key: _as_stored(value, parameter.device) for key, value in states[name].items()
        }  # fmt: skip


def _as_tensor(value: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int64)
    tensor: torch.Tensor = value.detach().cpu().contiguous()
    # Several parameters may have one small table, and safetensors stores no memory twice.
    return tensor if tensor.shape == parameter.shape else tensor.clone()


def _as_stored(value: torch.Tensor, device: torch.device) -> Any:
    if value.dtype == torch.int64 and value.ndim == 0:
        return int(value)
    # AdamW counts its steps on the CPU unless it is fused, which wants the count beside the moments.
    return value.clone().to(device)
