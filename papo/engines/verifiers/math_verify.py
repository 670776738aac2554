r"""Mathematical answers, compared by math-verify (sympy) in child processes that can be killed.

What strings and numbers settle is settled here, without a child. The rest may take any time and memory (`9^{9^{9^9}}`
is an answer too), and math-verify's own limit is a signal that needs the main thread and does not interrupt a long
multiplication. So each pair is compared in a child with a limit on wall time, CPU time and address space.

    equal: by text, by number, or by math-verify          1.0   ok
    not equal, or not readable as mathematics             0.0   ok               what cannot be read cannot be right
    one is too large to carry out (9^{9^9}) or nested     0.0   ok               as missing, it would go unpunished
    too deeply, and is not the other's text
    no closed box, an empty one, over 1,000 characters    0.0   no_answer        nothing that could be an answer
    the gold answer is empty, huge or not readable        None  unparsable_gold
    the comparison took longer than `timeout_s`           None  timeout          nobody knows, and missing is not wrong
    the child died or ran out of memory                   None  error
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import re
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import lru_cache, partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papo.core.answers import (
    Equal,
    agree,
    extract_answer,
    normalise,
    plain_letters,
    plain_number,
    same_answer,
    split_list,
    too_large,
    visible,
)
from papo.engines.protocols import Progress, Verdict, VerifyItem
from papo.errors import StageError
from papo.schemas import Grading

if TYPE_CHECKING:
    from pebble import ProcessPool

Pair = tuple[str, str, Grading]
"""Gold answer, extracted answer, and how they are compared."""

Checker = Callable[[Sequence[Pair]], Generator[tuple[Pair, str], None, None]]
"""Takes distinct pairs and gives each with its outcome, as they end: right, wrong, unparsable_gold, timeout or error."""

MAX_GOLD_CHARS = 10_000
CHILD_MEMORY = 2 * 2**30
"""Bytes of address space that a child may take beyond those it has after its imports."""

_VERDICTS = {"right": (1.0, "ok"), "wrong": (0.0, "ok"), "no_answer": (0.0, "no_answer")}
_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
_PERCENTAGE = re.compile(r"[+-]?[0-9., ]+ ?(?:%|pct|percent)")
_MARKED_UP = re.compile(r"\$|\\boxed|\\\(|\\\[")
_SPARE_CPU_S = 2  # the kill by wall time comes first; the CPU limit is for a child whose parent is gone


class MathVerifier:
    """Outcome of completions whose answer is mathematical; see the table of this module.

    Args:
        timeout_s: limit of wall time for one pair.
        workers: child processes. None is started unless a pair needs one; none is left when `verify` returns or raises.
        checker: compares the pairs that text does not settle; a test hands in a fake.
    """

    def __init__(self, *, timeout_s: float = 2.0, workers: int = 1, checker: Checker | None = None) -> None:
        self._checker = checker or partial(in_children, compare, timeout_s=timeout_s, workers=workers)

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        """One verdict an item, in order; each distinct (gold, extracted) is judged once.

        Raises:
            StageError: child processes cannot be started or kept up on this machine.
        """
        keys = [(gold, extract_answer(text, stated=how.extraction == "answer_is"), how) for gold, text, how in items]
        counts = Counter(keys)
        outcomes = {key: outcome for key in counts if (outcome := _settled(*key)) is not None}
        progress(sum(counts[key] for key in outcomes))
        undecided = [(key[0], key[1], key[2]) for key in counts if key[1] is not None and key not in outcomes]
        if undecided:
            with closing(self._checker(undecided)) as checked:
                for pair, outcome in checked:
                    outcomes[pair] = outcome
                    progress(counts[pair])
        return [_verdict(key[1], outcomes[key]) for key in keys]

    def versions(self) -> dict[str, str]:
        """math-verify and the two libraries that its verdicts come from."""
        return {name: metadata.version(name) for name in _LIBRARIES}


def unreadable_golds(golds: Iterable[str], *, timeout_s: float = 2.0, workers: int = 1) -> dict[str, str]:
    """Gold answers that no answer can be compared with, each with its outcome: unparsable_gold, timeout or error.

    Numbers are readable as they stand; the others are parsed in child processes.

    Raises:
        StageError: as `MathVerifier.verify`.
    """
    asked = [gold for gold in dict.fromkeys(golds) if plain_number(normalise(gold)) is None]
    short = [(gold, gold, Grading()) for gold in asked if gold.strip() and len(gold) <= MAX_GOLD_CHARS]
    found = {gold: "unparsable_gold" for gold in asked if not gold.strip() or len(gold) > MAX_GOLD_CHARS}
    if short:
        with closing(in_children(_gold_outcome, short, timeout_s=timeout_s, workers=workers)) as checked:
            found |= {gold: outcome for (gold, _, _), outcome in checked if outcome != "right"}
    return found


def _settled(gold: str, answer: str | None, grading: Grading) -> str | None:
    """The outcome where no algebra is needed, else None."""
    if not gold.strip() or len(gold) > MAX_GOLD_CHARS:
        return "unparsable_gold"
    if answer is None or not normalise(answer):
        return "no_answer"
    same = _agree(gold, answer, grading, partial(same_answer, tolerance=grading.tolerance))
    if same is None and (too_large(normalise(answer)) or too_large(normalise(gold))):
        same = False
    return None if same is None else "right" if same else "wrong"


def _agree(gold: str, answer: str, grading: Grading, equal: Equal) -> bool | None:
    return agree(gold, answer, equal, several=grading.several, ordered=grading.ordered, unit=grading.unit)


def _verdict(answer: str | None, outcome: str) -> Verdict:
    score, status = _VERDICTS.get(outcome, (None, outcome))
    return Verdict(score, answer, status)


def in_children(
    function: Callable[[str, str, Grading], str], pairs: Iterable[Pair], *, timeout_s: float, workers: int
) -> Generator[tuple[Pair, str], None, None]:
    """Each pair with `function(*pair)`, as they end, computed in child processes that end with this generator.

    In place of a result stands `timeout` where the child had to be killed, and `error` where it died or raised.

    Raises:
        StageError: the pool of children is beyond repair.
    """
    from pebble import ProcessPool

    # A fork of this process would carry its threads' locks and all of torch. The fork server is a fresh process that
    # has imported sympy once, so that a killed child is replaced within milliseconds. It ends with this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["math_verify", __name__])
    pool = ProcessPool(max_workers=workers, initializer=_prepare_child, context=context)
    try:
        yield from _windowed(pool, partial(_limited, function, timeout_s), pairs, timeout_s, window=4 * workers)
    except RuntimeError as error:  # BrokenProcessPool, and what pebble raises when a broken pool is given work
        raise StageError(
            f"the child processes that compare answers keep dying: {error}",
            where="score_orm",
            fix="check this machine's memory and process limits (ulimit -a), and that `import math_verify` works",
        ) from error
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def _windowed(
    pool: ProcessPool,
    function: Callable[[str, str, Grading], str],
    pairs: Iterable[Pair],
    timeout_s: float,
    window: int,
) -> Iterator[tuple[Pair, str]]:
    """Keeps `window` pairs in flight: a pool that breaks then has no long queue of its own that nobody answers for."""
    running: dict[Future[Any], Pair] = {}
    for pair in pairs:
        running[pool.schedule(function, args=pair, timeout=timeout_s)] = pair
        if len(running) >= window:
            yield from _finished(running)
    while running:
        yield from _finished(running)


def _finished(running: dict[Future[Any], Pair]) -> Iterator[tuple[Pair, str]]:
    """Waits for the first pairs to end, in whatever order: one that takes long must not hold up the other children."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), _outcome(future)


def _outcome(future: Future[Any]) -> str:
    """The boundary: what can happen to a child becomes an outcome."""
    try:
        return str(future.result())
    except TimeoutError:
        return "timeout"
    except BrokenProcessPool:
        raise
    except Exception:  # ProcessExpired, MemoryError and whatever else the comparison of one pair may raise
        return "error"


# ---- what runs in a child ----


def _prepare_child() -> None:
    """Imports, quiet and limits; before the first pair, so that none of it counts against a pair's time."""
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for the end of a long multiplication
    _parse("1")
    _set_soft_limit(resource.RLIMIT_CORE, 0)
    memory = Path("/proc/self/statm")
    if memory.exists():
        _set_soft_limit(resource.RLIMIT_AS, int(memory.read_text().split()[0]) * resource.getpagesize() + CHILD_MEMORY)


def _set_soft_limit(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limited(function: Callable[[str, str, Grading], str], timeout_s: float, *pair: Any) -> str:
    _set_soft_limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + timeout_s) + _SPARE_CPU_S)
    return function(*pair)


def compare(gold: str, answer: str, grading: Grading) -> str:
    """`right`, `wrong` or `unparsable_gold`, by math-verify, without a limit of its own: call it in a child.

    Raises:
        MemoryError: the comparison needs more than the process may have.
    """
    if _agree(gold, answer, grading, partial(_equal, tolerance=grading.tolerance)):
        return "right"
    return "wrong" if _gold_outcome(gold, answer, grading) == "right" else "unparsable_gold"


def _gold_outcome(gold: str, answer: str, grading: Grading) -> str:
    """`right` if the gold answer, or one of several, is readable as mathematics, else `unparsable_gold`; in a child."""
    parts = (gold, *(part.rpartition("=")[2] for part in split_list(gold)))
    return "right" if any(map(_readable, parts)) else "unparsable_gold"


def _readable(gold: str) -> bool:
    return any(not isinstance(one, str) for one in _parse_gold(gold))


def _equal(gold: str, answer: str, tolerance: float | None) -> bool:
    """By text and number if they tell, else as mathematics."""
    same = same_answer(gold, answer, tolerance)
    if same is not None:
        return same
    pairs = list(product(_parse_gold(gold), _parse(answer)))
    return any(_verified(*pair) for pair in pairs) or (
        tolerance is not None and any(_within(*pair, tolerance) for pair in pairs)
    )


def _verified(gold: Any, answer: Any) -> bool:
    """math-verify's comparison in its direction (it is not symmetric); what it cannot compare is not equal."""
    from math_verify import verify

    try:
        return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # sympy raises nearly anything on answers that make no sense
        return False


def _within(gold: Any, answer: Any, tolerance: float) -> bool:
    """Whether two numbers, or two matrices number by number, differ by no more than the tolerance."""
    try:
        difference = (gold - answer).evalf()
        return all(bool(abs(one) <= tolerance) for one in getattr(difference, "flat", lambda: [difference])())
    except MemoryError:
        raise
    except Exception:  # not numbers, or of different shapes
        return False


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> list[Any]:
    """A gold answer is trusted: where it has markup of its own ($...$, boxes), math-verify reads it in all its ways."""
    from math_verify import parse

    return list(parse(gold, parsing_timeout=None)) if _MARKED_UP.search(gold) else _parse(gold)


@lru_cache(maxsize=256)  # a list asks for each of its answers several times
def _parse(answer: str) -> list[Any]:
    """The whole text as one LaTeX expression, or as a percentage, never a part of it; last, the text itself."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    plain = normalise(answer)
    if _PERCENTAGE.fullmatch(plain):
        return list(parse(plain, [ExprExtractionConfig()], parsing_timeout=None))
    return list(parse(f"\\boxed{{{plain_letters(visible(answer))}}}", [LatexExtractionConfig()], parsing_timeout=None))
