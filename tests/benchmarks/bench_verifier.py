r"""Speed of the mathematical verifier: against trl.rewards.accuracy_reward, and with hostile answers among good ones.

    python tests/benchmarks/bench_verifier.py COMPLETIONS.jsonl

COMPLETIONS: lines of {gold, completions: [{text}]}. Each completion gets its last number, the answer it states, in a \boxed.
Both verifiers judge the same rows in one run on this machine; all verdicts that differ are listed.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from papo.core.answers import extract_answer
from papo.engines.protocols import Verdict, VerifyItem
from papo.engines.verifiers.math_verify import MathVerifier, compare, in_children
from papo.params import ScoreOrmParams
from papo.schemas import Grading

_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+")

TEMPLATES = (
    "9^{{9^{{9^{0}}}}}",
    "{0}000000!",
    "(x+y+z+w+{0})^{{200}}",
    "\\sum_{{i=1}}^{{10^{{9}}}} \\frac{{{0}}}{{i!}}",
    "1" + " " * 10_000 + "{0}",
    "7" * 10**6 + "{0}",
    "\u202e\x00\ud800 {0} \u0667",
    "(" * 400 + "{0}" + ")" * 400,
    "\\sqrt{{" * 120 + "{0}" + "}}" * 120,
    "\\frac{{1}}{{" * 90 + "{0}" + "}}" * 90,
)


def rewritten(path: Path) -> list[VerifyItem]:
    """The real completions, each with the last number of its text in a box at its end."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [(row["gold"], one["text"]) for row in rows for one in row["completions"]]
    return [VerifyItem(gold, f"{text}\n\\boxed{{{stated(text)}}}") for gold, text in texts]


def stated(text: str) -> str:
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else ""


def hostile(count: int) -> list[VerifyItem]:
    """Answers of ten kinds that are made to cost time or memory, no two the same."""
    return [
        VerifyItem("x+8", f"\\boxed{{{TEMPLATES[number % len(TEMPLATES)].format(number)}}}") for number in range(count)
    ]


def good(count: int) -> list[VerifyItem]:
    """Answers that take algebra, one in ten of them wrong."""
    return [
        VerifyItem(f"{number}x+1", f"\\boxed{{1+x*{number + (number % 10 == 0)}}}") for number in range(1, count + 1)
    ]


def timed(verifier: MathVerifier, items: Sequence[VerifyItem]) -> tuple[list[Verdict], float]:
    start = time.perf_counter()
    verdicts = verifier.verify(items, lambda _: None)
    return verdicts, time.perf_counter() - start


def against_trl(items: Sequence[VerifyItem], workers: int) -> None:
    from trl.rewards import accuracy_reward

    logging.disable(logging.CRITICAL)
    verdicts, ours_s = timed(MathVerifier(workers=workers), items)
    start = time.perf_counter()
    theirs = accuracy_reward([[{"content": item.completion}] for item in items], [item.gold for item in items])
    theirs_s = time.perf_counter() - start
    print(
        f"{len(items)} completions; ours {len(items) / ours_s:.0f}/s, trl {len(items) / theirs_s:.0f}/s: {theirs_s / ours_s:.1f} times"
    )
    differ = [(item, v, other) for item, v, other in zip(items, verdicts, theirs, strict=True) if v.score != other]
    print(f"verdicts that differ: {len(differ)}")
    for item, verdict, other in differ:
        print(f"  gold {item.gold!r}, box {verdict.extracted!r}: ours {verdict.score} ({verdict.status}), trl {other}")


def among_hostile(goods: int, hostiles: int, timeout_s: float, workers: int) -> None:
    verifier = MathVerifier(timeout_s=timeout_s, workers=workers)
    bad, fine = hostile(hostiles), good(goods)
    step = len(fine) // len(bad)
    mixed = [item for place, one in enumerate(bad) for item in (one, *fine[place * step : (place + 1) * step])]
    verdicts, alone_s = timed(verifier, fine)
    mixed_verdicts, mixed_s = timed(verifier, mixed)
    found = [v for item, v in zip(mixed, mixed_verdicts, strict=True) if item.gold == "x+8"]
    statuses = Counter(v.status for v in found)
    limits_s = statuses["timeout"] * timeout_s / workers
    print(
        f"{goods} good alone {alone_s:.1f} s; with {hostiles} hostile {mixed_s:.1f} s, of which their limits {limits_s:.1f} s"
    )
    print(
        f"  beyond their limits: {(mixed_s - limits_s) / alone_s:.2f} times the good alone; hostile: {dict(statuses)}"
    )
    print(
        f"  right among the good: {sum(v.score == 1.0 for v in verdicts)}; right among the hostile: {sum(v.score == 1.0 for v in found)}"
    )


def longest_hold(count: int, timeout_s: float) -> None:
    """How long one hostile answer keeps a child busy, kill and new child included: the time between two outcomes of a single child."""
    pairs = [(item.gold, extract_answer(item.completion) or "", Grading()) for item in [*good(1), *hostile(count)]]
    times, outcomes, last = [], Counter[str](), 0.0
    for _, outcome in in_children(compare, pairs, timeout_s=timeout_s, workers=1):
        now = time.perf_counter()
        times += [now - last] if last else []  # the first has the start of the pool in it
        outcomes[outcome] += 1
        last = now
    print(
        f"longest hold of a child by one of {count} hostile answers: {max(times):.2f} s at a limit of {timeout_s} s; {dict(outcomes)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the mathematical verifier.")
    parser.add_argument("completions", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=1.0, help="of the hostile part")
    args = parser.parse_args()
    against_trl(rewritten(args.completions), args.workers)
    among_hostile(10_000, 1_000, args.timeout_s, args.workers)
    longest_hold(50, ScoreOrmParams().timeout_s)


if __name__ == "__main__":
    main()
