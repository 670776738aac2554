"""Where the program stands in a completion, and what of its problem's prefix it lacks."""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_CODE_CHARS = 100_000

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")


class Code(NamedTuple):
    """A program, and the character of the completion at which it starts."""

    text: str
    start: int


def find_code(completion: str) -> Code | None:
    """The last fenced block of Python, else the last fenced block without a language, else all; None where that is empty or too long.

    A block that is not closed goes on to the end.
    """
    if len(completion) > MAX_CODE_CHARS:
        return None
    blocks = _blocks(completion)
    named = [code for language, code in blocks if language.lower() in _PYTHON]
    bare = [code for language, code in blocks if not language]
    code = (named or bare or [Code(completion, 0)])[-1]
    return code if code.text.strip() else None


def extract_code(completion: str) -> str | None:
    """The text of `find_code`."""
    code = find_code(completion)
    return code.text if code else None


def missing_prefix(code: str, prefix: str | None, entry_point: str | None) -> str:
    """What has to stand before `code`: the whole prefix where it only goes on, else what stands there before the function."""
    if not prefix or not entry_point:
        return prefix or ""
    head = re.compile(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", re.MULTILINE)
    if not head.search(code):
        return prefix
    found = head.search(prefix)
    return prefix[: found.start() if found else 0]


def _blocks(text: str) -> list[tuple[str, Code]]:
    """Language and content of each fenced block."""
    fences = list(_FENCE.finditer(text))
    ends = [fence.start() for fence in fences[1::2]]
    ends += [len(text)] * (len(fences) % 2)
    return [
        (start[1], Code(text[start.end() + 1 : end].removesuffix("\n"), start.end() + 1))
        for start, end in zip(fences[::2], ends, strict=True)
    ]
