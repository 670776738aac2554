"""Updates of a policy in tests: what the trainer gives, and the same in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from papo.engines.protocols import TrainJob, TrainRow
from papo.engines.training.devices import Devices
from papo.engines.training.state import ADAPTERS, STATE_FILE
from papo.engines.training.trainer import GrpoTrainer
from papo.params import TrainParams

Groups = Sequence[Sequence[TrainRow]]
Tensors = dict[str, Any]

LIMIT = 24
CLOCK = {"seconds", "tokens_per_second", "tflops", "peak_memory_mb"}
# One optimizer step whose gradient is that of the loss: nothing is clipped by norm, weights hardly move.
ONE_STEP = TrainParams(minibatch_prompts=4, max_grad_norm=1e9, learning_rate=1e-6)


class StoppedError(Exception):
    """A process that ends in the middle."""


@dataclass
class Trained:
    """What one call of the trainer gave."""

    folder: Path
    metrics: list[dict[str, float]]
    told: list[int]
    warnings: list[str]

    @property
    def policy(self) -> Path:
        return self.folder / "policy"

    @property
    def state(self) -> Path:
        return self.folder / "trainer"

    @property
    def weights(self) -> Tensors:
        return tensors(self.policy / "model.safetensors")

    @property
    def moments(self) -> Tensors:
        return tensors(self.state / STATE_FILE)

    @property
    def adapters(self) -> Tensors:
        return tensors(self.state / ADAPTERS)

    def gradient(self) -> Tensors:
        """After a first step AdamW's first moment is (1 - beta_1) times the gradient."""
        return {key.removesuffix("/exp_avg"): m / 0.1 for key, m in self.moments.items() if key.endswith("/exp_avg")}

    @property
    def without_clock(self) -> list[dict[str, float]]:
        return [{key: value for key, value in row.items() if key not in CLOCK} for row in self.metrics]


def train_round(
    params: TrainParams,
    policy: Path,
    groups: Groups,
    folder: Path,
    *,
    state: Path | None = None,
    reference: Path | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    round_: int | None = None,
    stop_after: int | None = None,
    devices: Devices | None = None,
) -> Trained:
    """One call of the trainer, which ends with StoppedError after `stop_after` steps."""
    told: list[int] = []
    warnings: list[str] = []

    def progress(done: int) -> None:
        told.append(done)
        if len(told) - 1 == stop_after:
            raise StoppedError

    trainer = GrpoTrainer(params, temperature=temperature, max_new_tokens=LIMIT, seed=seed, warn=warnings.append)
    job = TrainJob(
        round=round_ if round_ is not None else 0 if state is None else 1, groups=groups, policy=policy, state=state, reference=reference,
        out=folder / "policy", out_state=folder / "trainer", work=folder / "work",
    )  # fmt: skip
    metrics = trainer.train(job, progress) if devices is None else trainer.train_on(devices, job, progress)
    return Trained(folder, metrics, told, warnings)


def tensors(file: Path) -> Tensors:
    """What a file of tensors holds."""
    from safetensors.torch import load_file

    return load_file(file)


def same(one: Tensors, other: Tensors) -> bool:
    """Whether two sets of tensors are the same, bit by bit."""
    import torch

    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def apart(one: Tensors, other: Tensors) -> float:
    """Norm of the difference of two sets of tensors, relative to the norm of the second."""
    import torch

    assert one.keys() == other.keys()

    def flat(some: Tensors) -> Any:
        return torch.cat([some[name].double().flatten() for name in sorted(some)])

    return ((flat(one) - flat(other)).norm() / flat(other).norm()).item()


class PlainTorch:
    """The update as docs/training.md states it: row by row, no padding, nothing left out, each term written out."""

    def __init__(
        self, params: TrainParams, policy: Path, temperature: float = 1.0, reference: Path | None = None
    ) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self.params, self.temperature = params, temperature
        self.model = LlamaForCausalLM.from_pretrained(policy)
        self.initial = LlamaForCausalLM.from_pretrained(policy)
        self.reference = LlamaForCausalLM.from_pretrained(reference or policy)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=params.learning_rate, betas=params.betas, weight_decay=params.weight_decay
        )
        self.gradients: list[Tensors] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def train(self, groups: Groups) -> PlainTorch:
        import torch

        size = self.params.minibatch_prompts
        for at in range(0, len(groups), size):
            loss = self.loss([row for group in groups[at : at + size] for row in group])
            self.optimizer.zero_grad()
            loss.backward()
            self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.params.max_grad_norm).item())
            self.optimizer.step()
            self.losses.append(loss.item())
        return self

    def logprobs(self, model: Any, row: TrainRow) -> tuple[Any, Any]:
        """Log-prob and entropy at each token of the completion."""
        import torch

        logits = model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0]
        every = (logits[len(row.prompt_ids) - 1 : -1] / self.temperature).log_softmax(-1)
        return every[range(len(row.completion_ids)), row.completion_ids], -(every.exp() * every).sum(-1)

    def loss(self, rows: Sequence[TrainRow]) -> Any:
        import torch

        p = self.params
        counted = [row for row in rows if not (p.mask_truncated and row.truncated)]
        tokens = sum(len(row.completion_ids) for row in counted)
        total: Any = 0.0
        for row in counted:
            length = len(row.completion_ids)
            logprobs, entropies = self.logprobs(self.model, row)
            advantage = torch.tensor(row.token_advantages or [row.advantage] * length)
            against = behaviour = torch.tensor(row.logprobs)
            weight: Any = 1.0
            if p.importance != "none":
                with torch.no_grad():
                    against = self.logprobs(self.initial, row)[0]
                apart = against - behaviour
                apart = apart.sum() if p.importance == "sequence" else apart
                weight = apart.exp().clamp(max=p.importance_cap)
            ratio = (logprobs - against).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - p.clip_low, 1 + p.clip_high) * advantage)
            if p.dual_clip is not None:
                surrogate = torch.where(advantage < 0, torch.maximum(surrogate, p.dual_clip * advantage), surrogate)
            term = -weight * surrogate - p.entropy_bonus * entropies
            if p.kl.coefficient:
                with torch.no_grad():
                    ahead = self.logprobs(self.reference, row)[0]
                term = term + p.kl.coefficient * ((ahead - logprobs).exp() - (ahead - logprobs) - 1)
            counts = {"token_mean": tokens, "sequence_mean": length * len(rows), "dr_grpo": LIMIT * len(rows)}
            total = total + term.sum() / counts[p.loss]
        return total

    def weights(self) -> Tensors:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


def furthest(one: Tensors, other: Tensors) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in other)


def off_policy(groups: Groups) -> list[list[TrainRow]]:
    """The same rows as if another policy had sampled them, so that ratios lie on both sides of the clip range."""
    stream = np.random.default_rng(0)
    return [
        [replace(row, logprobs=[min(0.0, x + d) for x, d in zip(row.logprobs, stream.normal(0, 0.4, 99), strict=False)]) for row in group]
        for group in groups
    ]  # fmt: skip


def by_token(groups: Groups) -> list[list[TrainRow]]:
    """Token-level advantages that differ within a row; rows without advantage have zeros, one row has some."""
    stream = np.random.default_rng(1)
    return [
        [
            replace(
                row,
                token_advantages=[0.0 if row.advantage == 0 else float(a) for a in stream.normal(0, 1, len(row.logprobs))],
                advantage=-7.0,  # must not be read
            )
            for row in group
        ]
        for group in groups
    ]  # fmt: skip
