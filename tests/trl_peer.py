"""Optimizer steps of TRL's GRPOTrainer over stored responses: what papo's training is compared with, in tests and benchmarks.

Only generation and rewards are replaced: the dataset, the sampler, the shuffling of a generation batch, its split into micro-batches, the
loss, the clipping by norm, the optimizer and the metrics are TRL's own. Nothing is skipped, packed or sorted.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from papo.engines.protocols import TrainRow
from papo.params import TrainParams

if TYPE_CHECKING:
    import torch

LOSSES = {"token_mean": "dapo", "sequence_mean": "grpo", "dr_grpo": "dr_grpo"}
Padding = Literal["batch", "microbatch"]


@dataclass
class Steps:
    """Of each optimizer step: gradient by parameter before clipping, loss, seconds of wall and CPU, and tokens with those of padding."""

    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    padded_tokens: list[int] = field(default_factory=list)


def trl_steps(
    model: Any,
    tokenizer: Any,
    groups: Sequence[Sequence[TrainRow]],
    params: TrainParams,
    *,
    per_device: int,
    steps: int = 1,
    padding: Padding = "batch",
    temperature: float = 1.0,
    completion_limit: int = 512,
    seed: int = 0,
    bfloat16: bool = False,
) -> Steps:
    """Trains `model`, which TRL patches, on the device where it is, by `steps` optimizer steps over as many equal parts of `groups`.

    Args:
        groups: of equal size, which divides the rows of a step.
        per_device: rows of a micro-batch; divides the rows of a step.
        padding: batch: TRL's own, each row to the longest of the step; microbatch: each to the longest of its micro-batch, kinder than TRL.
        completion_limit: what dr_grpo divides by; TRL's max_completion_length.
    """
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils import logging as hf_logging
    from trl import GRPOConfig

    hf_logging.set_verbosity(logging.ERROR)
    size = len(groups[0])
    rows = len(groups) * size // steps
    assert {len(group) for group in groups} == {size}, "groups must be of equal size"
    assert len(groups) % steps == 0, "steps must divide the groups"
    assert rows % per_device == 0, "a micro-batch must divide the rows of a step"
    found = Steps()

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers' base class is untyped
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found.seconds.append(time.perf_counter() - self.started[0])
            found.cpu_seconds.append(time.process_time() - self.started[1])

    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer_class()(
            groups=groups,
            padding=padding,
            found=found,
            model=model,
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_dict({"prompt": [str(number) for number in range(len(groups))]}),
            reward_funcs=_no_reward,
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=rows // per_device,
                steps_per_generation=rows // per_device,
                num_generations=size,
                shuffle_dataset=False,
                max_completion_length=completion_limit,
                learning_rate=params.learning_rate,
                lr_scheduler_type="constant",
                adam_beta1=params.betas[0],
                adam_beta2=params.betas[1],
                weight_decay=params.weight_decay,
                max_grad_norm=params.max_grad_norm,
                beta=0.0,
                epsilon=params.clip_low,
                epsilon_high=params.clip_high,
                delta=params.dual_clip,
                loss_type=LOSSES[params.loss],
                temperature=temperature,
                activation_checkpointing=params.gradient_checkpointing,
                bf16=bfloat16,
                use_cpu=model.device.type == "cpu",
                dataloader_pin_memory=False,
                logging_steps=1,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return found


def _trainer_class() -> Any:
    """The GRPOTrainer whose generations are the stored rows; made here so that importing this module needs no TRL."""
    from trl import GRPOTrainer

    class StoredGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped
        def __init__(self, *, groups: Sequence[Sequence[TrainRow]], padding: Padding, found: Steps, **kwargs: Any):
            self._groups, self._padding, self._found = groups, padding, found
            super().__init__(**kwargs)

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            # TRL's sampler names a prompt once for each of its completions, one after another.
            rows = [row for name in dict.fromkeys(each["prompt"] for each in inputs) for row in self._groups[int(name)]]
            assert len(rows) == len(inputs)
            self._found.padded_tokens.append(0)
            stored = padded(rows, self.processing_class.pad_token_id)
            return {name: tensor.to(self.accelerator.device) for name, tensor in stored.items()}

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            if self._padding == "microbatch":
                inputs = trimmed(inputs)
            self._found.padded_tokens[-1] += inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
            return super()._compute_loss(model, inputs)

        def _clip_grad_norm(self, model: Any) -> Any:
            self._found.gradients.append(
                {name: tensor.grad.cpu().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
            )
            return super()._clip_grad_norm(model)

    return StoredGRPOTrainer


def _no_reward(**kwargs: Any) -> list[float]:
    raise AssertionError("rewards are stored, never computed here")


def padded(rows: Sequence[TrainRow], pad: int) -> dict[str, torch.Tensor]:
    """What TRL's loss takes: prompts padded on the left, completions on the right, each to the longest of `rows`."""
    import torch

    def tensor(values: Sequence[Sequence[float]], kind: torch.dtype, side: str, value: float = 0) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(each, dtype=kind) for each in values],
            batch_first=True,
            padding_side=side,
            padding_value=value,
        )

    prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
    by_token = [row.token_advantages or [row.advantage] * len(row.completion_ids) for row in rows]
    return {
        "prompt_ids": tensor(prompts, torch.long, "left", pad),
        "prompt_mask": tensor([[1] * len(ids) for ids in prompts], torch.long, "left"),
        "completion_ids": tensor(completions, torch.long, "right", pad),
        "completion_mask": tensor([[1] * len(ids) for ids in completions], torch.long, "right"),
        # Given, they are what the ratio is to; where they are not, TRL takes its own log-probs and every ratio is 1.
        "old_per_token_logps": tensor([row.logprobs for row in rows], torch.float32, "right"),
        "advantages": tensor(by_token, torch.float32, "right"),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }


def trimmed(inputs: dict[str, Any]) -> dict[str, Any]:
    """A micro-batch without the columns that are padding in each of its rows."""
    before = int(inputs["prompt_mask"].sum(1).max())
    after = int(inputs["completion_mask"].sum(1).max())
    return inputs | {
        name: tensor[:, -before:] if name.startswith("prompt") else tensor[:, :after]
        for name, tensor in inputs.items()
        if tensor.dim() == 2
    }
