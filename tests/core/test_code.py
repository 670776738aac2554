"""Where the program stands in a completion, and what has to stand before it."""

from __future__ import annotations

import pytest

from papo.core.code import MAX_CODE_CHARS, extract_code, find_code, missing_prefix

HEAD = "import math\n\n\ndef area(r):\n    '''Of a circle.'''\n"


@pytest.mark.parametrize(
    "completion",
    [
        "x = 1",
        "So:\n```python\nx = 1\n```\nDone.",
        "```py\nx = 1\n```\nBetter:\n```python\nx = 2\ny = 3",
        "```\nx = 1\n```\n```text\n1\n```",
        "```python\r\nx = 1\r\n```",
    ],
)
def test_the_code_stands_where_it_is_said_to_start(completion: str) -> None:
    code = find_code(completion)
    assert code is not None
    assert completion[code.start : code.start + len(code.text)] == code.text == extract_code(completion)


@pytest.mark.parametrize("completion", ["", " \n", "```python\n```", "x" * (MAX_CODE_CHARS + 1)])
def test_no_code_and_too_much_of_it_are_none(completion: str) -> None:
    assert find_code(completion) is None
    assert extract_code(completion) is None


@pytest.mark.parametrize(
    ("code", "prefix", "entry_point", "missing"),
    [
        ("    return r", HEAD, "area", HEAD),
        ("def area(r):\n    return r", HEAD, "area", "import math\n\n\n"),
        ("def areas(r):\n    return r", HEAD, "area", HEAD),
        ("def area(r):\n    return r", "x = 1\n", "area", ""),
        ("def area(r):\n    return r", None, "area", ""),
        ("x", HEAD, None, HEAD),
        ("x", None, None, ""),
        ("async def a.b(r): pass", HEAD, "a.b", ""),
    ],
)
def test_what_is_missing_of_the_prefix(code: str, prefix: str | None, entry_point: str | None, missing: str) -> None:
    assert missing_prefix(code, prefix, entry_point) == missing
