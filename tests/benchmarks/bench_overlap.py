"""How long a round takes whose verifier and judge take as long as its sampling, with and without scoring what is stored already.

    python tests/benchmarks/bench_overlap.py

Real are the stages rollout, score_orm and score_prm from tables to tables, the sampler, the judge with its store, and what overlaps them;
the servers that they ask are stand-ins of a set latency in processes of their own, and the verifier is one that takes its time for
each response. Ideal is the longest stage; without overlap it is the sum.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from judging import judging, store_of
from servers.chat import ChatProcess, chat_process
from servers.completions import completions_process, save_policy

from papo.ahead import Ahead
from papo.engines.judges import make_judge
from papo.engines.judges.model import Purpose
from papo.engines.protocols import Progress, Verdict, VerifyItem
from papo.engines.recompute import PolicyRecomputer
from papo.engines.samplers import make_sampler
from papo.params import AdvantageParams, RolloutParams, ScoreOrmParams, ScorePrmParams
from papo.schemas import OK, PROBLEMS, problem_id
from papo.stages import rollout, score_orm, score_prm
from papo.store.layout import Workspace
from papo.store.manifest import Context
from papo.store.tables import write_rows


class Round(NamedTuple):
    """Seconds of each stage by its manifest, and of all three from the first to the end of the last."""

    rollout: float
    score_orm: float
    score_prm: float
    wall: float


class SlowVerifier:
    """Takes so many seconds a response; half of the answers are right."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        time.sleep(self._seconds * len(items))
        progress(len(items))
        right = [hashlib.sha256(f"{item.gold} {item.completion}".encode()).digest()[0] % 2 for item in items]
        return [Verdict(float(value), "1", OK) for value in right]

    def versions(self) -> dict[str, str]:
        return {}


def one_round(given: argparse.Namespace, sampling: ChatProcess, judge: ChatProcess, *, overlap: bool) -> Round:
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        policy = save_policy(workspace.warmstart, 0)
        prompts = [f"{left}+{right}=?\n" for left in range(1, 99) for right in range(1, 99)][: given.prompts]
        rows = [
            {"problem_id": problem_id(prompt, "1"), "prompt": prompt, "answer": "1", "grading": "{}", "source": "made",
             "split": "train"}
            for prompt in prompts
        ]  # fmt: skip
        workspace.train_problems.parent.mkdir(parents=True)
        write_rows(workspace.train_problems, PROBLEMS, rows)
        params = RolloutParams.model_validate(
            {
                "engine": "vllm-server", "prompts_per_round": given.prompts, "prompts_per_shard": given.shard,
                "max_new_tokens": 24, "server": {"base_urls": [sampling.url], "concurrency": given.concurrency},
            }
        )  # fmt: skip
        context = Context(work=workspace.work)
        prm = ScorePrmParams.model_validate(judging(judge, model={"concurrency": given.concurrency}))
        asker = make_judge(prm, Purpose(store_of(workspace), "run", 0, "prm"))
        verifier = SlowVerifier(given.latency / given.concurrency)
        sampler = make_sampler(
            params, policy, temperature=1.0, top_p=1.0, max_new_tokens=params.max_new_tokens, logs=workspace.work
        )
        engine = rollout.Engine(sampler, PolicyRecomputer(policy, temperature=1.0))
        engine.sampler.fits(prompts[0])  # loads the policy
        ahead = Ahead(workspace.train_problems, AdvantageParams(variant="prm"), verifier, asker) if overlap else None
        rollouts, orm, scores = (workspace.table(0, name) for name in ("rollouts", "orm", "prm"))
        started = time.perf_counter()
        with ahead or nullcontext():
            first = rollout.run(
                params, rollout.Inputs(0, 0, workspace.train_problems, policy), rollouts,
                engine=engine, finished=ahead.add if ahead else None, context=context,
            )  # fmt: skip
            second = score_orm.run(
                ScoreOrmParams(), score_orm.Inputs(0, rollouts, workspace.train_problems), orm,
                engine=ahead.verifier() if ahead else verifier, context=context,
            )  # fmt: skip
            inputs = score_prm.Inputs(0, "prm", rollouts, orm, workspace.train_problems)
            third = score_prm.run(
                prm, inputs, scores, engine=(ahead.judge() if ahead else None) or asker, context=context
            )
        wall = time.perf_counter() - started
        assert first.rows == second.rows == third.rows == 8 * given.prompts
        return Round(first.seconds, second.seconds, third.seconds, wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64, help="of eight responses each (default: 64)")
    parser.add_argument("--shard", type=int, default=4, help="prompts a shard (default: 4)")
    parser.add_argument("--latency", type=float, default=0.4, help="seconds of each server (default: 0.4)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time (default: 16)")
    parser.add_argument("--runs", type=int, default=3, help="of each (default: 3)")
    given = parser.parse_args()
    apart, together = [], []
    with (
        completions_process(latency_s=given.latency) as sampling,
        chat_process(latency_s=given.latency, reply="servers.replies:levels") as judge,
    ):
        for _ in range(given.runs):
            apart.append(one_round(given, sampling, judge, overlap=False))
            together.append(one_round(given, sampling, judge, overlap=True))
            print("one after the other:", *(f"{name} {value:.2f} s" for name, value in apart[-1]._asdict().items()))
            print("        overlapping:", *(f"{name} {value:.2f} s" for name, value in together[-1]._asdict().items()))
    ratios = [both.wall / max(one[:3]) for one, both in zip(apart, together, strict=True)]
    print(f"the round takes {statistics.median(ratios):.2f} times its longest stage; without overlap ", end="")
    print(f"{statistics.median(one.wall / max(one[:3]) for one in apart):.2f} times")


if __name__ == "__main__":
    main()
