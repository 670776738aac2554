"""What is recorded of an optimizer step, summed over its micro-batches and processes."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass

import torch

from papo.engines.training.batches import MicroBatch, Step
from papo.engines.training.devices import Devices
from papo.engines.training.forward import Tokens
from papo.engines.training.losses import clipped
from papo.engines.training.projection import Objective, Projected
from papo.params import TrainParams

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40": 181.0, "L4": 121.0, "A10": 125.0}
"""Dense bfloat16 rate by a part of the device's name, from the makers' data sheets."""

_SUMS = (
    "loss", "tokens", "ratio", "ratio_squared", "approx_kl", "entropy", "low", "high", "kl", "importance", "padded", "needed", "operations",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Parameters outside the embedding and the projection, which count for each token, and of the projection, for completions alone;
    a frozen one counts 2/3."""

    body: float
    head: float


class StepMeter:
    """Sums of one step on this process."""

    def __init__(self, params: TrainParams, size: Size, devices: Devices) -> None:
        self._params, self._size, self._devices = params, size, devices
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._ratios = (-float("inf"), -float("inf"))
        self._started = time.perf_counter()
        self._operations = 0.0
        self.odd: list[int] = []

    def add(
        self,
        batch: MicroBatch,
        tokens: Tokens,
        found: Projected,
        proximal: torch.Tensor,
        weights: torch.Tensor | None,
        kl: torch.Tensor | None,
        objective: Objective,
    ) -> None:
        """One micro-batch and what came out of what objective; the places of rows whose loss is not finite go to `odd`."""
        sums = self._sums
        sums["padded"] += batch.tokens
        sums["needed"] += batch.needed
        # Forward 2, backward 4 operations a parameter and token.
        sums["operations"] += 6.0 * (self._size.body * batch.tokens + self._size.head * len(tokens.ids))
        real = tokens.weights > 0
        logprobs = found.logprobs[real]
        loss = found.loss.item()
        sums["loss"] += loss
        if not math.isfinite(loss):
            terms = objective(found.logprobs, found.entropies, slice(None))
            self.odd += [batch.items[row].place for row in set(tokens.rows[~torch.isfinite(terms)].tolist())]
        if not len(logprobs):
            return
        ratio = (logprobs - tokens.behaviour[real]).double().exp()
        low, high = clipped(
            logprobs, proximal[real], tokens.advantages[real], self._params.clip_low, self._params.clip_high
        )
        sums["tokens"] += len(ratio)
        sums["ratio"] += ratio.sum().item()
        sums["ratio_squared"] += ratio.square().sum().item()
        sums["approx_kl"] += (ratio - 1 - ratio.log()).sum().item()
        sums["entropy"] += found.entropies[real].double().sum().item()
        sums["low"] += low.sum().item()
        sums["high"] += high.sum().item()
        sums["importance"] += len(ratio) if weights is None else weights[real].double().sum().item()
        sums["kl"] += 0.0 if kl is None else kl[real].double().sum().item()
        least, most = self._ratios
        self._ratios = max(least, -ratio.min().item()), max(most, ratio.max().item())

    def finish(
        self, number: int, step: Step, grad_norm: float, learning_rate: float, kl_coefficient: float
    ) -> dict[str, float]:
        """The metrics of the step, the same on every process; what is not finite is left out.

        loss, grad_norm (before clipping), learning_rate. Over the tokens that were computed: ratio_mean/min/max to the behaviour policy,
        clipped_low_share, clipped_high_share, approx_kl (k3, nats), entropy (nats), effective_sample_size (of the ratios, as a share),
        importance_mean, kl_reference. Of the work: skipped_responses, skipped_share, padding_share, peak_memory_mb. staleness: optimizer
        steps since the rows were sampled.
        """
        sums = dict(zip(_SUMS, self._total([self._sums[name] for name in _SUMS]), strict=True))
        extremes = torch.tensor([*self._ratios, self._memory()], dtype=torch.float64, device=self._devices.device)
        least, most, memory = self._devices.largest(extremes).tolist()
        count = max(sums["tokens"], 1.0)
        skipped = step.responses - len(step.computed)
        metrics = {
            "step": float(number + 1),
            "loss": sums["loss"],
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_responses": float(skipped),
            "skipped_share": skipped / max(step.responses, 1),
            "padding_share": 1.0 - sums["needed"] / max(sums["padded"], 1.0),
            "peak_memory_mb": memory,
            "staleness": float(number),
        }
        if sums["tokens"]:
            metrics |= {
                "entropy": sums["entropy"] / count,
                "clipped_low_share": sums["low"] / count,
                "clipped_high_share": sums["high"] / count,
                "ratio_mean": sums["ratio"] / count,
                "ratio_min": -least,
                "ratio_max": most,
                "approx_kl": sums["approx_kl"] / count,
                "effective_sample_size": sums["ratio"] ** 2 / (count * sums["ratio_squared"])
                if sums["ratio_squared"]
                else 0.0,
            }
        if self._params.importance != "none":
            metrics["importance_mean"] = sums["importance"] / count
        if self._params.kl.coefficient:
            metrics |= {"kl_reference": sums["kl"] / count, "kl_coefficient": kl_coefficient}
        self._operations = sums["operations"]
        return {
            name: value for name, value in metrics.items() if torch.isfinite(torch.tensor(value, dtype=torch.float64))
        }

    def clock(self, step: Step) -> dict[str, float]:
        """To be asked once the step is applied: seconds, tokens_per_second (completion tokens of all responses, computed or not), tflops
        (operations of all parameters, padding included, attention not, over time), flops_share (of the devices' peak, where it is known).
        """
        if self._devices.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - self._started
        tflops = self._operations / took / 1e12
        found = {"seconds": took, "tokens_per_second": step.tokens / took, "tflops": tflops}
        peak = self._peak()
        return found if peak is None else found | {"flops_share": tflops / peak / self._devices.world}

    def _total(self, values: list[float]) -> list[float]:
        found: list[float] = self._devices.total(
            torch.tensor(values, dtype=torch.float64, device=self._devices.device)
        ).tolist()
        return found

    def _memory(self) -> float:
        """MiB: the most that torch has had of the GPU; without one, that this process has had."""
        if self._devices.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def _peak(self) -> float | None:
        if self._devices.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name()
        return next((rate for part, rate in PEAK_TFLOPS.items() if part in name), None)
