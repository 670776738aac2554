"""One optimizer step over 512 stored responses: papo's trainer with its defaults against TRL's GRPOTrainer, on one core, in one process.

    python tests/benchmarks/bench_training.py                  # some 40 minutes on a quiet core; ^C ends a model with the repeats it has
    python tests/benchmarks/bench_training.py --quick          # 64 responses, one repeat: whether it runs, no figures
    python tests/benchmarks/bench_training.py --profile        # also by torch's own profiler
    python tests/benchmarks/bench_training.py --model qwen2 --scale 1     # responses as long as the real ones: hours
    python tests/benchmarks/bench_training.py --model qwen2-0.5b --device cuda    # on a GPU, in bfloat16; 1,024 to 4,096 tokens

Models: `embedded`, the embedded policy (0.3 M parameters, vocabulary of some 20; 64 prompts with 8 responses each), and `qwen2`, of Qwen2's
shape (25 M, vocabulary 32,000; 128 prompts with 4). Only by name `qwen2-0.5b`, of Qwen2.5-0.5B's shape (16 prompts with 8), for a GPU:
there peak memory and the share of its rate are told, too. Tokens are random; lengths are drawn from the quantiles below, those of
`qwen2` times --scale. Log-probs are the model's own with noise, so that some ratios are clipped. `zeros`: whole groups have advantage zero,
55 % of the responses, rounded down to groups. Tokens per second count all completion tokens of all responses as work.

TRL gives a step in two ways: `TRL` as it is, which pads all rows to the longest of the step, and `TRL, trimmed`, with each micro-batch cut
to its own longest row before TRL's loss has it, which TRL does not do. Each has the best of several batch sizes, found on an eighth of the
rows before. Sides take turns; a ratio is that of two steps of one repeat, and of the repeats the median, the least and the most are told.
As TRL computes rows with advantage zero like any other, it has the responses with zeros in one repeat, and those without in the next.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from benchmarks.bench_sampler import write_policy
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl_peer import Padding, Steps, trl_steps

from papo.cli import quiet_environment
from papo.engines.policy import load_policy
from papo.engines.protocols import TrainJob, TrainRow
from papo.engines.tokenizer import build_tokenizer
from papo.engines.training.devices import MakeOptimizer, OneDevice, trained
from papo.engines.training.forward import PolicyLoss
from papo.engines.training.trainer import GrpoTrainer
from papo.engines.warmstart import _build_model
from papo.params import TrainParams, WarmstartParams

Groups = Sequence[Sequence[TrainRow]]
Tensors = dict[str, torch.Tensor]

# Lengths in tokens of SmolLM2-135M's tokenizer of the 1,319 questions and 5,276 completions of the GSM8K sampling that
# openai/grade-school-math published (example_model_solutions.jsonl), an end-of-text token included; the longest had 1,527.
LEVELS = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 100)
PROMPTS = (24, 27, 33, 37, 42, 48, 53, 58, 64, 70, 78, 93, 105, 131, 139, 188)
COMPLETIONS = (3, 49, 61, 70, 83, 94, 106, 118, 131, 147, 167, 199, 232, 311, 367, 512)
ZEROS = 0.55
NOISE = 0.2  # of log-probs, in nats: about one token in eight is clipped
LARGE = "qwen2-0.5b"
SHAPES = {"embedded": (64, 8), "qwen2": (128, 4), LARGE: (16, 8)}  # prompts, responses of each
EVENLY = [(0, 1024), (100, 4096)]  # completions of the large one
BATCHES = (2, 4, 8, 16, 32, 64)
# A gradient before clipping is compared, and one step is to leave the weights about as they are.
PARAMS = TrainParams(minibatch_prompts=1_000_000, learning_rate=1e-6)


def write_model(name: str, folder: Path) -> None:
    """A random model with its tokenizer."""
    if name == "qwen2":
        write_policy(name, folder)
        return
    if name == LARGE:
        write_policy("qwen2", folder)  # for its tokenizer; its words are the first of the larger vocabulary
        shape = Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=8192, eos_token_id=31_999,
            pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        Qwen2ForCausalLM(shape).save_pretrained(folder)
        return
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    _build_model(WarmstartParams(), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def responses(
    policy: Path, prompts: int, size: int, scale: float, *, device: str = "cpu", evenly: bool = False, seed: int = 0
) -> list[list[TrainRow]]:
    """Groups of random tokens, none with advantage zero."""
    stream = np.random.default_rng(seed)
    model, _ = load_policy(policy, device=device)

    def lengths(quantiles: Sequence[int], count: int) -> list[int]:
        levels = LEVELS
        if evenly and quantiles is COMPLETIONS:
            levels, quantiles = zip(*EVENLY, strict=True)
        drawn = np.interp(stream.uniform(0, 100, count), levels, quantiles) * scale
        return [max(1, round(length)) for length in drawn.tolist()]

    def tokens(length: int) -> list[int]:
        return [int(token) for token in stream.integers(1, model.config.vocab_size - 1, length)]

    groups = []
    for length in lengths(PROMPTS, prompts):
        prompt, completions = tokens(length), [tokens(each) for each in lengths(COMPLETIONS, size)]
        advantages = stream.normal(size=size)
        groups.append(
            [
                TrainRow(prompt, ids, [], float(advantage))
                for ids, advantage in zip(completions, advantages - advantages.mean(), strict=True)
            ]
        )
    return [[_with_logprobs(model, row, stream) for row in group] for group in groups]


@torch.no_grad()
def _with_logprobs(model: Any, row: TrainRow, stream: np.random.Generator) -> TrainRow:
    ids = torch.tensor([row.prompt_ids + row.completion_ids], device=model.device)
    logits = model(ids, logits_to_keep=len(row.completion_ids) + 1).logits[0, :-1]
    own = logits.log_softmax(-1).gather(1, ids[0, len(row.prompt_ids) :, None])[:, 0].cpu().numpy()
    return replace(row, logprobs=np.minimum(own + stream.normal(0, NOISE, len(own)), 0.0).tolist())


def with_zeros(groups: Groups, share: float = ZEROS) -> list[list[TrainRow]]:
    """As many groups as `share` allows get advantage zero, in a random order."""
    zero = set(np.random.default_rng(1).permutation(len(groups))[: int(share * len(groups))].tolist())
    return [
        [replace(row, advantage=0.0) for row in group] if index in zero else list(group)
        for index, group in enumerate(groups)
    ]


class Watched(OneDevice):
    """Keeps the gradient as it is before clipping, and measures: a step goes from when the model is loaded, so with its planning."""

    def __init__(self, device: str) -> None:
        super().__init__(torch.device(device), bfloat16=device == "cuda")
        self.found = Steps()
        self.parts: dict[str, float] = defaultdict(float)

    def prepare(self, module: PolicyLoss, make: MakeOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        self._policy = module
        call, optimizer = super().prepare(module, make)
        decoder = call.model.get_decoder()
        decoder.register_forward_pre_hook(self._count, with_kwargs=True)
        self._timed_by_hooks(decoder, "backbone, forward")
        self._timed_by_hooks(call, "forward")
        optimizer.register_step_pre_hook(lambda *_: self._begin("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self._end("optimizer"))
        self.start()
        return call, optimizer

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._begin("backbone, backward")
        super().backward(loss, last=last)
        self._end("backbone, backward")

    def clip(self, max_norm: float) -> float:
        self._begin("clipping by norm")
        gradient = {name: parameter.grad for name, parameter in trained(self._policy).items()}
        self.found.gradients.append({name: tensor.clone() for name, tensor in gradient.items() if tensor is not None})
        norm = super().clip(max_norm)
        self._end("clipping by norm")
        return norm

    def start(self) -> None:
        settle(self.device.type, reset=True)
        self._positions = 0
        self._started = time.perf_counter(), time.process_time()

    def stop(self, steps: int) -> None:
        self.memory = settle(self.device.type)
        wall, cpu = self._started
        self.found.seconds.append(time.perf_counter() - wall)
        self.found.cpu_seconds.append(time.process_time() - cpu)
        self.found.padded_tokens.append(self._positions)
        self.start()

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._positions += kwargs["input_ids"].numel()

    def _timed_by_hooks(self, module: nn.Module, part: str) -> None:
        module.register_forward_pre_hook(lambda *_: self._begin(part))
        module.register_forward_hook(lambda *_: self._end(part))

    def _begin(self, part: str) -> None:
        self.parts[part] -= time.perf_counter()

    def _end(self, part: str) -> None:
        self.parts[part] += time.perf_counter()


def settle(device: str, *, reset: bool = False) -> float:
    """Waits for a GPU; the peak of its memory in MiB, counted anew from here with `reset`. On a CPU nothing, and 0."""
    if device != "cuda":
        return 0.0
    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**20


@dataclass
class Ours:
    """`steps` as those of the peer; MiB of a GPU; seconds by part; the metrics that the trainer gives of each step."""

    steps: Steps
    memory: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)


def our_steps(policy: Path, groups: Groups, device: str = "cpu", params: TrainParams = PARAMS) -> Ours:
    """What papo's trainer makes of `groups`."""
    if device == "cuda":
        params = params.model_copy(update={"dtype": "bfloat16", "microbatch_tokens": 32_768})
    trainer = GrpoTrainer(params, temperature=1.0, max_new_tokens=512, seed=0)
    devices = Watched(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = TrainJob(
            round=0, groups=groups, policy=policy, state=None, reference=None,
            out=folder / "policy", out_state=folder / "state", work=folder / "work",
        )  # fmt: skip
        metrics = trainer.train_on(devices, job, devices.stop)
    devices.found.losses = [row["loss"] for row in metrics]
    return Ours(devices.found, devices.memory, dict(devices.parts), metrics)


def their_steps(
    policy: Path, groups: Groups, per_device: int, padding: Padding, device: str = "cpu", params: TrainParams = PARAMS
) -> Steps:
    """What TRL makes of them."""
    from transformers import PreTrainedTokenizerFast

    model, _ = load_policy(policy, device=device)
    settle(device, reset=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy)
    return trl_steps(
        model, tokenizer, groups, params, per_device=per_device, padding=padding, bfloat16=device == "cuda"
    )


def difference(one: Tensors, other: Tensors) -> float:
    """Norm of the difference of two gradients, relative to the norm of the second."""
    assert one.keys() == other.keys()
    apart = sum((one[name] - other[name]).double().square().sum().item() for name in other)
    return float((apart / sum(tensor.double().square().sum().item() for tensor in other.values())) ** 0.5)


def best_batch(policy: Path, groups: Groups, padding: Padding, sizes: Sequence[int], device: str) -> int:
    """Of the batch sizes, if there are several, the fastest on an eighth of the rows: by CPU time, on a GPU by the clock."""
    if len(sizes) == 1:
        return sizes[0]
    part = groups[: max(1, len(groups) // 8)]
    rows = sum(map(len, part))
    found = {}
    for size in sizes:
        if rows % size == 0:
            steps = their_steps(policy, part, size, padding, device)
            found[size] = (steps.cpu_seconds if device == "cpu" else steps.seconds)[0]
    best = min(found, key=lambda size: found[size])
    told = ", ".join(f"{size}: {seconds:.1f}" for size, seconds in found.items())
    unit = "CPU seconds" if device == "cpu" else "seconds"
    print(f"  TRL padded to the longest of the {padding}, {unit} for {rows} responses by batch size {told}", flush=True)
    return best


THEIRS: dict[str, Padding] = {"TRL": "batch", "TRL, trimmed": "microbatch"}
OURS = ("zeros", "no zeros")


def compare(name: str, args: argparse.Namespace) -> None:
    prompts, size = (16, 4) if args.quick else SHAPES[name]
    scale = args.scale if args.scale is not None else 0.125 if name == "qwen2" else 1.0
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder)
        write_model(name, policy)
        plain = responses(policy, prompts, size, scale, device=args.device, evenly=name == LARGE)
        loads = {"zeros": with_zeros(plain), "no zeros": plain}
        rows = [row for group in plain for row in group]
        tokens = sum(len(row.completion_ids) for row in rows)
        total = tokens + sum(len(row.prompt_ids) for row in rows)
        zero = sum(row.advantage == 0.0 for group in loads["zeros"] for row in group)
        print(
            f"{name}: {len(rows)} responses of {prompts} prompts, lengths x {scale:g}: {tokens} tokens of completions, "
            f"{total} with prompts; zeros: {zero} responses ({zero / len(rows):.1%})",
            flush=True,
        )
        peers = {side: padding for side, padding in THEIRS.items() if args.peer in (None, padding)}
        batches = {
            side: best_batch(policy, plain, padding, args.batches, args.device) for side, padding in peers.items()
        }
        their_padding, our_padding, gradients, memory, rate = {}, {}, {}, {}, {}
        wall: dict[str, list[float]] = defaultdict(list)
        cpu: dict[str, list[float]] = defaultdict(list)
        parts: dict[str, list[dict[str, float]]] = defaultdict(list)

        def theirs(side: str, load: str) -> None:
            steps = their_steps(policy, loads[load], batches[side], THEIRS[side], args.device)
            wall[side] += steps.seconds
            cpu[side] += steps.cpu_seconds
            gradients[side, load] = steps.gradients[0]
            memory[side] = settle(args.device)
            their_padding[side] = 1.0 - total / steps.padded_tokens[0]

        def ours(load: str) -> None:
            found = our_steps(policy, loads[load], args.device)
            wall[load] += found.steps.seconds
            cpu[load] += found.steps.cpu_seconds
            gradients[load, load] = found.steps.gradients[0]
            our_padding[load] = found.metrics[0]["padding_share"]
            memory[load] = found.memory
            rate[load] = found.metrics[0].get("flops_share")
            parts[load].append(shares(found))

        def repeat(number: int) -> None:
            load = OURS[number % 2]
            calls: list[tuple[Callable[..., None], tuple[str, ...]]] = [
                (theirs, ("TRL", load)), (ours, ("zeros",)), (theirs, ("TRL, trimmed", load)), (ours, ("no zeros",)),
            ]  # fmt: skip
            calls = [(call, given) for call, given in calls if given[0] in (*peers, *OURS)]
            for call, given in calls[:: 1 if number % 2 == 0 else -1]:
                call(*given)
            told = ", ".join(f"{side} {wall[side][-1]:.1f} ({cpu[side][-1]:.1f})" for side in (*peers, *OURS))
            print(f"  repeat {number + 1}, seconds (of CPU): {told}; load {os.getloadavg()[0]:.1f}", flush=True)

        done = 0
        try:
            for number in range(2 if args.quick else args.repeats):
                repeat(number)
                done += 1
        except KeyboardInterrupt:
            print(f"  stopped after {done} repeats")
            if not done:
                return
        finished = {side: (wall[side][:done], cpu[side][:done]) for side in (*peers, *OURS)}

        heads = "".join(f"| ratio to {side} | of CPU time " for side in peers)
        print(f"\n| {name} | tokens/s | padding {heads}| gradient |")
        print(f"|---|---|---|---|{'---|---|' * len(peers)}")
        for side in peers:
            speed = f"{tokens / statistics.median(finished[side][0]):.0f}"
            print(
                f"| {side}, batch {batches[side]} | {speed} | {their_padding[side]:.0%} {'| ' * (2 * len(peers) + 1)}|"
            )
        for load in OURS:
            ratios = [spread(*pair) for side in peers for pair in zip(finished[side], finished[load], strict=True)]
            compared = [gradients[side, load] for side in peers if (side, load) in gradients]
            apart = max((difference(gradients[load, load], each) for each in compared), default=float("nan"))
            print(
                f"| papo, {load} | {tokens / statistics.median(finished[load][0]):.0f} | {our_padding[load]:.0%} | "
                f"{' | '.join(ratios)} | {apart:.1e} |"
            )
        print(flush=True)
        if args.device == "cuda":
            peaks = ", ".join(f"{side} {mib:.0f} MiB" for side, mib in memory.items())
            known = ", ".join(f"{load} {share:.1%}" for load, share in rate.items() if share is not None)
            print(
                f"{torch.cuda.get_device_name()}; peak memory: {peaks}; share of its rate: {known or 'not known'}\n",
                flush=True,
            )
        for load in OURS:
            print(f"| part of papo's step: {name}, {load} | share |\n|---|---|")
            middle = {part: statistics.median(each[part] for each in parts[load]) for part in parts[load][0]}
            for part, share in sorted(middle.items(), key=lambda pair: -pair[1]):
                print(f"| {part} | {share:.1%} |")
            print(flush=True)
            if args.profile:
                profile(policy, loads[load], args.device, f"{name}, {load}")


def spread(theirs: Sequence[float], ours: Sequence[float]) -> str:
    ratios = [one / other for one, other in zip(theirs, ours, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def shares(found: Ours) -> dict[str, float]:
    """The parts of a step, as shares of its seconds."""
    parts, seconds = dict(found.parts), found.steps.seconds[0]
    parts["projection and loss, with their gradient"] = parts.pop("forward") - parts["backbone, forward"]
    parts["planning, tensors, metrics"] = seconds - sum(parts.values())
    return {part: took / seconds for part, took in parts.items()}


def profile(policy: Path, groups: Groups, device: str, title: str) -> None:
    """What torch was called for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        our_steps(policy, groups, device)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"| {title}: call, loading and saving included | share | calls |\n|---|---|---|")
    for event in events[:10]:
        print(f"| `{event.key}` | {event.self_cpu_time_total / total:.1%} | {event.count} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), help="one of them only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, help="of the lengths; 0.125 for qwen2, else 1")
    parser.add_argument("--peer", choices=list(THEIRS.values()), help="TRL padded to the longest of that only")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="ROWS", help="sizes to try")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in bfloat16")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    quiet_environment()
    torch.set_num_threads(1)
    for name in SHAPES:
        if args.model == name or (args.model is None and name != LARGE):
            compare(name, args)


if __name__ == "__main__":
    main()
