r"""Training problems that a benchmark holds, too: equal but for the way they are written, or nearly so.

Equal: the same tokens, in lower case, without LaTeX's spacing and sizing commands, dollars, braces and the punctuation of sentences.
Signs, parentheses and digits count, for `3+5` is not `3-5`.

Near: at least `threshold` of the tokens are the same in the same order: 2 M / T, M tokens in common, T in both. Only pairs that share
enough runs of three tokens are compared; the search for them is a product of sparse matrices (scikit-learn), which misses no pair. A
problem of few words is compared as equal only: formulas that differ in a digit are other problems.

The template of a set, words that most of its prompts begin or end with, is left out first.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

RUN = 3
"""Tokens in a run, by which candidates are found."""

SHARED_RUNS = 0.35
"""Share of the runs of the shorter problem that a candidate has, too."""

MIN_WORDS = 5
"""Fewest words of letters, of two letters or more, of a problem that is compared for likeness."""

TEMPLATE_SHARE, TEMPLATE_COUNT, TEMPLATE_TOKENS = 0.5, 5, 4
"""A template stands in this share of a set and in this many problems, and has this many tokens, each at least."""

BLOCK = 2_000
"""Training problems that are searched at once."""

_SPACING = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad|thinspace|[hv]space\{[^}]*\})(?![a-z])"
    r"|\\[,;:! ]|\\[()\[\]]|[~${}]"
)
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_THOUSANDS = re.compile(r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))")
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_TOKEN = re.compile(
    r"\d+(?:\.\d+)?|\\?[^\W\d_]+|(?<![^\W\d_]{2})!|[-+*/=<>^%|()\[\]]|[^\w\s.,;:?!'\"`_\\&\u2018\u2019\u201c\u201d]"
)


class Match(NamedTuple):
    """The benchmark's problem that a training problem is like, and where it stands there; `score` is 1 where they are equal."""

    benchmark: str
    place: int
    score: float
    equal: bool


def tokens_of(text: str) -> list[str]:
    """The tokens that count."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = _THOUSANDS.sub("", _SPACING.sub(" ", plain.replace("{,}", ",")))
    plain = _HYPHEN.sub(" ", _FRACTION.sub(r"\\frac", plain))
    return _TOKEN.findall(_IDEOGRAPH.sub(r" \1 ", plain)) or [plain.strip()]


def matches(
    train: Sequence[str], benchmarks: Mapping[str, Sequence[str]], *, threshold: float | None
) -> dict[int, Match]:
    """Index of a training problem -> the problem of a benchmark that is most like it; none for those that are clean.

    Args:
        train, benchmarks: prompts.
        threshold: least likeness of a near match, in (0, 1]; None looks for equal ones only.
    """
    held_out = [(name, index) for name, prompts in benchmarks.items() for index in range(len(prompts))]
    sets = _bare([[tokens_of(text) for text in prompts] for prompts in (train, *benchmarks.values())])
    ours, theirs = sets[0], [tokens for problems in sets[1:] for tokens in problems]
    places: dict[tuple[str, ...], int] = {}
    for place, tokens in enumerate(theirs):
        places.setdefault(tuple(tokens), place)
    found = {
        index: Match(*held_out[place], 1.0, True)
        for index, tokens in enumerate(ours)
        if (place := places.get(tuple(tokens), -1)) >= 0
    }
    if threshold is not None:
        for index, place, score in _near(ours, theirs, threshold):
            if index not in found or score > found[index].score:
                found[index] = Match(*held_out[place], score, False)
    return found


def _runs(tokens: Sequence[str]) -> set[str]:
    return {" ".join(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)}


def _stem(problems: Iterable[Sequence[str]], size: int) -> list[str]:
    """The longest beginning that TEMPLATE_SHARE of `size` problems share; empty if it is shorter than TEMPLATE_TOKENS."""
    stem: list[str] = []
    left = list(problems)
    while True:
        following = Counter(tokens[len(stem)] for tokens in left if len(tokens) > len(stem))
        token, count = following.most_common(1)[0] if following else ("", 0)
        if count < max(TEMPLATE_COUNT, TEMPLATE_SHARE * size):
            return stem if len(stem) >= TEMPLATE_TOKENS else []
        left = [tokens for tokens in left if len(tokens) > len(stem) and tokens[len(stem)] == token]
        stem.append(token)


def _bare(sets: Sequence[Sequence[list[str]]]) -> list[list[list[str]]]:
    """Every set without the templates of any."""
    heads = [_stem(problems, len(problems)) for problems in sets]
    tails = [_stem([tokens[::-1] for tokens in problems], len(problems))[::-1] for problems in sets]

    def bare(tokens: list[str]) -> list[str]:
        head = max((len(stem) for stem in heads if tokens[: len(stem)] == stem), default=0)
        tail = max((len(stem) for stem in tails if stem and tokens[-len(stem) :] == stem), default=0)
        return tokens[head : len(tokens) - tail] or tokens

    return [[bare(tokens) for tokens in problems] for problems in sets]


def _wordy(tokens: Sequence[str]) -> bool:
    return sum(len(token) > 1 and token.isalpha() for token in tokens) >= MIN_WORDS


def _near(ours: Sequence[list[str]], theirs: Sequence[list[str]], threshold: float) -> Iterator[tuple[int, int, float]]:
    for index, place in _candidates(ours, theirs):
        matcher = SequenceMatcher(None, ours[index], theirs[place], autojunk=False)
        if matcher.quick_ratio() >= threshold and (score := matcher.ratio()) >= threshold:
            yield index, place, score


def _candidates(ours: Sequence[list[str]], theirs: Sequence[list[str]]) -> Iterator[tuple[int, int]]:
    """Pairs of indices that share runs enough."""
    import numpy as np

    rows = [index for index, tokens in enumerate(ours) if _wordy(tokens)]
    columns = [place for place, tokens in enumerate(theirs) if _wordy(tokens)]
    if not rows or not columns:
        return
    counter, held_out = _counted([theirs[place] for place in columns])
    sizes = np.array([len(_runs(theirs[place])) for place in columns])
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        shared = (counter.transform([ours[index] for index in block]) @ held_out).tocoo()
        own = np.array([len(_runs(ours[index])) for index in block])
        enough = shared.data >= SHARED_RUNS * np.minimum(own[shared.row], sizes[shared.col])
        for row, column in zip(shared.row[enough], shared.col[enough], strict=True):
            yield block[row], columns[column]


def _counted(problems: Sequence[list[str]]) -> tuple[Any, Any]:
    """A vectorizer of the runs that `problems` hold, and their runs, a column a problem."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(analyzer=_runs, binary=True, dtype="int32")
    return counter, counter.fit_transform(problems).T.tocsr()
