"""The policy update: TRL's GRPOTrainer fed from stored rows instead of its own generation and rewards.

The loss of one optimizer step over the mini-batch B of responses, with the ratio r_t against the *behaviour* log-probs stored at sampling:

    r_t  = exp(log pi(y_t) - logprob_t)
    L    = - 1/N * sum over B, t of min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

N is the number of completion tokens in B (`token_mean`); `sequence_mean` divides by each response's length and by |B| instead.
Responses with A = 0 give no gradient and are left out of the forward pass; N counts them all the same, so the gradient is the same.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papo.engines.policy import load_policy
from papo.engines.protocols import Progress, TrainRow
from papo.errors import CheckpointError, StageError
from papo.params import TrainParams

if TYPE_CHECKING:
    import torch

STATE_FILE = "optimizer.safetensors"


class GrpoTrainer:
    """One pass over a round's groups; AdamW, whose moments go on from round to round."""

    def __init__(self, params: TrainParams, *, temperature: float, seed: int) -> None:
        self._params, self._temperature, self._seed = params, temperature, seed

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")}

    def train(
        self,
        policy: Path,
        state: Path | None,
        groups: Sequence[Sequence[TrainRow]],
        out: Path,
        out_state: Path,
        progress: Progress,
    ) -> list[dict[str, float]]:
        """See `Trainer`; metrics a step: loss, grad_norm, clipped_share, ratio_min/max, approx_kl, entropy, skipped rows.

        Raises:
            CheckpointError: the optimizer state belongs to another model.
            StageError: the loss or the gradient is not finite.
        """
        import torch
        from transformers import PrinterCallback, TrainerCallback, set_seed
        from trl import GRPOConfig

        p = self._params
        set_seed(self._seed)
        model, tokenizer = load_policy(policy)
        use_cache = model.config.use_cache
        batches, steps, accumulation = _plan(groups, p)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=p.learning_rate, betas=p.betas, weight_decay=p.weight_decay
        )
        if state is not None:
            _load_state(optimizer, model, state)

        class Tell(TrainerCallback):  # type: ignore[misc]  # transformers' base class is untyped
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress(1)

        gpu = torch.cuda.is_available()
        with tempfile.TemporaryDirectory() as scratch:
            trainer = _trainer_class()(
                stored=[_collate(batch, tokenizer.pad_token_id, p) for batch in batches],
                model=model,
                processing_class=tokenizer,
                optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
                callbacks=[Tell()],
                args=GRPOConfig(
                    output_dir=scratch,
                    max_steps=steps,
                    # TRL generates nothing here; these four only have to agree with one another.
                    per_device_train_batch_size=2,
                    num_generations=2,
                    gradient_accumulation_steps=accumulation,
                    steps_per_generation=accumulation,
                    learning_rate=p.learning_rate,
                    max_grad_norm=p.max_grad_norm,
                    beta=0.0,
                    epsilon=p.clip_low,
                    epsilon_high=p.clip_high,
                    loss_type="dapo" if p.loss == "token_mean" else "grpo",
                    temperature=self._temperature,
                    activation_checkpointing=p.gradient_checkpointing,
                    bf16=p.dtype == "bfloat16" and gpu,
                    use_cpu=not gpu,
                    logging_steps=1,
                    logging_nan_inf_filter=False,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    seed=self._seed,
                ),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            history = [row for row in trainer.state.log_history if "loss" in row]
        metrics = [_metrics(row, trainer.ratios[step]) for step, row in enumerate(history)]
        broken = [int(row["step"]) for row in metrics if not all(map(math.isfinite, row.values()))]
        if broken:
            raise StageError(
                f"the loss or the gradient is not finite in step {broken[0]} of {steps}; no policy was written",
                where=str(out),
                fix="lower train.learning_rate, or look for extreme advantages in the advantages table",
            )
        model.config.use_cache = use_cache  # Trainer switches it off, and whoever loads the policy would sample slowly
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        _save_state(optimizer, model, out_state)
        return metrics


@dataclass(frozen=True)
class _MicroBatch:
    """Rows of one forward pass, and the rows and completion tokens of the whole optimizer step they belong to."""

    rows: list[TrainRow]
    step: int
    step_rows: int
    step_tokens: int
    parts: int


def _plan(groups: Sequence[Sequence[TrainRow]], params: TrainParams) -> tuple[list[_MicroBatch], int, int]:
    """Micro-batches in order, the number of optimizer steps, and the micro-batches in each of them.

    Rows without advantage are dropped, those that remain sorted by length so that a micro-batch pads little. Every step has the
    same number of micro-batches, as Trainer needs; a step without any advantage keeps one row, whose gradient is zero.
    """
    size = params.minibatch_prompts
    steps = [[row for group in groups[at : at + size] for row in group] for at in range(0, len(groups), size)]
    kept = [[row for row in rows if _active(row)] or rows[:1] for rows in steps]
    parts = max(math.ceil(len(rows) / params.microbatch) for rows in kept)
    batches = []
    for index, (rows, everyone) in enumerate(zip(kept, steps, strict=True)):
        ordered = sorted(rows, key=lambda row: len(row.prompt_ids) + len(row.completion_ids))
        ordered += [replace(everyone[0], advantage=0.0, token_advantages=None)] * max(0, parts - len(ordered))
        tokens = sum(len(row.completion_ids) for row in everyone)
        for part in range(parts):
            chunk = ordered[part * len(ordered) // parts : (part + 1) * len(ordered) // parts]
            batches.append(_MicroBatch(chunk, index, len(everyone), tokens, parts))
    return batches, len(steps), parts


def _active(row: TrainRow) -> bool:
    return any(row.token_advantages) if row.token_advantages is not None else row.advantage != 0.0


def _collate(batch: _MicroBatch, pad: int, params: TrainParams) -> dict[str, torch.Tensor]:
    """Tensors that TRL's loss takes: prompts padded on the left, completions on the right."""
    import torch

    rows = batch.rows
    before = max(len(row.prompt_ids) for row in rows)
    after = max(len(row.completion_ids) for row in rows)
    prompts = torch.full((len(rows), before), pad)
    completions = torch.full((len(rows), after), pad)
    prompt_mask, completion_mask = torch.zeros_like(prompts), torch.zeros_like(completions)
    logprobs = torch.zeros(len(rows), after)
    advantages = torch.zeros(len(rows), after)
    for index, row in enumerate(rows):
        length = len(row.completion_ids)
        prompts[index, before - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
        prompt_mask[index, before - len(row.prompt_ids) :] = 1
        completions[index, :length] = torch.tensor(row.completion_ids)
        completion_mask[index, :length] = 1
        logprobs[index, :length] = torch.tensor(row.logprobs)
        advantages[index, :length] = torch.tensor(row.token_advantages or [row.advantage] * length)
    if params.loss == "sequence_mean":
        # TRL averages over the rows of each micro-batch; the rows left out must count too.
        advantages *= len(rows) * batch.parts / batch.step_rows
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": completion_mask,
        "old_per_token_logps": logprobs,
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(float(batch.step_tokens)),
        "step": torch.tensor(batch.step),
    }


def _trainer_class() -> Any:
    """The GRPOTrainer that takes its batches as they are stored; made here so that importing this module needs no TRL."""
    import datasets
    import torch
    import transformers
    from trl import GRPOTrainer

    class StoredGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped
        def __init__(self, *, stored: list[dict[str, torch.Tensor]], **kwargs: Any) -> None:
            self._stored = stored
            self._last_logps: torch.Tensor | None = None
            self.ratios: dict[int, list[torch.Tensor]] = defaultdict(list)
            placeholder = datasets.Dataset.from_dict({"prompt": [""] * len(stored)})
            super().__init__(reward_funcs=_no_reward, train_dataset=placeholder, **kwargs)

        def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
            return torch.utils.data.DataLoader(self._stored, batch_size=None, shuffle=False)  # type: ignore[arg-type]

        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            prepared: dict[str, Any] = transformers.Trainer._prepare_inputs(self, inputs)
            return prepared

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self._last_logps = result[0].detach()
            return result

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            loss = super()._compute_loss(model, inputs)
            ratio = torch.exp(self._last_logps - inputs["old_per_token_logps"])
            self.ratios[int(inputs["step"])].append(ratio[inputs["completion_mask"].bool()].cpu())
            return loss

    return StoredGRPOTrainer


def _no_reward(**kwargs: Any) -> list[float]:
    raise AssertionError("rewards are stored, never computed here")


def _metrics(row: dict[str, Any], ratios: list[torch.Tensor]) -> dict[str, float]:
    import torch

    def number(key: str) -> float:
        return math.nan if row[key] is None else float(row[key])  # TRL logs None where all it averages is NaN

    ratio = torch.cat(ratios).double()
    return {
        "step": number("step"),
        "loss": number("loss"),
        "grad_norm": number("grad_norm"),
        "entropy": number("entropy"),
        "clipped_low_share": number("clip_ratio/low_mean"),
        "clipped_high_share": number("clip_ratio/high_mean"),
        "ratio_min": ratio.min().item(),
        "ratio_max": ratio.max().item(),
        # Schulman's k3 estimator of KL(behaviour || policy), http://joschu.net/blog/kl-approx.html
        "approx_kl": (ratio - 1 - ratio.log()).mean().item(),
    }


def _named(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _save_state(optimizer: torch.optim.Optimizer, model: Any, folder: Path) -> None:
    """AdamW's moments as safetensors, `<parameter>/<moment>`: no pickle, readable by other tools."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    moments = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in _named(model)
        for key, value in optimizer.state[parameter].items()
    }
    save_file(moments, folder / STATE_FILE)


def _load_state(optimizer: torch.optim.Optimizer, model: Any, folder: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / STATE_FILE
    fix = "the state must come from the round that made the policy; delete that round and run it again"
    try:
        moments = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the optimizer state cannot be loaded: {error}", where=str(path), fix=fix) from error
    found = {key: value.shape for key, value in moments.items()}
    wanted = {f"{name}/step": torch.Size() for name, _ in _named(model)} | {
        f"{name}/{key}": parameter.shape for name, parameter in _named(model) for key in ("exp_avg", "exp_avg_sq")
    }
    if wrong := sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)):
        raise CheckpointError(
            f"the optimizer state does not fit the policy: {wrong[0]} is missing, too many or of another shape",
            where=str(path),
            fix=fix,
        )
    for name, parameter in _named(model):
        optimizer.state[parameter] = {
            "step": moments[f"{name}/step"],
            **{key: moments[f"{name}/{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
        }
