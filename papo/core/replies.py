"""The one verdict in a model's reply, or none: nothing is guessed, and no number is looked for.

A reply is

    {"reason": "...", "verdict": ...}      one JSON object with these keys and no other, `reason` may be missing
    ...                                    or plain text
    verdict: ...                           that ends with such a line and holds the word verdict nowhere else

after one block of reasoning, which is dropped (<think>...</think>, of which the server may have kept the first tag; the channel
`analysis` of gpt-oss, with its control tokens or without), and inside one code fence or none.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_OPEN, _CLOSE = "<think>", "</think>"
_ANALYSIS = re.compile(r"(?:<\|channel\|>)?analysis(?:<\|message\|>)?")
_FINAL = re.compile(r"(?:<\|end\|>)?(?:<\|start\|>)?assistant(?:<\|channel\|>)?final(?:<\|message\|>)?")
_FINAL_ALONE = "<|channel|>final<|message|>"
_ENDS = ("<|return|>", "<|end|>")
_CODE_FENCE = re.compile(r"```[A-Za-z]{0,10}[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)
_LINE = re.compile(r"(?i:verdict):[ \t]*(\S[^\n]*)", re.ASCII)
_MARKUP = re.compile(r"</?think>|<\||assistantfinal|<!doctype|</?(?:html|body|head)\b", re.IGNORECASE)


class Said(NamedTuple):
    """What a reply says. `verdict` is a JSON value; the text after the colon where it is that of a last `line`."""

    reason: str
    verdict: Any
    line: bool


class UnreadableError(ValueError):
    """A reply without exactly one verdict. The message is the cause in a few words, without any of the reply's own."""


def read_reply(text: str) -> Said:
    """
    Raises:
        UnreadableError: the reply is anything else than this module's table has.
    """
    body = _without_reasoning(text.strip()).strip()
    if fenced := _CODE_FENCE.fullmatch(body):
        body = fenced[1].strip()
    if not body:
        raise UnreadableError("empty")
    return _of_json(body) if body.startswith("{") else _of_text(body)


def _without_reasoning(text: str) -> str:
    if text.startswith("{"):
        return text  # what looks like a tag stands inside of a reason
    if text.startswith(_OPEN) or _CLOSE in text:
        _, closed, rest = text.partition(_CLOSE)
        if not closed:
            raise UnreadableError("the reasoning does not end")
        return rest
    if begun := _ANALYSIS.match(text):
        if not (final := _FINAL.search(text, begun.end())):
            raise UnreadableError("the reasoning does not end")
        return _without_end(text[final.end() :])
    return _without_end(text.removeprefix(_FINAL_ALONE)) if text.startswith(_FINAL_ALONE) else text


def _without_end(text: str) -> str:
    for end in _ENDS:
        text = text.removesuffix(end)
    return text


def _of_json(body: str) -> Said:
    try:
        found = json.loads(body, object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise UnreadableError("not exactly one JSON object, or a key twice") from None
    if "verdict" not in found:
        raise UnreadableError("no verdict")
    if found.keys() - {"reason", "verdict"}:
        raise UnreadableError("another key than reason and verdict")
    if not isinstance(found.get("reason", ""), str):
        raise UnreadableError("the reason is no text")
    return Said(found.get("reason", ""), found["verdict"], line=False)


def _of_text(body: str) -> Said:
    if _MARKUP.search(body):
        raise UnreadableError("markup, or reasoning that does not end")
    if (count := body.lower().count("verdict")) != 1:
        raise UnreadableError("several verdicts" if count else "no verdict")
    reason, _, last = body.rpartition("\n")
    if not (found := _LINE.fullmatch(last)):
        raise UnreadableError("the last line is no verdict")
    return Said(reason.strip(), found[1].rstrip(), line=True)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
