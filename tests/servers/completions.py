"""A vLLM server's completions as a process of its own, with a policy of two sorts of arithmetic, which misbehaves by plan.

    python tests/servers/completions.py '{"latency_s": 0.2}'    # prints its URL; ends when its standard input does

The policy is a table: the log-odds of a token given the one before it. `save_policy` writes a checkpoint of the same table in Hugging Face
form, so that what the server says can be compared with what transformers does. A fault is one of a row; with `proofs`, one of all that it
is asked.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import chat
from servers.chat import BODY_FAULTS, HTTP_FAULTS, LOST_FAULTS, ChatProcess, Connection

VOCABULARY, EOS = 20, 1
BOX, END, LINE, DIGITS = 3, 4, 5, range(10, 20)
BOXES = -1
"""The policy that writes lines of nothing but a boxed number, of one digit mostly, so that some responses are right."""

MODEL = "policy"
ROW_FAULTS = {
    "fewer": "fewer than the",
    "more": "more than the",
    "outside": "tokens that are none of the 20 of the policy",
    "negative": "tokens that are none of the 20 of the policy",
    "nan": "the log-prob nan",
    "positive": "the log-prob 0.5",
    "never": "the log-prob -9999",
    "null": "the log-prob None",
    "other-prompt": "a completion of another prompt than was sent",
    "no-ids": "no token ids",
    "fewer-logprobs": "log-probs for",
    "abort": "the finish reason 'abort'",
    "no-reason": "the finish reason None",
    "goes-on": "does not end as its finish reason",
    "no-choice": "no completion",
}
"""What becomes of a row, and what is said of it."""


@dataclass(frozen=True)
class Plan(chat.Plan):
    """`policy`: number of the table; `mode`: as --logprobs-mode; `context`: as --max-model-len; `noise`: in a log-prob, as of rounding."""

    policy: int = 0
    mode: str = "processed_logprobs"
    context: int = 64
    model: str = MODEL
    proofs: bool = False
    noise: float = 0.0
    token_s: float = 0.0  # a token, beside a latency_s that is not 0

    def __post_init__(self) -> None:
        known = ("none", *HTTP_FAULTS, "404", *LOST_FAULTS, *BODY_FAULTS, *ROW_FAULTS)
        assert self.fault in known, self.fault


@lru_cache
def table(number: int) -> list[list[float]]:
    """Logits by the token before; the end of text is drawn about once in ten tokens."""
    if number == BOXES:
        start, digit = {BOX: 1.0}, dict.fromkeys(DIGITS, 0.04) | {END: 0.6}
        inside = {BOX: dict.fromkeys(DIGITS, 0.1), END: {EOS: 0.7, LINE: 0.3}} | dict.fromkeys(DIGITS, digit)
        weights = [inside.get(token, start) for token in range(VOCABULARY)]
        return [[math.log(of.get(token, 1e-7)) for token in range(VOCABULARY)] for of in weights]
    stream = random.Random(number)
    return [[stream.gauss(0.0, 1.5) for _ in range(VOCABULARY)] for _ in range(VOCABULARY)]


def save_policy(folder: Path, number: int, *, size: float = 1.0) -> Path:
    """The table as a Llama decoder: each token is a direction of its own, which no layer changes. `size`: of the logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from papo.engines.tokenizer import build_tokenizer

    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=VOCABULARY, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, rms_norm_eps=1e-12, tie_word_embeddings=False, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(torch.tensor(table(number)).T * size / math.sqrt(VOCABULARY))
    model.save_pretrained(folder)
    tokenizer = build_tokenizer()
    assert len(tokenizer) == VOCABULARY
    tokenizer.save_pretrained(folder)
    (folder / "table").write_text(str(number))
    return folder


def log_softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    total = math.log(math.fsum(math.exp((value - top) / temperature) for value in logits))
    return [(value - top) / temperature - total for value in logits]


def complete(body: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """One choice, as vLLM gives it for a prompt of token ids."""
    rows, prompt, temperature = table(plan.policy), body["prompt"], body["temperature"]
    scale = temperature if temperature > 0 and plan.mode == "processed_logprobs" else 1.0
    stream, ids, logprobs, top = random.Random(body["seed"]), list[int](), list[float](), list[dict[str, float]]()
    rounding = random.Random(f"{prompt} {body['seed']}")
    before = prompt[-1]
    while len(ids) < body["max_tokens"] and not (ids and ids[-1] in body["stop_token_ids"]):
        given = log_softmax(rows[before], scale)
        if temperature > 0:
            weights = [math.exp(value) for value in log_softmax(rows[before], temperature)]
            before = stream.choices(range(VOCABULARY), weights)[0]
        else:
            before = max(range(VOCABULARY), key=given.__getitem__)
        ids.append(before)
        logprobs.append(min(given[before] + rounding.gauss(0.0, plan.noise), 0.0))
        best = sorted(range(VOCABULARY), key=lambda token: -given[token])[: body["logprobs"]]
        top.append({f"token_id:{token}": given[token] for token in {before: 0, **dict.fromkeys(best)}})
    names = [f"token_id:{token}" for token in ids]
    choice = {
        "index": 0, "text": "", "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length", "token_ids": ids,
        "prompt_token_ids": prompt, "logprobs": {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top},
    }  # fmt: skip
    if "prompt_logprobs" in body:
        read = [log_softmax(rows[one])[two] + rounding.gauss(0.0, plan.noise) for one, two in pairwise(prompt)]
        entries = [{str(two): {"logprob": value, "rank": 1}} for two, value in zip(prompt[1:], read, strict=True)]
        choice["prompt_logprobs"] = [None, *entries]
    return choice


def spoil(choice: dict[str, Any], fault: str, body: dict[str, Any]) -> None:
    ids, noted = choice["token_ids"], choice["logprobs"]
    logprobs = noted["token_logprobs"]
    if fault in ("fewer", "more", "goes-on"):
        ids[:] = [5] * (body["max_tokens"] + (1 if fault == "more" else -1 if fault == "fewer" else 0))
        logprobs[:] = [-1.0] * len(ids)
        choice["finish_reason"] = "stop" if fault == "goes-on" else "length"
    elif fault in ("outside", "negative"):
        ids[0] = VOCABULARY if fault == "outside" else -1
    elif fault in ("nan", "positive", "never", "null"):
        logprobs[-1] = {"nan": math.nan, "positive": 0.5, "never": -9999.0, "null": None}[fault]
    elif fault == "other-prompt":
        choice["prompt_token_ids"] = [*body["prompt"][:-1], body["prompt"][-1] % (VOCABULARY - 1) + 1]
    elif fault == "no-ids":
        choice["token_ids"] = choice["prompt_token_ids"] = None
    elif fault == "fewer-logprobs":
        del logprobs[-1]
    elif fault in ("abort", "no-reason"):
        choice["finish_reason"] = "abort" if fault == "abort" else None


class Completions(Connection):
    def control(self, method: str, path: str, body: bytes) -> None:
        plan = self.state.plan
        assert isinstance(plan, Plan)
        if path == "/v1/completions":
            self.chat(json.loads(body), path, {})
        elif path == "/v1/models":
            if plan.proofs and plan.fault in HTTP_FAULTS:
                self.send(*chat.http_fault(plan.fault, plan))
            elif not (plan.proofs and plan.fault == "hang"):
                card = {"id": plan.model, "object": "model", "max_model_len": plan.context}
                self.send(200, json.dumps({"object": "list", "data": [card]}).encode())
        elif path == "/version":
            self.send(200, b'{"version": "0.32.0"}')
        elif path == "/health":
            self.send(200, b"")
        elif path in ("/plan", "/seen", "/asked"):
            super().control(method, path, body)
        else:
            self.send(404, b'{"detail": "Not Found"}')

    def chat(self, body: dict[str, Any], path: str, headers: dict[str, str]) -> None:
        plan = self.state.plan
        assert isinstance(plan, Plan)
        if "prompt_logprobs" in body and not plan.proofs:
            self.answer(body, "none")
        else:
            super().chat(body, path, headers)

    def later(self, seconds: float, call: Any, *arguments: Any) -> None:
        plan = self.state.plan
        if call == self.answer and isinstance(plan, Plan) and plan.token_s:
            seconds += plan.token_s * len(complete(arguments[0], plan)["token_ids"])
        super().later(seconds, call, *arguments)

    def answer(self, body: dict[str, Any], fault: str) -> None:
        plan = self.state.plan
        assert isinstance(plan, Plan)
        if body["model"] != plan.model:
            self.send(404, json.dumps({"error": {"message": f"The model {body['model']} does not exist."}}).encode())
        elif len(body["prompt"]) + body["max_tokens"] > plan.context:
            self.send(
                400, json.dumps({"error": {"message": "This model's maximum context length is too short"}}).encode()
            )
        elif fault == "404":
            self.send(404, b"{}")
        else:
            super().answer(body, fault)

    def write(self, body: dict[str, Any], fault: str) -> bytes:
        plan = self.state.plan
        assert isinstance(plan, Plan)
        choice = complete(body, plan)
        spoil(choice, fault, body)
        whole = {"id": "1", "object": "text_completion", "model": plan.model, "choices": [choice]}
        if fault == "no-choice":
            whole["choices"] = []
        return json.dumps(whole).encode()


def completions_process(port: int = 0, **plan: Any) -> AbstractContextManager[ChatProcess]:
    """A server that runs until the end of the `with`; port 0 is any free one."""
    return chat.process_of(__file__, Plan(**plan), port)


def serve_folder(folder: str, *flags: str) -> None:
    """As `vllm serve FOLDER --port ...` does, for what `save_policy` wrote; other flags it notes and leaves."""
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    sys.stdout.write(f"{folder} {json.dumps(given)} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    number = int((Path(folder) / "table").read_text())
    plan = Plan(policy=number, model=given["--served-model-name"], mode=given["--logprobs-mode"])
    asyncio.run(chat.serve(plan, Completions, port=int(given["--port"]), forever=True))


if __name__ == "__main__" and sys.argv[1:2] == ["serve"]:
    serve_folder(*sys.argv[2:])
elif __name__ == "__main__":
    asked, at = chat.arguments()
    asyncio.run(chat.serve(Plan(**asked), Completions, port=at))
