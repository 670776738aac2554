"""One pass over a round: the loop of optimizer steps. docs/training.md has the equations, losses.py each term of them.

    L = sum over the step's tokens of  c_t ( w_t surrogate_t + kl_coefficient KL_t - entropy_bonus H_t )

c_t makes it a mean (losses.token_weights) over *all* responses of the step; those that give no gradient are counted and not computed.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from papo.core.schedules import adapted_coefficient, rate_factor
from papo.engines.policy import keep_origin, load_policy
from papo.engines.protocols import Progress, TrainJob, TrainRow
from papo.engines.training.batches import Layout, MicroBatch, Step, plan
from papo.engines.training.checks import check_rows, check_same_tokens, check_trainer
from papo.engines.training.devices import Devices, OneDevice, Tensors, pick_device, trained
from papo.engines.training.forward import PolicyLoss, Tokens, tokens_of
from papo.engines.training.lora import Base, check_start, lay, merge
from papo.engines.training.losses import clipped_surrogate, importance_weights, kl_penalty, token_weights
from papo.engines.training.meter import Size, StepMeter
from papo.engines.training.optimizers import make_optimizer
from papo.engines.training.probe import probe
from papo.engines.training.projection import Objective, Projected
from papo.engines.training.state import Reached, Saved, State, load_state, save_state
from papo.errors import CheckpointError, NotFiniteError, SetupError
from papo.params import TrainParams
from papo.store.faults import reached
from papo.store.files import digest, replacing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Warn = Callable[[str], None]


class GrpoTrainer:
    """Trains on a device of this process.

    Args:
        temperature: at which the rows were sampled, and their stored log-probs taken.
        max_new_tokens: the limit that they were sampled with; `dr_grpo` divides by it.
    """

    def __init__(
        self,
        params: TrainParams,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        warn: Warn = lambda message: None,
    ) -> None:
        self._params, self._temperature, self._max_new_tokens = params, temperature, max_new_tokens
        self._seed, self._warn = seed, warn

    def versions(self) -> dict[str, str]:
        adapters = ["peft"] if self._params.lora is not None else []
        optimizer = ["bitsandbytes"] if self._params.optimizer == "adamw_8bit" else []
        return {name: version(name) for name in ("torch", "transformers", *adapters, *optimizer)}

    def train(self, job: TrainJob, progress: Progress) -> list[dict[str, float]]:
        """See `Trainer`; the metrics are those of `StepMeter.finish` and `clock`, and `broken` 1 where a step was not applied.

        Raises:
            SetupError: a device or library that the params ask for is not there.
            CheckpointError: policy, reference or optimizer state cannot be used, or do not belong together.
            DataError: a row holds a token that the policy does not have.
            NotFiniteError: loss or gradient are not finite in too many steps.
        """
        check_trainer(self._params)
        device = pick_device(self._params.devices.device)
        devices = OneDevice(device, bfloat16=self._params.dtype == "bfloat16")
        return self.train_on(devices, job, progress)

    def train_on(self, devices: Devices, job: TrainJob, progress: Progress) -> list[dict[str, float]]:
        """`train` as one of the processes that `devices` joins; all are given the same job."""
        return _Round(self, devices, job).run(progress)


class _Round:
    def __init__(self, trainer: GrpoTrainer, devices: Devices, job: TrainJob) -> None:
        params, temperature, max_new_tokens = trainer._params, trainer._temperature, trainer._max_new_tokens
        seed, warn = trainer._seed, trainer._warn
        self._params, self._seed, self._devices, self._job = params, seed, devices, job
        self._warn: Warn = warn if devices.rank == 0 else lambda message: None
        p = params
        base = job.reference if p.lora is not None else None
        self._model, self._tokenizer = load_policy(
            base or job.policy, device=str(devices.device), attention=p.attention
        )
        check_rows(job.groups, self._model.get_input_embeddings().num_embeddings)
        if p.lora is not None:
            lay(self._model, p.lora, seed=seed)
        module, shared = self._module(self._model, temperature)
        self._model.train()
        if p.gradient_checkpointing:
            self._model.activation_checkpointing_enable()
        self._size = _size(self._model)
        shapes = {name: parameter.shape for name, parameter in trained(module).items()}
        self._call, self._optimizer = devices.prepare(module, lambda parameters: make_optimizer(parameters, p))
        self._kl_coefficient = p.kl.coefficient
        if job.state is not None:
            adapters, moments, state = load_state(job.state, job.policy, p.optimizer, shapes, lora=p.lora, base=base)
            devices.load(adapters, moments)
            self._kl_coefficient = state.kl_coefficient if p.kl.target is not None else p.kl.coefficient
        elif base is not None:
            check_start(job.policy, base)
        self._reference = self._load_reference(module, temperature) if p.kl.coefficient else None
        self._steps = plan(
            job.groups,
            size=p.minibatch_prompts,
            weigh=lambda lengths: token_weights(lengths, p.loss, max_new_tokens),
            # A penalty or a bonus has a gradient where the advantage has none.
            skip_zero=p.skip_zero and not p.kl.coefficient and not p.entropy_bonus,
            mask_truncated=p.mask_truncated,
            layout=Layout(p.microbatch_tokens, shared and not devices.alike, module.packed),
            rank=devices.rank,
            world=devices.world,
        )
        self._saved = Saved(job.work)
        self._history: list[dict[str, float]] = []
        self._broken: list[str] = []

    def run(self, progress: Progress) -> list[dict[str, float]]:
        proximal = self._proximal() if self._params.importance != "none" else {}
        if done := self._resume():
            progress(done)
        self._stop_if_broken()
        saved = time.monotonic()
        for number in range(len(self._history), len(self._steps)):
            reached("step", detail=str(number))
            self._history.append(self._step(number, proximal))
            progress(1)
            self._stop_if_broken()
            last = number + 1 == len(self._steps)
            if not last and self._elapsed(saved) >= 60 * self._params.save_minutes:
                self._save()
                saved = time.monotonic()
        self._finish()
        return self._history

    def _elapsed(self, since: float) -> float:
        """Seconds; the same for all processes, as they save together."""
        return self._devices.largest(torch.tensor(time.monotonic() - since, device=self._devices.device)).item()

    def _step(self, number: int, proximal: dict[int, list[float]]) -> dict[str, float]:
        p, step = self._params, self._steps[number]
        done = self._job.round + (number + 1) / len(self._steps)
        s = p.schedule
        rate = p.learning_rate * rate_factor(
            s.kind, done, warmup_rounds=s.warmup_rounds, rounds=s.rounds, floor=s.floor
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # By step, so that a restart draws what an undisturbed run draws (dropout, if the model has any).
        torch.manual_seed(_seed(self._seed, self._job.round, number, self._devices.rank))
        meter = StepMeter(p, self._size, self._devices)
        for index, batch in enumerate(step.batches):
            self._forward(batch, proximal, meter, last=index + 1 == len(step.batches))
        norm = self._devices.clip(p.max_grad_norm)
        metrics = meter.finish(number, step, norm, rate, self._kl_coefficient)
        whole = {"loss", "grad_norm"} <= metrics.keys()
        if whole:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        metrics |= meter.clock(step)
        if not whole:
            metrics["broken"] = 1.0
            self._tell_broken(number, meter.odd, step, proximal)
        elif p.kl.target is not None and step.computed:
            self._kl_coefficient = adapted_coefficient(
                self._kl_coefficient, metrics["kl_reference"], p.kl.target, step.responses, p.kl.horizon
            )
        return metrics

    def _forward(self, batch: MicroBatch, proximal: dict[int, list[float]], meter: StepMeter, *, last: bool) -> None:
        tokens = tokens_of(batch, self._devices.device)
        against, weights = self._against(batch, tokens, proximal)
        reference = self._reference_logprobs(batch, tokens)
        objective = self._objective(tokens, against, weights, reference)
        with self._devices.autocast():
            found: Projected = self._call(batch, tokens, objective)
        self._devices.backward(found.loss, last=last)
        kl = None if reference is None else kl_penalty(found.logprobs, reference)
        meter.add(batch, tokens, found, against, weights, kl, objective)

    def _against(
        self, batch: MicroBatch, tokens: Tokens, proximal: dict[int, list[float]]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The log-probs that ratios are against, and the importance weights."""
        if not proximal:
            return tokens.behaviour, None
        p = self._params
        stored = [value for item in batch.items for value in proximal[item.place]]
        against = torch.tensor(stored, device=self._devices.device)
        return against, importance_weights(against, tokens.behaviour, tokens.rows, p.importance, p.importance_cap)

    def _objective(
        self, tokens: Tokens, against: torch.Tensor, weights: torch.Tensor | None, reference: torch.Tensor | None
    ) -> Objective:
        p, coefficient = self._params, self._kl_coefficient

        def loss(logprobs: torch.Tensor, entropies: torch.Tensor, part: slice) -> torch.Tensor:
            term = clipped_surrogate(
                logprobs, against[part], tokens.advantages[part], p.clip_low, p.clip_high, p.dual_clip
            )
            if weights is not None:
                term = weights[part] * term
            if reference is not None:
                term = term + coefficient * kl_penalty(logprobs, reference[part])
            if p.entropy_bonus:
                term = term - p.entropy_bonus * entropies
            return term * tokens.weights[part]

        return loss

    @torch.no_grad()
    def _proximal(self) -> dict[int, list[float]]:
        """By place in the round, the log-probs of a row by the policy that the round starts from."""
        found: dict[int, list[float]] = {}
        self._model.eval()  # dropout would be another one in a restart
        for batch in (batch for step in self._steps for batch in step.batches):
            tokens = tokens_of(batch, self._devices.device)
            with self._devices.autocast():
                logprobs = self._call(batch, tokens, None).logprobs
            lengths = [item.completion for item in batch.items]
            for item, part in zip(batch.items, logprobs.split(lengths), strict=True):
                found[item.place] = part.tolist()
        self._model.train()
        return found

    def _module(self, model: PreTrainedModel, temperature: float) -> tuple[PolicyLoss, bool]:
        """The model with its loss, and whether it can share prompts."""
        p = self._params
        with self._devices.autocast():  # flash attention takes nothing wider
            able = probe(model)
        packed = p.packing == "on" or (p.packing == "auto" and able.packs_without_mask)
        if packed and not able.packs:
            raise SetupError(
                f"this model does not keep apart the rows of one packed sequence (its attention is {able.attention})",
                where="train.packing = on", fix="set it to auto, or train.attention to sdpa or flash_attention_2",
            )  # fmt: skip
        module = PolicyLoss(model, temperature=temperature / able.scale, logits_mb=p.logits_mb, packed=packed)
        return module, p.share_prompts and able.shares and not p.gradient_checkpointing

    def _load_reference(self, module: PolicyLoss, temperature: float) -> nn.Module | Base:
        p = self._params
        if p.lora is not None:
            return Base(module)
        assert self._job.reference is not None
        model, tokenizer = load_policy(self._job.reference, device=str(self._devices.device), attention=p.attention)
        check_same_tokens(self._tokenizer, tokenizer, self._job.reference)
        _same_shape(self._model, model, self._job.reference)
        return self._module(model.requires_grad_(False).eval(), temperature)[0]

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch, tokens: Tokens) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with self._devices.autocast():
            logprobs: torch.Tensor = self._reference(batch, tokens, None).logprobs
        return logprobs

    def _tell_broken(self, number: int, odd: Sequence[int], step: Step, proximal: dict[int, list[float]]) -> None:
        """Names the rows without which the step would have been whole."""
        places = {*odd, *self._odd_alone(step, proximal)}
        rows = {item.place: item.row for item in step.computed}
        found = self._devices.gathered([_name(row) for place, row in rows.items() if place in places])
        names = _some(list(dict.fromkeys(found))) or "no single response, but their sum"
        self._broken.append(f"step {number + 1} by {names}")
        self._warn(
            f"loss or gradient are not finite in step {number + 1} of {len(self._steps)}, which was not applied; by {names}"
        )

    def _odd_alone(self, step: Step, proximal: dict[int, list[float]]) -> list[int]:
        """The rows whose own gradient is not finite; sharded weights take all processes for a forward pass, so there none is tried."""
        if self._devices.world > 1:
            return []
        found = []
        for item in step.computed:
            meter = StepMeter(self._params, self._size, self._devices)
            self._forward(MicroBatch((item,), shared=False, tokens=0, needed=0), proximal, meter, last=True)
            if not math.isfinite(self._devices.clip(self._params.max_grad_norm)):
                found.append(item.place)
            self._optimizer.zero_grad(set_to_none=True)
        return found

    def _stop_if_broken(self) -> None:
        # A round of which no step was applied has neither policy nor moments to hand on.
        if len(self._broken) < min(self._params.max_broken_steps, len(self._steps)):
            return
        self._save()
        weights, good = self._devices.weights(), self._job.work / "last_good"
        if self._devices.rank == 0:
            with replacing(good) as folder:
                self._write_policy(folder, weights)
        self._devices.gathered([])  # the first error ends all processes
        raise NotFiniteError(
            f"loss or gradient are not finite in {len(self._broken)} of {len(self._steps)} steps: {'; '.join(self._broken)}",
            where=f"{self._job.work}; in its folder {good.name} is the policy as of the last step that was applied, which papo evaluate "
            "--policy takes",
            fix="look at those rows of the rollouts and advantages, lower train.learning_rate, or raise train.max_broken_steps; delete "
            "the folder to try the same again",
        )

    def _save(self) -> None:
        weights, moments = self._devices.weights(), self._devices.moments()
        if self._devices.rank == 0:
            so_far = Reached(
                steps=len(self._history),
                history=self._history,
                kl_coefficient=self._kl_coefficient,
                broken=self._broken,
            )
            self._saved.write(weights, moments, so_far)

    def _resume(self) -> int:
        """Goes on where a run that was ended had saved; the number of steps it had done."""
        found, damaged = self._saved.read()
        self._devices.gathered([])  # all processes have looked before one moves what is damaged
        for folder, why in damaged if self._devices.rank == 0 else ():
            self._warn(f"a saved step of this round is damaged ({why}); moved to {self._saved.set_aside(folder)}")
        if found is None:
            return 0
        weights, moments, so_far = found
        self._devices.load(weights, moments)
        self._history, self._broken = list(so_far.history), list(so_far.broken)
        self._kl_coefficient = so_far.kl_coefficient
        return so_far.steps

    def _finish(self) -> None:
        job, weights, moments = self._job, self._devices.weights(), self._devices.moments()
        if self._devices.rank:
            return
        self._write_policy(job.out, weights)
        lora = self._params.lora is not None
        state = State(
            policy=digest(job.out),
            kl_coefficient=self._kl_coefficient,
            optimizer=self._params.optimizer,
            lora=self._params.lora,
            base=digest(job.reference) if lora and job.reference is not None else None,
        )
        save_state(job.out_state, moments, state, weights if lora else None)

    def _write_policy(self, folder: Path, weights: Tensors) -> None:
        """The last act: adapters are merged into the model for good."""
        if self._params.lora is not None:
            merge(self._model)
            weights = {}
        # Weights that are no trained parameters, such as a buffer, are as the model has them; a tied one is saved once.
        first: dict[nn.Parameter, str] = {}
        names = {
            name: first.setdefault(one, name) for name, one in self._model.named_parameters(remove_duplicate=False)
        }
        whole = {name: weights.get(names.get(name, name), value) for name, value in self._model.state_dict().items()}
        reached("write", folder)
        self._model.save_pretrained(folder, state_dict=whole)
        self._tokenizer.save_pretrained(folder)
        keep_origin(self._job.policy, folder)


def _name(row: TrainRow) -> str:
    return f"{row.problem_id}/{row.sample_index}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _size(model: PreTrainedModel) -> Size:
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not head and parameter is not embedding]
    return Size(body=sum(map(_counted, others)), head=_counted(head))


def _counted(parameter: nn.Parameter) -> float:
    """Of a frozen one the gradient is not taken, which is two of six operations."""
    return parameter.numel() * (1.0 if parameter.requires_grad else 2 / 3)


def _same_shape(model: PreTrainedModel, other: PreTrainedModel, where: Path) -> None:
    """Refuses a reference of another architecture."""
    mine, its = ({name: value.shape for name, value in one.named_parameters()} for one in (model, other))
    if wrong := sorted(name for name in mine.keys() | its.keys() if mine.get(name) != its.get(name)):
        raise CheckpointError(
            f"the reference is of another architecture than the policy: {wrong[0]} is missing, too many or of another shape",
            where=str(where),
            fix="the reference is the warm start that the run began with; run warmstart and all rounds again",
        )
