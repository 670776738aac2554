"""Calls of a model as MLflow traces: which of them are kept, and what a person sees of one."""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import threading
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import Span, TraceInfo

PER_ROUND = 100
PREVIEW = 1000  # characters that MLflow's list shows, and its databases have room for

Call = Mapping[str, Any]


class Sample:
    """The calls that are kept until they are written: by their keys alone, so that the order in which replies come means nothing.

    A call is drawn if its key, taken for a number, is in the lowest `share` of all keys; of one round, only the lowest are kept.
    Any thread may add.
    """

    def __init__(self, share: float, per_round: int = PER_ROUND) -> None:
        self._share, self._per_round = share, per_round
        self._lowest: dict[int | None, list[tuple[int, int, Call]]] = {}
        self._number = count()
        self._lock = threading.Lock()

    def add(self, call: Call) -> None:
        key = call["key"]
        if int(key[:8], 16) >= self._share * 2**32:
            return
        entry = (-int(key, 16), next(self._number), call)
        with self._lock:
            kept = self._lowest.setdefault(call["attributes"].get("round"), [])
            if len(kept) < self._per_round:
                heapq.heappush(kept, entry)
            else:
                heapq.heappushpop(kept, entry)

    def rounds(self) -> list[int | None]:
        """Those of which there are calls."""
        with self._lock:
            return list(self._lowest)

    def take(self, round_: int | None) -> list[Call]:
        """The calls of a round, lowest key first; they are kept no longer."""
        with self._lock:
            kept = self._lowest.pop(round_, [])
        return [call for *_, call in sorted(kept, key=lambda entry: (-entry[0], entry[1]))]


def trace_id(call: Call, run: str) -> str:
    """The same for the same call of the same run, so that none is written twice."""
    told = f"{run} {call['key']} {call['started']!r}"
    return f"tr-{hashlib.sha256(told.encode()).hexdigest()[:32]}"


def trace(call: Call, *, run: str, experiment: str, tags: Mapping[str, str]) -> tuple[TraceInfo, Span]:
    """One trace of one span, with the times of the call, that belongs to a run."""
    from mlflow.entities import Span, TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey, TraceTagKey

    identifier, given = trace_id(call, run), call["attributes"]
    ok = given.get("status") == "ok"
    tokens = {"input_tokens": given.get("prompt_tokens") or 0, "output_tokens": given.get("completion_tokens") or 0}
    tokens["total_tokens"] = sum(tokens.values())
    start = round(call["started"] * 1e6) * 1000  # a float of Unix seconds is no finer than that
    attributes = {
        **given,
        SpanAttributeKey.REQUEST_ID: identifier,
        SpanAttributeKey.SPAN_TYPE: "CHAT_MODEL",
        SpanAttributeKey.INPUTS: call["inputs"],
        SpanAttributeKey.OUTPUTS: call["outputs"],
        SpanAttributeKey.CHAT_USAGE: tokens,
    }
    digest = bytes.fromhex(identifier.removeprefix("tr-"))
    span = Span.from_dict(
        {
            "trace_id": base64.b64encode(digest).decode(),
            "span_id": base64.b64encode(digest[:8]).decode(),
            "parent_span_id": None,
            "name": call["name"],
            "start_time_unix_nano": start,
            "end_time_unix_nano": start + round(call["seconds"] * 1e9),
            "status": {"code": "OK" if ok else "ERROR", "message": "" if ok else str(given.get("status"))},
            # ASCII, as JSON escapes it: half a surrogate pair in a reply is no UTF-8, and databases refuse it.
            "attributes": {
                key: json.dumps(value, default=str) for key, value in attributes.items() if value is not None
            },
        }
    )
    shown = {f"papo.{name}": str(given[name]) for name in ("round", "variant", "status") if given.get(name) is not None}
    info = TraceInfo(
        trace_id=identifier,
        trace_location=TraceLocation.from_experiment_id(experiment),
        request_time=start // 1_000_000,
        state=TraceState.OK if ok else TraceState.ERROR,
        request_preview=_preview(call["inputs"].get("user")),
        response_preview=_preview(call["outputs"].get("text")),
        execution_duration=round(call["seconds"] * 1000),
        trace_metadata={TraceMetadataKey.SOURCE_RUN: run, TraceMetadataKey.TOKEN_USAGE: json.dumps(tokens)},
        tags={TraceTagKey.TRACE_NAME: call["name"], **tags, **shown},
    )
    return info, span


def _preview(text: str | None) -> str:
    """The beginning, without what a database refuses."""
    return (text or "")[:PREVIEW].encode("utf-8", "replace").decode().replace("\0", "?")
