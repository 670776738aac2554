"""Each kind of flaw, and programs without any."""

from __future__ import annotations

import pytest

from papo.core.readability import KINDS, MAX_DEPTH, Flaw, defines, flaws, parse_program


def found(source: str, entry_point: str | None = None) -> list[Flaw]:
    tree = parse_program(source)
    assert tree is not None
    return flaws(tree, entry_point)


def kinds(source: str, entry_point: str | None = None) -> list[str]:
    """Kind and line of each flaw."""
    flaws = found(source, entry_point)
    assert all(flaw.kind in KINDS and flaw.what for flaw in flaws)
    return [f"{flaw.kind} {flaw.line}" for flaw in flaws]


CLEAN = [
    "def solve(numbers):\n    large = [item for item in numbers if item > 3]\n    total = sum(large)\n    return total - 2",
    "def solve(number):\n    '''Nothing.'''\n    return number",
    "def solve(number):\n    return -1",
    "def solve(number):\n    pass",
    "def solve(number):\n    ...",
    "def solve(numbers):\n    total = 0\n    for number in numbers:\n        total += number\n    return total",
    "def solve(numbers):\n    for _ in numbers:\n        print(numbers)",
    "def solve(number):\n    if number > 3:\n        result = 1\n    else:\n        result = 2\n    return result",
    "def solve(number):\n    while True:\n        number = number // 2\n        if number < 3:\n            return number",
    "def solve(count: list[dict[str, int]]) -> list[int]:\n    first: list[int] = count\n    return first",
    "class Box:\n    size = 3\n\n    def get(self):\n        return self.size",
    "import math\n\nlimit = 3\n\ndef solve(number):\n    return math.floor(limit)",
    "def solve(number):\n    def inner():\n        return step\n    step = 1\n    inner()\n    step = 2\n    return inner()",
    "def solve(number):\n    count = 0\n    def more():\n        nonlocal count\n        count += 1\n    more()\n    return count",
    "def solve(numbers):\n    if any(found := item for item in numbers):\n        return found",
    "def solve(number):\n    try:\n        return int(number)\n    except ValueError as error:\n        raise KeyError from error",
    "def solve(number):\n    match number:\n        case [first, *rest]:\n            return first, rest",
    "def solve(number):\n    match number:\n        case {'key': value, **others}:\n            return value, others",
    "def solve(numbers):\n    left, right = numbers\n    left, right = right, left\n    return left, right",
    "def solve(numbers):\n    return lambda number: number",
    "async def solve(numbers):\n    return await numbers",
    "def solve(*numbers, **options):\n    return numbers, options",
    "from __future__ import annotations\nfrom math import *\n\ndef solve(number):\n    return number",
    "def solve(exit):\n    return exit",
    "@cached(size=3 + 4)\ndef solve(number):\n    return number",
]


@pytest.mark.parametrize("source", CLEAN)
def test_a_program_without_flaws(source: str) -> None:
    assert kinds(source) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # names
        ("def solve(x):\n    return x", ["names 1"]),
        ("def solve(number):\n    y = number\n    return y", ["names 2"]),
        ("def solve(numbers):\n    return [v for v in numbers]", ["names 2"]),
        ("def f(number):\n    return number", ["names 1"]),
        ("import numpy as n\n\ndef solve(number):\n    return n", ["names 1"]),
        ("def solve(*a, **k):\n    return a, k", ["names 1", "names 1"]),
        ("def solve(number):\n    return lambda q: q", ["names 2"]),
        ("class C:\n    pass", ["names 1"]),
        # crowding
        ("def solve(number):\n    return number * 2 + 1", ["crowding 2"]),
        ("def solve(number):\n    return -(number + 1)", ["crowding 2"]),
        ("def solve(numbers):\n    return sorted(numbers)[2:]", ["crowding 2"]),
        ("def solve(numbers):\n    return [item + 1 for item in numbers if item > 3]", ["crowding 2"]),
        ("def solve(numbers):\n    for item in sorted(set(numbers)):\n        print(item)", ["crowding 2"]),
        ("def solve(number):\n    number += number * 2\n    return number", ["crowding 2"]),
        ("def solve(number, other=3 + 4 * 5):\n    return number, other", ["crowding 1"]),
        ("def solve(number):\n    return 1 if number > 3 else 2", ["crowding 2"]),
        ("def solve(number):\n    first = number; return first", ["crowding 2"]),
        ("def solve(number): return number", ["crowding 1"]),
        ("def solve(number):\n    if number: return 1\n    return 2", ["crowding 2"]),
        ("def solve(number):\n    first = number; second = first; return second", ["crowding 2"]),
        # idle code
        ("def solve(number):\n    spare = number\n    return number", ["idle code 2"]),
        ("def solve(number):\n    result = 1\n    result = number\n    return result", ["idle code 2"]),
        ("def solve(number):\n    spare = 1\n    spare += number\n    return number", ["idle code 2"]),
        ("def solve(number):\n    return number\n    print(number)", ["idle code 3"]),
        ("def solve(number):\n    number + 1\n    return number", ["idle code 2"]),
        ("def solve(number):\n    'text'\n    'more text'\n    return number", ["idle code 3"]),
        ("def solve(number):\n    pass\n    return number", ["idle code 2"]),
        ("def solve(number):\n    number = number\n    return number", ["idle code 2"]),
        ("def solve(number):\n    result = number + 0\n    return result", ["idle code 2"]),
        ("def solve(number):\n    return 1 * number", ["idle code 2"]),
        ("def solve(number):\n    return 1 - number", []),
        ("def solve(number):\n    return number ** 1", ["idle code 2"]),
        ("def solve(number):\n    number -= 0\n    return number", ["idle code 2"]),
        ("def solve(number):\n    return number + 0.0", []),
        ("def solve(number):\n    if False:\n        return 1\n    return number", ["idle code 2"]),
        ("def solve(number):\n    while 0:\n        print(number)\n    return number", ["idle code 2"]),
        ("def solve(number):\n    def helper():\n        return number\n    return number", ["idle code 2"]),
        ("def solve(number):\n    import math\n    return number", ["idle code 2"]),
        # hiding
        ("def solve(list):\n    return list", ["hiding 1"]),
        ("def solve(number):\n    sum = number\n    return sum", ["hiding 2"]),
        ("def solve(item):\n    return [item for item in item]", ["hiding 2"]),
        ("def solve(number):\n    def inner(number):\n        return number\n    return inner(number)", ["hiding 2"]),
        ("def solve(numbers):\n    first = [item for item in numbers]\n    return [item for item in first]", []),
        ("class Shelf:\n    def list(self):\n        return self", []),
    ],
)
def test_flaws_and_their_lines(source: str, expected: list[str]) -> None:
    assert kinds(source) == expected


def test_names_of_a_module_have_to_be_read_where_the_entry_point_is_known() -> None:
    source = "spare = 1\n\ndef helper(number):\n    return number\n\ndef solve(number):\n    return number"
    assert kinds(source) == []
    assert kinds(source, "solve") == ["idle code 1", "idle code 3"]
    assert (
        kinds("def solve(number):\n    return helper(number)\n\ndef helper(number):\n    return number", "solve") == []
    )


def test_all_flaws_are_found_in_the_order_of_their_lines() -> None:
    source = "def solve(x):\n    a = x + 0\n    b = 3\n    return [v for v in x[2:] if v > 3]"
    assert kinds(source) == [
        "names 1",
        *("idle code 2", "idle code 2", "names 2"),
        *("idle code 3", "names 3"),
        *("crowding 4", "names 4"),
    ]


@pytest.mark.parametrize(
    "source",
    ["", "\n\n", "# a comment", "words", "return to sender", "def solve(number", "nul = '\0'", "lone = '\ud800'", "'text'", "3\n4", "pass",
     "x" * 5 + " = " + "1" * 5000, "\x0c \x0c1 1"],
)  # fmt: skip
def test_what_is_no_program(source: str) -> None:
    assert parse_program(source) is None


@pytest.mark.parametrize(
    "source",
    [
        "x = " + "(" * 50_000 + ")" * 50_000,
        "x = " + "-" * 90_000 + "1",
        "x = " + "1+" * 45_000 + "1",
        "x = " + "f(" * 20_000,
        "x = " + "[" * 150 + "]" * 150,
        "x = " + "a." * 30_000 + "a",
        "".join(" " * level + "if x:\n" for level in range(99)) + " " * 99 + "x = f()",
        "lambda: " * 10_000 + "f()",
        "x = f'" + "{" * 1000,
    ],
)
def test_what_is_too_deep_is_no_program(source: str) -> None:
    assert parse_program(source) is None


def test_the_deepest_program_that_is_read_can_be_judged() -> None:
    deep = [parse_program("value = " + "-" * level + "other") for level in range(MAX_DEPTH)]
    trees = [tree for tree in deep if tree is not None]
    assert MAX_DEPTH - 10 < len(trees) < MAX_DEPTH
    assert found("value = " + "-" * (len(trees) - 1) + "other")[0].kind == "crowding"
    nested = (
        "def outer(number):\n"
        + "".join(f"{' ' * level}if number:\n" for level in range(1, 40))
        + " " * 40
        + "return number"
    )
    assert kinds(nested) == []


def test_many_statements_are_judged_in_time() -> None:
    source = "def solve(number):\n" + "    a = 1\n" * 9_000 + "    return number"
    assert len(found(source)) == 8_999 + 1 + 1  # given anew, never read, one letter
    names = (
        "def solve(number):\n" + "".join(f"    name{place} = number\n" for place in range(4_000)) + "    return number"
    )
    assert len(found(names)) == 4_000
    many = "def solve(number):\n" + "".join(f"    name{place} = [item for item in number]\n" for place in range(2_500))
    assert len(found(many)) == 2_500
    inner = "".join(f"{' ' * level}def inner{level}(number{level}):\n" for level in range(1, 30)) + " " * 31
    assert (
        len(found("def solve(number):\n" + inner + "; ".join(["value = 1"] * 5_000))) == 29 + 3
    )  # one line: what is said of it is said once
    wide = "def solve(number):\n    return [" + "number, " * 12_000 + "]"
    assert found(wide) == []


def test_what_python_itself_warns_of_is_no_error() -> None:
    assert kinds("def solve(number):\n    return '\\d'") == []
    assert kinds("def solve(number):\n    return number is 3") == []
    assert kinds("def solve(number):\n    return 3 if (1, 2) else number()") == ["crowding 2"]


def test_what_a_module_defines() -> None:
    tree = parse_program(
        "import os\nalias = os\nif alias:\n    def solve():\n        inner = 1\n        return inner\nclass Box:\n    size = 1"
    )
    assert tree is not None
    assert [defines(tree, name) for name in ("os", "alias", "solve", "Box", "inner", "size", "print")] == [True] * 4 + [
        False
    ] * 3
