r"""Final answers as text: where they stand in a response, and what can be said about two of them without algebra.

Extraction is strict, as training needs it: the last `\boxed{...}` is the answer and nothing else is. Whatever is looser
(the last number, any of several boxes) rewards a policy that states several answers. Benchmarks whose prompts do not ask
for a box say so in their grading, and "the answer is ..." counts where there is no box at all.

`agree` takes answers apart (lists, tuples, names, units) and leaves the equality of what remains to a function: to
`same_answer`, which knows text and numbers and may not know, or to algebra.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cache
from itertools import accumulate

MAX_ANSWER_CHARS = 1_000
"""A longer box holds a text and no final answer."""

MAX_DIGITS = 200
"""Longest run of digits that is read as a number."""

MAX_EXPONENT = 10_000
"""Largest exponent written as a number, and largest number before a factorial sign, that is carried out."""

MAX_DEPTH = 50
"""Deepest nesting of brackets that is read as an expression."""

MAX_PARTS = 50
"""A longer list is not taken apart."""

Equal = Callable[[str, str], bool | None]
"""Whether a gold answer and an answer, neither of them a list, are equal; None where that is not known."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SURROGATES = re.compile("[\ud800-\udfff]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\x00]")
_LETTERS = (
    (re.compile(r"(?<=[A-Za-z])\\mathrm ?\{([A-Za-z])\}"), r" \1"),
    (re.compile(r"\\mathrm ?\{([A-Za-z])\}"), r"\1"),
)
_REWRITES = (
    (re.compile(r"(?<!\\)\\(?:(?:left|right|displaystyle)(?![A-Za-z])|[!,])"), ""),
    (re.compile(r"(?<!\\)\\(?:[;: ]|q?quad(?![A-Za-z]))|~"), " "),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    *_LETTERS,
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\u2212"), "-"),
    (re.compile(r"\s+"), " "),
    # A space next to a sign says nothing, but for `32, 349`, a pair, where `32,349` is a number.
    (re.compile(r"(?<=[^A-Za-z0-9]) (?!(?<=[0-9], )[0-9]{3}(?![0-9]))| (?=[^A-Za-z0-9\\])"), ""),
)
_FENCES = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_WORD = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox)\{([^{}\\]*)\}")
_THOUSANDS = re.compile(r"([+-]?[1-9][0-9]{0,2})((?:,[0-9]{3})+|(?: [0-9]{3})+)(\.[0-9]+)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_RATIO = re.compile(r"([+-]?)(?:([0-9]+)/([0-9]+)|\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\})")
_SUM = re.compile(r"[0-9.+*/=?() -]*")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_STATED = re.compile(r"(?:\banswer is\b:?|\b[Aa]nswer ?\*{0,2}:)")
_CHOICE_MARKUP = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|boldsymbol)(?![A-Za-z])|[{}$*]|\\[()]")
_CHOICE = re.compile(r"(?:[Oo]ption ?|[Cc]hoice ?)?\(?([A-Ja-j])[).:]*")
_MARKED_CHOICE = re.compile(r"\(([A-J])\)|(?<![A-Za-z0-9])([A-J])(?:[).:]|(?<=[).:].)$)")
_CHOICES = re.compile(r"\(?[A-J]\)?(?: ?(?:[,;/&.]|and|or|,and|,or) ?\(?[A-J]\)?)+")
_CHOICE_LIST = re.compile(r"(?<![A-Za-z])[A-J](?![A-Za-z])")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_TOWER = re.compile(r"[0-9]+(?:[ {(]*\^[ {(]*[0-9]+)++|\^[ {(]*[0-9]{5,}")
_RELATION = re.compile(r"[=<>]|\\(?:leq?|geq?|leqslant|geqslant|lt|gt|neq?|in|approx)(?![A-Za-z])")
_FACTORIAL = re.compile(r"[0-9]{5,}[)} ]*!|![)} ]+!")
_MARKUP = re.compile(r"(?<!\\)\$")
_SEPARATORS = re.compile(
    r"(?P<open>\\?\{|[(\[])|(?P<close>\\?\}|[)\]])"
    r"|(?P<separator>[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))|\\."
)
_SET = re.compile(r"\\?\{(.*?)\\?\}", re.DOTALL)
_WORDS_BETWEEN = re.compile(r",?\s*\\(?:text|mathrm|mbox)\{[ ,]*(?:and|or)[ ,]*\}|,\s*(?:and|or)(?![A-Za-z])")
_NAME = re.compile(  # x, x_{1}, f(x), I_{\max}, \angle A B C
    r"((?:(?!\\(?:in|approx)(?![a-z]))\\?[A-Za-z]+'* ?(?:_ ?(?:\{[^{}]*\}|[A-Za-z0-9]|\\[a-z]+))? ?(?:\([^()=]*\))? ?)++)"
    r"(?:=|\\in(?![a-z])|\\approx)([^=]+)"
)

_MAX_UNIT_CHARS = 60
_DEGREES = re.compile(r"\^?\{?\\circ\}?|°|\\degree|degrees?")
_UNIT_MARKUP = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|operatorname|rm)(?![A-Za-z])|[\\{}^~$.\s]")
_UNIT_SIGNS = str.maketrans("²³", "23")
_SAME_UNITS = {
    other: unit
    for unit, others in {
        "min": "minute",
        "h": "hour hr",
        "s": "second sec",
        "km": "kilometer kilometre",
        "m": "meter metre",
        "cm": "centimeter centimetre",
        "in": "inch inche",  # as the s of the plural goes first
        "ft": "foot feet",
        "%": "percent pct",
        "dollar": "USD",
    }.items()
    for other in others.split()
}
_OTHER_UNIT = re.compile(
    r"\\(?:text|mathrm|mbox)\{ ?[A-Za-z][^{}]*\}[\^{}0-9]*$|[0-9} ][A-Za-z]{2,}$|[0-9] [A-Za-z]$|%$|°$|\\circ\}?$"
)


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


def extract_stated(text: str) -> str | None:
    """What stands after the last "answer is" or "answer:", to the end of its sentence or line; None where nothing does."""
    start = None
    for match in _STATED.finditer(text):
        start = match.end()
    if start is None:
        return None
    line = text[start : start + MAX_ANSWER_CHARS].partition("\n")[0]
    return _SURROGATES.sub("\ufffd", _SENTENCE_END.split(line, maxsplit=1)[0].strip(" *")) or None


def extract_answer(text: str, *, stated: bool = False) -> str | None:
    """The last box, or, if `stated` answers count and there is no box at all, what `extract_stated` finds."""
    return extract_stated(text) if stated and _BOX.search(text) is None else extract_boxed(text)


def choices_in(answer: str) -> list[str]:
    r"""The different choice letters of an answer, in order: of `(B)`, `\text{B.}`, `B: 42 m`, `A or B`; none of another text.

    A letter counts where it stands alone in capitals, by itself or with a bracket, dot or colon; `b` only as the whole.
    """
    text = normalise(_CHOICE_MARKUP.sub(" ", answer[:MAX_ANSWER_CHARS])).strip()
    if whole := _CHOICE.fullmatch(text):
        return [whole[1].upper()]
    found = [one[1] or one[2] for one in _MARKED_CHOICE.finditer(text)] if _MARKED_CHOICE.match(text) else []
    return list(dict.fromkeys(_CHOICE_LIST.findall(text) if _CHOICES.fullmatch(text) else found))


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


def plain_letters(answer: str) -> str:
    r"""The answer with `e` for `\mathrm{e}`, which some parsers of LaTeX cannot read within a fraction."""
    for pattern, replacement in _LETTERS:
        answer = pattern.sub(replacement, answer)
    return answer


def normalise(answer: str) -> str:
    r"""The answer without what changes its looks only, for comparing strings.

    What goes: invisible characters, blanks (but between letters or digits), the maths fence around it ($...$, \(...\)),
    a final dot, \left and \right, thin spaces, \mathrm around a letter, and a \text{...} that is the whole of it. What is
    unified: \dfrac to \frac, \% to %, the minus sign, and the thousands of a number (1,000 and 1{,}000 and 1 000).
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

    A dollar sign before it is passed over. None too for a run of more than MAX_DIGITS digits and for a zero denominator.
    """
    answer = normalise(normalise(text).removeprefix(r"\$"))
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


def too_large(text: str) -> bool:
    r"""Whether it holds a number that nobody should carry out, or brackets nested deeper than MAX_DEPTH.

    Such a number is a run of more than MAX_DIGITS digits, a tower of numbers (9^{9^9}) with an exponent above MAX_EXPONENT, or
    the factorial of a larger number or of a factorial.
    """
    if longest_digits(text) > MAX_DIGITS or _FACTORIAL.search(text) or _depth(text) > MAX_DEPTH:
        return True
    return any(
        _exponent(re.findall("[0-9]+", tower)[1:] or [tower.strip("^ {(")]) > MAX_EXPONENT
        for tower in _TOWER.findall(text)
    )


def _depth(text: str) -> int:
    return max(accumulate((one in "([{") - (one in ")]}") for one in text), default=0)


def _exponent(numbers: Sequence[str]) -> float:
    """The value of a^(b^(c...)), or infinity where it is far too large to matter how far."""
    value = 1.0
    for number in reversed(numbers):
        base = min(float(number), 1e300)
        value = base**value if value * math.log10(max(base, 1.0)) < 300 else math.inf
    return value


def same_answer(gold: str, answer: str, tolerance: float | None = None) -> bool | None:
    r"""Whether two answers are equal, as far as text and exact numbers tell; None where it takes algebra.

    - Equal after `normalise`, or the same `plain_number`: equal. With a `tolerance`, two numbers are equal when they differ by
      no more than that, else not.
    - Two different integers, or two numbers that differ by over a thousandth of the larger: not equal. Other different
      numbers are left open, as 0.333333 may be meant for 1/3.
    - A decimal comma (`1,22`) is read as one where the other answer has the same digits with a decimal point.
    - For a gold answer that is a number, a sum or product of numbers that is not carried out is not equal: else the
      policy is rewarded for boxing the problem (`\boxed{3+5-2}`). With an `=` in it, what follows the last one counts.
    """
    left, right = normalise(gold), normalise(answer)
    if left == right:
        return True
    if _DECIMAL_COMMA.fullmatch(left) or _DECIMAL_COMMA.fullmatch(right):
        return True if "." in left + right and left.replace(",", ".") == right.replace(",", ".") else None
    wanted = plain_number(left)
    if wanted is None:
        return None
    given = plain_number(right)
    if given is None and _SUM.fullmatch(right):
        given = plain_number(right.rpartition("=")[2].strip("()"))
        return given is not None and _same_number(wanted, given, tolerance) is True
    return None if given is None else _same_number(wanted, given, tolerance)


def _same_number(gold: Fraction, answer: Fraction, tolerance: float | None) -> bool | None:
    if tolerance is not None:
        return abs(gold - answer) <= Fraction(str(tolerance))
    if gold == answer:
        return True
    apart = gold.denominator == answer.denominator == 1 or abs(gold - answer) * 1000 > max(abs(gold), abs(answer))
    return False if apart else None


# ---- lists, tuples, names and units ----


def agree(
    gold: str, answer: str, equal: Equal, *, several: bool = False, ordered: bool = False, unit: str | None = None
) -> bool | None:
    r"""Whether an answer is the gold answer, by `equal` for its parts; None where `equal` does not know what it depends on.

    several   the gold answer is a list: as many answers have to be given, each equal to another one of the list;
              `a \pm b` is two answers, and the braces around a set mean nothing.
    ordered   the order of the list counts. That of a tuple always does.
    unit      the answers may bear it or not. An answer with another unit is wrong.

    Tuples and intervals with the same brackets are compared element by element. A name before the answer (`x=`, `f(x)=`,
    `x \in`) may be there or not; of two different names, nothing is known here.
    """
    if normalise(gold) == normalise(answer):
        return True
    if not several:
        return _agree_one(gold, answer, equal, unit)
    golds, answers = split_list(gold), split_list(answer)
    if len(golds) != len(answers):
        return False
    if ordered:
        return _all(_agree_one(one, other, equal, unit) for one, other in zip(golds, answers, strict=True))

    @cache
    def same(row: int, column: int) -> bool | None:
        return _agree_one(golds[row], answers[column], equal, unit)

    if _paired(len(golds), lambda row, column: same(row, column) is True):
        return True
    return None if _paired(len(golds), lambda row, column: same(row, column) is not False) else False


def split_list(text: str) -> list[str]:
    r"""The answers of a list, parted by `,` `;` "and" "or" outside all brackets; `a \pm b` becomes two.

    A comma within a number parts thousands if it is written `{,}` or `,\!`, or if other commas of a list
    without brackets are followed by a blank.
    """
    text = visible(text).replace("{,}", "").replace(r",\!", "")
    if re.search(r"[0-9],\s", text) and not re.search(r"[(\[]", text):
        text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    bare = _MARKUP.sub("", text).strip().removesuffix(".")
    braces = _SET.fullmatch(bare)
    pieces = (_split(braces[1]) if braces else []) or _split(bare)
    parts = [sign for piece in pieces for sign in _signs(piece)]
    return parts if 0 < len(parts) <= MAX_PARTS else [text]


def _split(text: str) -> list[str]:
    """The non-empty pieces between separators outside all brackets; none where the brackets do not match."""
    text = _WORDS_BETWEEN.sub(";", text)
    pieces, depth, start = [], 0, 0
    for match in _SEPARATORS.finditer(text):
        depth += (match.lastgroup == "open") - (match.lastgroup == "close")
        if depth < 0:
            return []
        if match.lastgroup == "separator" and depth == 0:
            pieces.append(text[start : match.start()])
            start = match.end()
    return [piece for one in (*pieces, text[start:]) if (piece := normalise(one))] if depth == 0 else []


def _signs(part: str) -> list[str]:
    if r"\pm" not in part:
        return [part]
    signed = (part.replace(r"\pm", upper).replace(r"\mp", lower) for upper, lower in ("+-", "-+"))
    return [normalise(one.strip().removeprefix("+")) for one in signed]


def _agree_one(gold: str, answer: str, equal: Equal, unit: str | None) -> bool | None:
    if unit is not None:
        bare = without_unit(answer, unit)
        if bare is None:
            return False
        gold, answer = without_unit(gold, unit) or gold, bare
    gold, answer = _without_names(gold, answer)
    tuples = _tuple(gold), _tuple(answer)
    if tuples[0] and tuples[1] and len(tuples[0]) == len(tuples[1]) and _brackets(gold) == _brackets(answer):
        return _all(_agree_one(one, other, equal, unit) for one, other in zip(*tuples, strict=True))
    return equal(gold, answer)


def _without_names(gold: str, answer: str) -> tuple[str, str]:
    """Both without the name in front, where both have the same, or where one has a name and the other is no relation."""
    named, given = (_NAME.fullmatch(normalise(text)) for text in (gold, answer))
    if named and given:
        same = _name_key(named[1]) == _name_key(given[1])
        return (named[2], given[2]) if same else (gold, answer)
    if named and not _RELATION.search(answer):
        return named[2], answer
    if given and not _RELATION.search(gold):
        return gold, given[2]
    return gold, answer


def _name_key(name: str) -> str:
    return re.sub(r"[ {}]", "", name)


def _tuple(text: str) -> list[str]:
    """The elements of a tuple or interval; empty for anything else."""
    text = normalise(text)
    if _brackets(text) not in {"()", "[]", "(]", "[)"}:
        return []
    elements = _split(text[1:-1])
    return elements if 1 < len(elements) <= MAX_PARTS else []


def _brackets(text: str) -> str:
    text = normalise(text)
    return text[:1] + text[-1:]


def without_unit(answer: str, unit: str) -> str | None:
    r"""The answer without the unit at its end (or, for dollars, in front), if it bears it; None if it bears another one.

    Markup does not matter (`\text{ cm}^2`, `\mathrm{cm}^{2}`, `cm²`), nor does the plural; `min` is `minute`, and so on.
    """
    text, wanted = _MARKUP.sub("", normalise(answer)).strip(), _unit_key(unit)
    if wanted == "dollar":
        text = text.removeprefix(r"\$").strip()
    for start in range(max(1, len(text) - _MAX_UNIT_CHARS), len(text)):
        tail = text[start:]
        if tail.count("{") == tail.count("}") and not text[start - 1].isalpha() and _unit_key(tail) == wanted:
            return text[:start].removesuffix("^").removesuffix("\\").strip()
    return None if _OTHER_UNIT.search(text) else text


def _unit_key(unit: str) -> str:
    key = _UNIT_MARKUP.sub("", _DEGREES.sub("deg", "dollar" if unit.strip() in {"$", r"\$"} else unit))
    key = key.translate(_UNIT_SIGNS)
    return re.sub("[A-Za-z]+", lambda word: _one_unit(word[0]), key)


def _one_unit(word: str) -> str:
    singular = word[:-1] if len(word) > 3 and word.endswith("s") else word
    return _SAME_UNITS.get(singular, singular)


def _all(found: Iterable[bool | None]) -> bool | None:
    """False as soon as one is, else None if one is not known."""
    known = True
    for one in found:
        if one is False:
            return False
        known = known and one is not None
    return True if known else None


def _paired(count: int, same: Callable[[int, int], bool]) -> bool:
    """Whether each row can be given a column of its own that is the same (a perfect matching, by augmenting paths)."""
    owners: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column in range(count):
            if column not in tried and same(row, column):
                tried.add(column)
                if column not in owners or place(owners[column], tried):
                    owners[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(count))
