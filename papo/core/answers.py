r"""Final answers as text: where they stand in a response, and what can be said about two of them without algebra.

Extraction is strict, as training needs it: the last `\boxed{...}` is the answer and nothing else is. Whatever is looser
(the last number, "the answer is ...", any of several boxes) rewards a policy that states several answers.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 1_000
"""A longer box holds a text and no final answer."""

MAX_DIGITS = 200
"""Longest run of digits that is read as a number."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SURROGATES = re.compile("[\ud800-\udfff]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\x00]")
_REWRITES = (
    (re.compile(r"(?<!\\)\\(?:(?:left|right|displaystyle)(?![A-Za-z])|[!,])"), ""),
    (re.compile(r"(?<!\\)\\(?:[;: ]|q?quad(?![A-Za-z]))|~"), " "),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\u2212"), "-"),
    (re.compile(r"\s+"), " "),
    # A space next to a sign says nothing, but for `32, 349`, a pair, where `32,349` is a number.
    (re.compile(r"(?<=[^A-Za-z0-9]) (?!(?<=[0-9], )[0-9]{3}(?![0-9]))| (?=[^A-Za-z0-9\\])"), ""),
)
_FENCES = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_WORD = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)\{([^{}\\]*)\}")
_THOUSANDS = re.compile(r"([+-]?[0-9]{1,3})((?:,[0-9]{3})+|(?: [0-9]{3})+)(\.[0-9]+)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_RATIO = re.compile(r"([+-]?)(?:([0-9]+)/([0-9]+)|\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\})")
_SUM = re.compile(r"[0-9.+*/=?() -]*")


def extract_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`, matched by its braces; escaped braces do not count.

    Returns:
        The content as it stands, but for lone surrogates, which no file can hold and which become U+FFFD. None if
        there is no box, if the last one is never closed (the response was cut off within its answer), or if it holds
        more than MAX_ANSWER_CHARS.

    Linear in the length of the text.
    """
    start = None
    for match in _BOX.finditer(text):
        start = match.end()
    if start is None:
        return None
    end = _closing_brace(text, start)
    return None if end is None else _SURROGATES.sub("\ufffd", text[start:end])


def _closing_brace(text: str, start: int) -> int | None:
    depth, position = 1, start
    while position < min(len(text), start + MAX_ANSWER_CHARS + 1):
        character = text[position]
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
        position += 2 if character == "\\" else 1
    return None


def visible(answer: str) -> str:
    """The answer without characters that have no width or only a direction: they change looks, never meaning."""
    return _INVISIBLE.sub("", answer)


def normalise(answer: str) -> str:
    r"""The answer without what changes its looks only, for comparing strings.

    What goes: invisible characters, blanks (but between letters or digits), the maths fence around it ($...$, \(...\)),
    a final dot, \left and \right, thin spaces, and a \text{...} that is the whole of it. What is unified: \dfrac to
    \frac, \% to %, the minus sign, and the thousands of a number (1,000 and 1{,}000 and 1 000).
    Applying it twice changes nothing further.
    """
    before, text = None, visible(answer)
    while text != before:  # a fence may hold a final dot, which may hold a fence; no turn lengthens the text
        before = text
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text = _without_fence(text.strip())
        if word := _WORD.fullmatch(text):
            text = word[1]
        if _THOUSANDS.fullmatch(text):
            text = re.sub("[, ]", "", text)
    return text


def _without_fence(text: str) -> str:
    for opening, closing in _FENCES:
        inner = text[len(opening) : -len(closing)]
        if inner and text.startswith(opening) and text.endswith(closing) and closing not in inner:
            return inner.strip()
    return text[:-1] if text.endswith(".") and not text.endswith("..") else text


def plain_number(text: str) -> Fraction | None:
    r"""The exact value of an integer, a decimal, a/b or \frac{a}{b}; None for anything else.

    None too for a run of more than MAX_DIGITS digits and for a zero denominator.
    """
    answer = normalise(text)
    if longest_digits(answer) > MAX_DIGITS:
        return None
    if _DECIMAL.fullmatch(answer):
        return Fraction(answer)
    ratio = _RATIO.fullmatch(answer)
    if ratio is None:
        return None
    above, below = int(ratio[2] or ratio[4]), int(ratio[3] or ratio[5])
    return Fraction(-above if ratio[1] == "-" else above, below) if below else None


def longest_digits(text: str) -> int:
    """Length of the longest run of digits."""
    return max(map(len, re.findall("[0-9]+", text)), default=0)


def same_answer(gold: str, answer: str) -> bool | None:
    r"""Whether two answers are equal, as far as text and exact numbers tell; None where it takes algebra.

    - Equal after `normalise`, or the same `plain_number`: equal.
    - Two different integers: not equal. Other different numbers are left open, as 0.333 may be meant for 1/3.
    - For a gold answer that is a number, a sum or product of numbers that is not carried out is not equal: else the
      policy is rewarded for boxing the problem (`\boxed{3+5-2}`). With an `=` in it, what follows the last one counts.
    """
    if normalise(gold) == normalise(answer):
        return True
    wanted = plain_number(gold)
    if wanted is None:
        return None
    given = plain_number(answer)
    if given is None and _SUM.fullmatch(normalise(answer)):
        return plain_number(normalise(answer).rpartition("=")[2].strip("()")) == wanted
    if given == wanted:
        return True
    return False if given is not None and given.denominator == wanted.denominator == 1 else None
