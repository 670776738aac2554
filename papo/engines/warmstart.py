"""The first policy: a small Llama decoder trained on traces with TRL's SFTTrainer, or a checkpoint that exists already."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papo.engines.policy import keep_origin, load_checkpoint
from papo.engines.protocols import Progress, WarmStarter
from papo.errors import DataError
from papo.params import WarmstartParams
from papo.store.faults import reached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def make_warm_starter(params: WarmstartParams) -> WarmStarter:
    """Training on traces, or the checkpoint that `warmstart.checkpoint` names."""
    return CheckpointWarmStarter(params) if params.checkpoint is not None else SftWarmStarter(params)


class CheckpointWarmStarter:
    """Takes a policy that exists: a folder, or a model id of the Hugging Face hub. Safetensors only, no remote code."""

    def __init__(self, params: WarmstartParams) -> None:
        assert params.checkpoint is not None
        self._checkpoint, self._revision = params.checkpoint, params.revision

    def steps(self) -> int:
        return 1

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers")}

    def fit(self, traces: Sequence[tuple[str, str]], out: Path, progress: Progress) -> list[dict[str, float]]:
        """Copies the policy to `out`.

        Raises:
            CheckpointError: there is no such checkpoint, or it cannot be loaded.
        """
        model, tokenizer = load_checkpoint(
            self._checkpoint,
            dtype="auto",
            where=f"warmstart.checkpoint = {self._checkpoint}",
            fix="name a folder with config.json, tokenizer and *.safetensors, or a model id of the hub",
            revision=self._revision,
        )
        reached("write", out)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        keep_origin(out, out, name=self._checkpoint, revision=self._revision)
        progress(1)
        return []


class SftWarmStarter:
    """Supervised training on (prompt, completion) pairs; the loss is on the completions only."""

    def __init__(self, params: WarmstartParams) -> None:
        self._params = params

    def steps(self) -> int:
        return self._params.steps

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers", "trl")}

    def fit(self, traces: Sequence[tuple[str, str]], out: Path, progress: Progress) -> list[dict[str, float]]:
        if not traces:
            raise DataError(
                "there are no traces to train a first policy on",
                where="data/problems/traces.parquet",
                fix="set warmstart.checkpoint to a folder or a model id; only the sources `sums` and `programs` generate traces",
            )
        import datasets
        import torch
        from transformers import PrinterCallback, TrainerCallback, set_seed
        from trl import SFTConfig, SFTTrainer

        from papo.engines.tokenizer import build_tokenizer, symbols_of

        p = self._params
        set_seed(p.seed)
        tokenizer = build_tokenizer(symbols_of(text for trace in traces for text in trace))
        model = _build_model(p, tokenizer)

        parts = _parts(p.batch_size, p.microbatch)

        class LengthSortedTrainer(SFTTrainer):  # type: ignore[misc]  # TRL is untyped
            """Batches are drawn at random; within one, rows are sorted so that its micro-batches pad little."""

            def _get_train_sampler(self, train_dataset: Any = None) -> list[int]:
                lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
                return _sorted_batches(lengths, p.steps, p.batch_size, p.seed)

        class Tell(TrainerCallback):  # type: ignore[misc]  # transformers' base class is untyped
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                progress(1)

        with tempfile.TemporaryDirectory() as scratch:
            trainer = LengthSortedTrainer(
                model=model,
                processing_class=tokenizer,
                train_dataset=datasets.Dataset.from_dict(
                    {"prompt": [prompt for prompt, _ in traces], "completion": [text for _, text in traces]}
                ),
                args=SFTConfig(
                    output_dir=scratch,
                    max_steps=p.steps,
                    per_device_train_batch_size=p.batch_size // parts,
                    gradient_accumulation_steps=parts,
                    learning_rate=p.learning_rate,
                    lr_scheduler_type="cosine",
                    warmup_steps=round(p.warmup_share * p.steps),
                    weight_decay=0.01,
                    seed=p.seed,
                    data_seed=p.seed,
                    logging_steps=min(50, p.steps),
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    bf16=False,
                    use_cpu=not torch.cuda.is_available(),
                    activation_checkpointing=False,
                    dataloader_pin_memory=False,
                    max_length=None,
                ),
                callbacks=[Tell()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            history = trainer.state.log_history
        model.config.use_cache = True  # Trainer switches it off, and whoever loads the policy would sample slowly
        reached("write", out)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return [
            {
                "step": float(row["step"]),
                "loss": float(row["loss"]),
                "token_accuracy": float(row["mean_token_accuracy"]),
            }
            for row in history
            if "loss" in row
        ]


def _parts(batch_size: int, microbatch: int) -> int:
    """The fewest equal parts of a batch that are no larger than `microbatch`."""
    return next(
        parts for parts in range(1, batch_size + 1) if batch_size % parts == 0 and batch_size // parts <= microbatch
    )


def _sorted_batches(lengths: Sequence[int], steps: int, size: int, seed: int) -> list[int]:
    """Row indices for `steps` batches of `size`: epochs of random order, each batch sorted by length."""
    stream = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += stream.sample(range(len(lengths)), len(lengths))
    batches = (order[at : at + size] for at in range(0, steps * size, size))
    return [row for batch in batches for row in sorted(batch, key=lengths.__getitem__)]


def _build_model(params: WarmstartParams, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = params.model
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            # The usual 0.02 is made for widths in the thousands; at 96 it costs most of the steps to leave the origin.
            initializer_range=shape.hidden_size**-0.5,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
