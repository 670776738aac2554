"""Peak memory of the loss, forward and backward, from hidden states on: papo's chunks of logits against all logits at once.

    python tests/benchmarks/bench_loss_memory.py                      # vocabulary 152,000, 8,192 tokens; some minutes for each way
    python tests/benchmarks/bench_loss_memory.py --tokens 1024 --vocabulary 32000

Each way runs in a process of its own; its peak is that of resident memory less what was resident before the loss, with states and
projection made. The gradients of both, by default 29 MB and 545 MB, are in every peak.

full     logits of all tokens by the projection, then TRL's selective_log_softmax, which trains in some three times the memory of the logits
entropy  the same logits, then torch's cross_entropy
chunks   TRL's own, as its GRPOTrainer takes them
papo     with train.logits_mb at its default

A way that needs more memory than there is is left out, with a line that says so; all are measured with half the tokens, too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys

import psutil

ROW = 1024  # tokens of a sequence, of which selective_log_softmax takes one at a time
NEEDS = {"full": 3.2, "entropy": 3.2, "chunks": 2.0, "papo": 0.1}  # about, in sizes of all logits


def child(way: str, tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """Peak in MiB, seconds, and norms of both gradients."""
    import resource
    import time

    import torch

    from papo.engines.training.losses import clipped_surrogate
    from papo.engines.training.projection import Projection
    from papo.params import TrainParams

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if way == "full":
        from trl.trainer.utils import selective_log_softmax
    elif way == "chunks":
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    # In place, so that nothing before the loss takes more than what stays.
    weight = torch.empty(vocabulary, width).normal_(std=width**-0.5).requires_grad_()
    hidden = torch.empty(tokens, width).normal_().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    advantages, behaviour = torch.randn(tokens), torch.full((tokens,), -math.log(vocabulary) - 0.5)
    # A few numbers first: what torch sets up once is no part of the loss.
    (torch.ones(8, width, requires_grad=True) @ torch.ones(width, 64)).logsumexp(-1).sum().backward()

    def objective(logprobs: torch.Tensor, entropies: torch.Tensor | None, part: slice) -> torch.Tensor:
        return clipped_surrogate(logprobs, behaviour[part], advantages[part], 0.2, 0.28) / tokens

    before, started = psutil.Process().memory_info().rss / 2**20, time.perf_counter()
    if way == "papo":
        loss = Projection(weight, None, 1.0, TrainParams().logits_mb).loss(hidden, targets, objective).loss
    elif way == "chunks":
        logprobs, *_ = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy")
        )
        loss = objective(logprobs, None, slice(None)).sum()
    else:
        logits = torch.nn.functional.linear(hidden.view(-1, min(ROW, tokens), width), weight)
        if way == "full":
            logprobs = selective_log_softmax(logits, targets.view(logits.shape[:2])).flatten()
        else:
            logprobs = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        del logits
        loss = objective(logprobs, None, slice(None)).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before,
        "seconds": time.perf_counter() - started,
        "hidden": hidden.grad.double().norm().item(),
        "weight": weight.grad.double().norm().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="a multiple of 2,048, or fewer than that")
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=1, help="of which the median is told; a peak hardly differs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.tokens, args.vocabulary, args.width)))
        return
    print(f"vocabulary {args.vocabulary}, width {args.width}, float32\n")
    print("| tokens | way | peak, MiB | papo's is |\n|---|---|---|---|", flush=True)
    for tokens in (args.tokens // 2, args.tokens):
        ours = measured("papo", tokens, args)
        print(f"| {tokens} | papo | {ours['peak']:.0f} | |", flush=True)
        for way in ("chunks", "entropy", "full"):
            logits = 4 * tokens * args.vocabulary
            there = psutil.virtual_memory().available
            if NEEDS[way] * logits > 0.75 * there:
                needs, has = NEEDS[way] * logits / 2**30, there / 2**30
                print(f"| {tokens} | {way} | not run: takes some {needs:.0f} GiB, {has:.0f} are there | |", flush=True)
                continue
            found = measured(way, tokens, args)
            for name in ("hidden", "weight"):
                assert math.isclose(found[name], ours[name], rel_tol=1e-4), f"{way}: another gradient of {name}"
            print(f"| {tokens} | {way} | {found['peak']:.0f} | {ours['peak'] / found['peak']:.3f} |", flush=True)


def measured(way: str, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    shape = {"--tokens": tokens, "--vocabulary": args.vocabulary, "--width": args.width}
    command = [sys.executable, __file__, "--child", way, *(str(word) for pair in shape.items() for word in pair)]
    # From a process without torch: a child begins with the peak of the one that it was forked from.
    runs = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        for _ in range(args.repeats)
    ]
    return dict(sorted(runs, key=lambda run: run["peak"])[len(runs) // 2])


if __name__ == "__main__":
    main()
