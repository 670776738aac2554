"""One of two processes that train online together: python -m torch.distributed.run ... online_worker.py POLICY FOLDER."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
from test_online import ANSWERS, Process, outcome, replay
from transformers import AutoTokenizer, LlamaForCausalLM

from papo import PAPOConfig, PAPOTrainer

FIRST, SECOND, THIRD, LAST = ANSWERS
# Variant, whether the process reward is async, and the prompts. Nothing of the last two is worth asking about.
CASES = {
    "papo": ("papo", False, [FIRST, SECOND, THIRD]),
    "capo": ("capo", False, [FIRST, SECOND, THIRD]),
    "one asks nobody": ("papo", True, [FIRST, LAST, THIRD]),
}


class Recording(PAPOTrainer):
    """Keeps what its generation batch was made of."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.batch = {
            "prompts": [row["prompt"] for row in inputs],
            "completions": self.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True),
            "advantages": output["advantages"].tolist(),
            "extra": list(self._logs["extra"]["length"]),
        }
        return output


def train(policy: str, folder: Path, variant: str, later: bool, prompts: list[str]) -> dict[str, Any]:
    """One step; what this process saw of it."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    judge = Process(critique=variant == "capo")

    async def ask(**given: Any) -> list[Any]:
        return judge(**given)

    trainer = Recording(
        model=LlamaForCausalLM.from_pretrained(policy),
        args=PAPOConfig(
            output_dir=str(folder / "out"), variant=variant, per_device_train_batch_size=6, num_generations=4, max_steps=1,
            learning_rate=1e-3, max_completion_length=32, activation_checkpointing=False, bf16=False, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, shuffle_dataset=False, ddp_backend="gloo",
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "answer": [ANSWERS[prompt] for prompt in prompts]}),
        processing_class=tokenizer,
        rollout_func=replay(tokenizer),
        outcome_reward=outcome,
        process_reward=ask if later else judge,
    )  # fmt: skip
    before = total(trainer.model)
    trainer.train()
    facts = {"asked": judge.asked, "signals": trainer.signals[0], "before": before, "weights": total(trainer.model)}
    return facts | trainer.batch


def total(model: Any) -> float:
    return sum(float(weight.detach().double().sum()) for weight in model.parameters())


if __name__ == "__main__":
    out = Path(sys.argv[2])
    found = {name: train(sys.argv[1], out, *case) for name, case in CASES.items()}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
