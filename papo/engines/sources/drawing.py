"""What the generated worlds share: problems that are drawn until there are enough different ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from papo.engines.protocols import Problem
from papo.errors import DataError


def distinct(
    draw: Callable[[], tuple[str, Callable[[], Problem]]], count: int, taken: Collection[str], *,
    what: str, where: str, fix: str, patience: int,
) -> Iterator[Problem]:  # fmt: skip
    """`count` problems with different prompts, none of them in `taken`.

    Args:
        draw: one prompt, and what makes its problem if it is a new one.
        what: `problems of 3 terms`, for the error.
        patience: draws in vain for each problem, above which there are too few.

    Raises:
        DataError: there are not so many.
    """
    seen: set[str] = set()
    misses = 0
    while len(seen) < count:
        prompt, make = draw()
        if prompt in seen or prompt in taken:
            misses += 1
            if misses > 1000 + patience * count:
                raise DataError(f"only {len(seen)} different {what} found, {count} asked for", where=where, fix=fix)
            continue
        seen.add(prompt)
        yield make()
