"""vLLM in a process of its own, under the interpreter that has it: rows are asked of it over a socket, JSON by line.

    python papo/engines/samplers/vllm_worker.py 5    # the socket is file descriptor 5

In: first {"engine": arguments of vllm.LLM, "sampling": of all rows}, then {"id", "prompt": token ids, "seed"} for each row. Out: first
{"ready": {...}} or {"error": text}, then {"id", "ids", "logprobs", "finish_reason"} for each row as it ends, or {"id", "error": text}. Rows
are taken in between any two steps of the engine, which is never without work while there is some. It ends when the socket does.

Of the standard library and vLLM alone, as papo need not be installed where vLLM is.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any


def main() -> int:
    # The folder of this script has modules with the names of libraries.
    here = os.path.realpath(os.path.dirname(__file__))  # noqa: PTH120  # before anything is imported from here
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != here]
    channel = socket.socket(fileno=int(sys.argv[1]))
    # What the engine starts must not keep the socket open.
    channel.set_inheritable(False)
    with channel, channel.makefile("r", encoding="utf-8") as heard, channel.makefile("w", encoding="utf-8") as said:

        def say(message: dict[str, Any]) -> None:
            said.write(json.dumps(message, separators=(",", ":")) + "\n")

        settings = json.loads(heard.readline())
        try:
            engine, about = load(settings["engine"])
        except Exception as error:  # of any library below vLLM: papo is told in its words
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            say({"error": f"{type(error).__name__}: {error}"})
            return 1
        say({"ready": about})
        said.flush()
        rows: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        threading.Thread(target=listen, args=(heard, rows), daemon=True).start()
        work(engine, rows, settings["sampling"], say, said.flush)
    return 0


def load(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    import vllm

    engine = vllm.LLM(**arguments).llm_engine
    config = engine.vllm_config
    return engine, {
        "version": str(vllm.__version__),
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
    }


def listen(heard: Any, rows: SimpleQueue[dict[str, Any] | None]) -> None:
    """Puts each row into `rows`, and None when the socket ends."""
    try:
        for line in heard:
            rows.put(json.loads(line))
    except (OSError, ValueError):
        pass
    rows.put(None)


def work(
    engine: Any,
    rows: SimpleQueue[dict[str, Any] | None],
    sampling: dict[str, Any],
    say: Callable[[dict[str, Any]], None],
    flush: Callable[[], None],
) -> None:
    """Until None is among the rows."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    while True:
        for row in waiting(rows, wait=not engine.has_unfinished_requests()):
            if row is None:
                return
            try:
                params = SamplingParams(
                    **sampling, seed=row["seed"], flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
                )
                engine.add_request(str(row["id"]), TokensPrompt(prompt_token_ids=row["prompt"]), params)
            except (TypeError, ValueError) as error:
                say({"id": row["id"], "error": f"{type(error).__name__}: {error}"})
        for output in engine.step() if engine.has_unfinished_requests() else ():
            if output.finished:
                say({"id": int(output.request_id), **row_of(output.outputs[0])})
        flush()


def waiting(rows: SimpleQueue[dict[str, Any] | None], *, wait: bool) -> Iterator[dict[str, Any] | None]:
    """The rows that are there; with `wait`, at least one."""
    try:
        yield rows.get(block=wait)
        while True:
            yield rows.get_nowait()
    except Empty:
        pass


def row_of(completion: Any) -> dict[str, Any]:
    ids, noted = list(completion.token_ids), completion.logprobs
    # Of each place the sampled token is noted first; others follow where vLLM gives more than it was asked for.
    chosen = noted.start_indices
    if [noted.token_ids[start] for start in chosen] != ids:
        return {"error": "the log-probs are of other tokens than the completion's"}
    return {
        "ids": ids,
        "logprobs": [noted.logprobs[start] for start in chosen],
        "finish_reason": completion.finish_reason,
    }


if __name__ == "__main__":
    sys.exit(main())
