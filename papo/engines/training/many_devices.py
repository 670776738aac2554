"""One of several processes of this machine that train together, joined by accelerate: DDP, FSDP2 or DeepSpeed ZeRO.

All three average gradients over processes, while the loss has the weights of the whole step: it is multiplied by their number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from papo.engines.training.devices import MakeOptimizer, OneDevice, Tensors, pick_device, trained
from papo.params import TrainParams

if TYPE_CHECKING:
    from accelerate import Accelerator

    from papo.engines.training.forward import PolicyLoss

MOMENTS = ("exp_avg", "exp_avg_sq")


def join(params: TrainParams, store: Any, rank: int, timeout_s: float) -> ManyDevices:
    """Joins the other processes; returns once all are there.

    Args:
        store: a torch.distributed.Store, where they meet.
        timeout_s: for the others to come to what all do together, before this one gives up.

    Raises:
        SetupError: a device that the params ask for is not there.
    """
    device, world = pick_device(params.devices.device), params.devices.processes
    # accelerate reads these.
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    kinds = {"ddp": ManyDevices, "fsdp": ShardedDevices, "deepspeed": ZeroDevices}
    return kinds[params.devices.kind](params, device)


def leave() -> None:
    """Waits for the others, and parts from them."""
    distributed.barrier()
    distributed.destroy_process_group()


class ManyDevices(OneDevice):
    """DDP: whole weights on each device; gradients are exchanged in the last backward pass of a step."""

    def __init__(self, params: TrainParams, device: torch.device) -> None:
        super().__init__(device, bfloat16=params.dtype == "bfloat16")
        self._params = params
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self._accelerator = self._accelerate(cpu=device.type == "cpu")

    def _accelerate(self, *, cpu: bool) -> Accelerator:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Buffers are no result of training, and the same everywhere.
        handler = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        return Accelerator(cpu=cpu, kwargs_handlers=[handler])

    def prepare(self, module: PolicyLoss, make: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        module.to(self.device)
        self._call, self._optimizer = self._accelerator.prepare(module, make(trained(module).values()))
        self._named = trained(module)  # sharding makes new ones
        # As in no_sync(), which would have to know at the forward pass whether its backward pass is the last.
        self._call.require_backward_grad_sync = False
        return self._call, self._optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        # Weights that were gathered for a layer are not to stay, in 16 bits, until the pass is over.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16, cache_enabled=not self.alike)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if not last:
            self._accelerator.backward(loss * self.world)
            return
        with self._accelerator.trigger_sync_in_backward(self._call):
            self._accelerator.backward(loss * self.world)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return _reduced(values, distributed.ReduceOp.SUM)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return _reduced(values, distributed.ReduceOp.MAX)

    def gathered(self, names: list[str]) -> list[str]:
        found: list[list[str]] = [[] for _ in range(self.world)]
        distributed.all_gather_object(found, names)
        return [name for part in found for name in part]

    def weights(self) -> Tensors:
        return super().weights() if self.rank == 0 else {}

    def moments(self) -> Tensors:
        return super().moments() if self.rank == 0 else {}


class ShardedDevices(ManyDevices):
    """FSDP2: weights, gradients and moments in shards; the weights of a layer are gathered where it computes.

    Gradients are exchanged after every backward pass, as whole ones would take the memory that sharding saves.
    """

    alike = True

    def _accelerate(self, *, cpu: bool) -> Accelerator:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.utils import DistributedType

        self._plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        accelerator = Accelerator(cpu=cpu, fsdp_plugin=self._plugin)
        return _taken_for(accelerator, DistributedType.FSDP, fsdp_plugin=self._plugin)

    def prepare(self, module: PolicyLoss, make: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        there = {type(part).__name__ for part in module.modules()}
        layers = sorted(name for name in module.model._no_split_modules or () if name in there)
        self._plugin.transformer_cls_names_to_wrap = layers
        return super().prepare(module, make)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._accelerator.backward(loss * self.world)

    def clip(self, max_norm: float) -> float:
        gradients = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        whole = float(_whole(norm))
        if math.isfinite(whole):
            nn.utils.clip_grads_with_norm_(self._named.values(), max_norm, norm)
        return whole

    def weights(self) -> Tensors:
        return self._on_first({name: parameter.detach() for name, parameter in self._named.items()})

    def moments(self) -> Tensors:
        return self._on_first(
            {
                f"{name}/{key}": value.detach()
                for name, parameter in self._named.items()
                for key, value in self._optimizer.state[parameter].items()
            }
        )

    def _on_first(self, parts: Tensors) -> Tensors:
        """Whole tensors on the CPU; one at a time on the devices."""
        found = {}
        for name, part in parts.items():
            whole = _whole(part)
            if self.rank == 0:
                found[name] = whole.cpu().contiguous()
        return found

    @torch.no_grad()
    def load(self, weights: Tensors | None, moments: Tensors | None) -> None:
        for name, parameter in self._named.items():
            if weights is not None:
                parameter.copy_(_part(weights[name], parameter))
            if moments is not None:
                mine = {key: value for key, value in moments.items() if key.rpartition("/")[0] == name}
                self._optimizer.state[parameter] = {
                    key.rpartition("/")[2]: _part(value, parameter) for key, value in mine.items()
                }


class ZeroDevices(ManyDevices):
    """DeepSpeed: moments in shards (stage 1), gradients too (2), weights too (3).

    Its engine clips and steps at once, and leaves out a step whose gradient is not finite.
    """

    alike = True

    def _accelerate(self, *, cpu: bool) -> Accelerator:
        from accelerate import Accelerator, DeepSpeedPlugin
        from accelerate.utils import DistributedType
        from transformers.integrations import unset_hf_deepspeed_config

        self._stage = self._params.devices.zero_stage
        config = {
            "zero_optimization": {"stage": self._stage},
            "gradient_clipping": self._params.max_grad_norm,
            # Which backward pass ends a step is told it each time.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 2**31,
        }
        plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        accelerator = Accelerator(cpu=cpu, deepspeed_plugin=plugin)
        if cpu:
            plugin.select(_from_accelerator_state=True)
        unset_hf_deepspeed_config()  # by which transformers would load a policy in shards, and papo has it whole first
        return _taken_for(accelerator, DistributedType.DEEPSPEED, deepspeed_plugins={"default": plugin})

    def prepare(self, module: PolicyLoss, make: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        # The engine switches off what is switched on around it.
        forward, precision = module.forward, super().autocast()

        def cast(*arguments: Any) -> Any:
            with precision:
                return forward(*arguments)

        module.forward = cast  # type: ignore[method-assign,assignment]  # in place of a method
        return super().prepare(module, make)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, enabled=False)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if not torch.isfinite(loss):
            loss = loss * math.nan  # so that neither is the gradient, and the step is left out
        self._call.set_gradient_accumulation_boundary(last)
        self._call.backward(loss * self.world)

    def clip(self, max_norm: float) -> float:
        self._call.step()
        return float(self._call.get_global_grad_norm())

    def weights(self) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        return self._on_first(lambda parameter: {"": safe_get_full_fp32_param(parameter)})

    def moments(self) -> Tensors:
        from deepspeed.utils import safe_get_full_optimizer_state

        def of(parameter: nn.Parameter) -> Tensors:
            found = {f"/{key}": safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            return found | {"/step": self._counts()[0]}

        return self._on_first(of)

    def _on_first(self, of: Callable[[nn.Parameter], Tensors]) -> Tensors:
        found = {}
        for name, parameter in self._named.items():
            for key, value in of(parameter).items():
                if self.rank == 0:
                    found[name + key] = value.detach().cpu().clone()
        return found

    def _counts(self) -> list[torch.Tensor]:
        """The steps that AdamW has counted, by shard."""
        return [state["step"] for state in self._call.optimizer.optimizer.state.values()]

    def load(self, weights: Tensors | None, moments: Tensors | None) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if weights is not None:
            for name, parameter in self._named.items():
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                    parameter.copy_(weights[name])
                safe_set_full_fp32_param(parameter, weights[name].to(self.device))
        if moments is None:
            return
        self._make_moments()
        for name, parameter in self._named.items():
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[f"{name}/{key}"].to(self.device), key)
        for count in self._counts():
            count.copy_(next(value for key, value in moments.items() if key.endswith("/step")))

    def _make_moments(self) -> None:
        """Zeros: before the first step there are none that could be set."""
        zero = self._call.optimizer
        flat = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for shard in flat:
            made = {key: torch.zeros_like(shard) for key in MOMENTS}
            zero.optimizer.state[shard] = made | {"step": torch.zeros((), device=shard.device)}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()


def _taken_for(accelerator: Accelerator, kind: Any, **state: Any) -> Accelerator:
    """accelerate shards on GPUs alone, and on CPUs takes all for DDP; what it does to a model to shard it works on both."""
    for name, value in state.items():
        setattr(accelerator.state, name, value)
    accelerator.state.distributed_type = kind
    return accelerator


def _reduced(values: torch.Tensor, how: Any) -> torch.Tensor:
    found = values.clone()
    distributed.all_reduce(found, how)
    return found


def _whole(part: torch.Tensor) -> torch.Tensor:
    """Gathered from all processes, if it is a shard."""
    from torch.distributed.tensor import DTensor

    return part.full_tensor() if isinstance(part, DTensor) else part


def _part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard; all have the whole. A count of steps is on each."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if whole.shape != like.shape or not isinstance(like, DTensor):
        return whole.clone().to(like.device)
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
