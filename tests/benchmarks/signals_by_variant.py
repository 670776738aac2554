"""The signals of every variant on groups of real responses: JSON Lines whose rows have `completions` with `text` and `correct`.

    python tests/benchmarks/signals_by_variant.py ../shared/data/gsm8k_sampled_G4.jsonl

The outcome is `correct`. The process score is synthetic, as no judge read these responses: 0, 0.5 or 1, drawn by a fixed seed, higher for
correct ones; every twentieth call fails. For `capo` every tenth step is called wrong. Tokens are words.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from papo.core.advantages import VARIANTS, Advantages, compute_advantages, process_needed
from papo.core.credit import split_steps, token_advantages, token_steps
from papo.core.signals import round_signals, verification_flags

SHOWN = (
    "accuracy", "zero_advantage_share", "zero_advantage_share_all_correct", "zero_advantage_share_all_wrong",
    "groups_two_correct_share", "groups_process_active_share", "advantage_mean_correct", "advantage_min_correct",
    "advantage_mean_wrong", "negative_correct_share", "inversions", "process_advantage_share", "prm_mean_correct",
    "judge_failure_share", "length_mean", "length_prm_correlation", "verification_share",
)  # fmt: skip


def signals_of(path: Path) -> dict[str, dict[str, float]]:
    """Variant -> its signals."""
    groups = [json.loads(line)["completions"] for line in path.read_text(encoding="utf-8").splitlines()]
    responses: list[dict[str, Any]] = [response for group in groups for response in group]
    ids = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    orm = np.array([float(response["correct"]) for response in responses])
    random = np.random.default_rng(0)
    shares = np.where(orm[:, None] == 1.0, [[0.1, 0.4, 1.0]], [[0.6, 0.9, 1.0]])
    scores = (random.random(orm.size)[:, None] > shares).sum(axis=1) / 2
    failed = random.random(orm.size) < 0.05
    texts = [response["text"] for response in responses]
    words = [[match.start() for match in re.finditer(r"\S+", text)] for text in texts]
    steps = [split_steps(text) for text in texts]
    wrong = [(random.random(len(found)) < 0.1).astype(float) for found in steps]
    found = {}
    for variant in (*VARIANTS, "capo"):
        lam = 0.5 if variant == "convex" else 1.0
        asked = process_needed(variant, orm, ids)
        prm = np.where(asked & ~failed, scores, np.nan)
        if variant == "capo":
            critiques = [
                votes[token_steps(starts, spans)] if known else None
                for votes, starts, spans, known in zip(wrong, words, steps, ~np.isnan(prm), strict=True)
            ]
            advantages = Advantages(*token_advantages(orm, critiques, [len(starts) for starts in words], ids)[:3])
        else:
            advantages = compute_advantages(orm, prm, ids, variant=variant, lam=lam)
        found[variant] = round_signals(
            orm_scores=orm,
            prm_scores=prm,
            group_ids=ids,
            advantages=advantages,
            completion_lengths=[float(len(starts)) for starts in words],
            truncated=np.zeros(orm.size),
            prm_statuses=np.where(~asked, "not_asked", np.where(failed, "timeout", "ok")).tolist(),
            verification=verification_flags(texts),
            variant=variant,
            lam=lam,
        )
    return found


def main() -> None:
    found = signals_of(Path(sys.argv[1]))
    print(f"| signal | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for name in SHOWN:
        cells = (f"{signals[name]:.3f}" if name in signals else "-" for signals in found.values())
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
