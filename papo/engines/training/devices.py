"""Where training computes: one device of this process, or one of several that accelerate joins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from papo.engines.training.optimizers import restore, stored
from papo.errors import SetupError

if TYPE_CHECKING:
    from papo.engines.training.forward import PolicyLoss

Tensors = dict[str, torch.Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Devices(Protocol):
    """What the loop asks of the devices. Losses have the weights of the whole step, so gradients are summed over processes.

    `alike`: all processes have to make forward passes of the same layout, as they exchange shards in them.
    """

    rank: int
    world: int
    device: torch.device
    alike: bool

    def prepare(self, module: PolicyLoss, make: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What to call, and what to step."""
        ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """`last` of the step: gradients are exchanged."""
        ...

    def clip(self, max_norm: float) -> float:
        """The norm of the whole gradient before it was clipped to `max_norm`; clips nothing where it is not finite."""
        ...

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Summed over processes."""
        ...

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of all processes, element by element."""
        ...

    def gathered(self, names: list[str]) -> list[str]:
        """The names of all processes."""
        ...

    def weights(self) -> Tensors:
        """The trained parameters by name, whole, on the CPU; empty on all processes but the first."""
        ...

    def moments(self) -> Tensors:
        """The optimizer's state as `<parameter>/<name>`, whole, on the CPU; empty on all processes but the first."""
        ...

    def load(self, weights: Tensors | None, moments: Tensors | None) -> None:
        """What `weights` and `moments` gave, here or with another number of processes."""
        ...


def pick_device(wanted: str) -> torch.device:
    """The device of `train.devices.device`.

    Raises:
        SetupError: a GPU is asked for, and there is none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise SetupError(
            "there is no GPU that torch can use",
            where="train.devices.device = cuda",
            fix="run this on a machine with one (python -m torch.utils.collect_env says what torch sees), or set it to auto",
        )
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


class OneDevice:
    """This process alone, in plain torch."""

    rank, world, alike = 0, 1, False

    def __init__(self, device: torch.device, *, bfloat16: bool) -> None:
        self.device, self._bfloat16 = device, bfloat16

    def prepare(self, module: PolicyLoss, make: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        self._module = module.to(self.device)
        self._named = trained(module)
        self._optimizer = make(self._named.values())
        return self._module, self._optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch's Tensor.backward is untyped

    def clip(self, max_norm: float) -> float:
        gradients = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self._named.values(), max_norm, norm)
        return norm.item()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def gathered(self, names: list[str]) -> list[str]:
        return names

    def weights(self) -> Tensors:
        return {name: parameter.detach().cpu() for name, parameter in self._named.items()}

    def moments(self) -> Tensors:
        return stored(self._optimizer, self._named)

    @torch.no_grad()
    def load(self, weights: Tensors | None, moments: Tensors | None) -> None:
        if weights is not None:
            for name, parameter in self._named.items():
                parameter.copy_(weights[name])
        if moments is not None:
            restore(self._optimizer, self._named, moments)


def trained(module: PolicyLoss) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in the policy; a tied one once."""
    return {name: parameter for name, parameter in module.model.named_parameters() if parameter.requires_grad}
