"""What each saving does to the gradient: relative difference to that of TRL's GRPOTrainer, with nothing skipped and all rows padded.

    python tests/benchmarks/gradient_table.py        # some minutes; ends with an error where a difference is above 1e-4

Each line turns one setting of `train` on and leaves the others off; the last two have all on. Models and responses are those of
bench_training.py, fewer: 32 responses of 8 prompts, half of them with advantage zero, one of eight tokens clipped; float32. A cell is
|g - g_TRL| / |g_TRL| over all parameters; `positions` are those that go through the layers of the embedded policy, as a share of TRL's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from benchmarks.bench_training import PARAMS, difference, our_steps, responses, their_steps, with_zeros, write_model

from papo.cli import quiet_environment
from papo.errors import SetupError
from papo.params import TrainParams

LIMIT = 1e-4
LOSSES = ("token_mean", "sequence_mean", "dr_grpo")
OFF: dict[str, Any] = {
    "skip_zero": False,
    "share_prompts": False,
    "packing": "off",
    "logits_mb": None,
    "microbatch_tokens": 1_000_000,
    "gradient_checkpointing": False,
}
ALL = {"skip_zero": True, "share_prompts": True, "packing": "auto", "logits_mb": 1, "microbatch_tokens": 1024}
LINES: dict[str, dict[str, Any]] = {
    "none": {},
    "skip_zero": {"skip_zero": True},
    "share_prompts": {"share_prompts": True},
    "packing: on": {"packing": "on"},
    "logits_mb: 1": {"logits_mb": 1},
    "microbatch_tokens: 512": {"microbatch_tokens": 512},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "all but gradient_checkpointing": ALL,
    "all (which shares no prompts)": ALL | {"gradient_checkpointing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--scale", type=float, default=0.25, help="of the lengths of qwen2")
    args = parser.parse_args()
    quiet_environment()
    torch.set_num_threads(1)
    cells: dict[str, list[str]] = {line: [] for line in LINES}
    positions: dict[str, str] = {}
    worst = 0.0
    for name in ("embedded", "qwen2"):
        with tempfile.TemporaryDirectory() as folder:
            policy = Path(folder)
            write_model(name, policy)
            groups = with_zeros(responses(policy, args.prompts, 4, args.scale if name == "qwen2" else 1.0))
            for loss in LOSSES:
                plain = PARAMS.model_copy(update={"loss": loss})
                theirs = their_steps(policy, groups, 8, "batch", plain)
                for line, settings in LINES.items():
                    params = TrainParams.model_validate(plain.model_dump() | OFF | settings)
                    try:
                        ours = our_steps(policy, groups, params).steps
                    except SetupError:
                        cells[line].append("not with its attention")
                        continue
                    positions.setdefault(line, f"{ours.padded_tokens[0] / theirs.padded_tokens[0]:.2f}")
                    apart = difference(ours.gradients[0], theirs.gradients[0])
                    worst = max(worst, apart)
                    cells[line].append(f"{apart:.1e}")
                print(f"{name}, {loss}: done", file=sys.stderr, flush=True)
    heads = [f"{name}, {loss}" for name in ("embedded", "qwen2") for loss in LOSSES]
    print(f"| on | positions | {' | '.join(heads)} |\n|---|---{'|---' * len(heads)}|")
    for line, found in cells.items():
        print(f"| {line} | {positions.get(line, '')} | {' | '.join(found)} |")
    if worst > LIMIT:
        sys.exit(f"a difference is above {LIMIT:g}: {worst:.1e}")


if __name__ == "__main__":
    main()
