"""Which rows of a round go into which step, process and forward pass. Plain Python: no tensors.

A step is so many prompts with all their responses. Rows that give no gradient are left out, with the weights of the others as if they
were there. What remains is dealt to the processes, and filled into micro-batches by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from papo.engines.protocols import TrainRow

Weigh = Callable[[Sequence[int]], Sequence[float]]
"""Lengths of the completions of a step -> what each token of them counts in its loss: `losses.token_weights`."""


@dataclass(frozen=True)
class Item:
    """One response in a step: its place in the round, and what each of its tokens counts in the loss of the step."""

    place: int
    row: TrainRow
    weight: float

    @property
    def prompt(self) -> int:
        return len(self.row.prompt_ids)

    @property
    def completion(self) -> int:
        return len(self.row.completion_ids)


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, each prompt once if `shared`; `tokens` that are computed for it, and the `needed` of them that are
    no padding."""

    items: tuple[Item, ...]
    shared: bool
    tokens: int
    needed: int


@dataclass(frozen=True)
class Step:
    """One optimizer step of this process: `batches` as many as on every other; counts are of all processes.

    `computed` are all rows that take part, on any process, in the order of the round.
    """

    batches: list[MicroBatch]
    responses: int
    tokens: int
    computed: tuple[Item, ...]


@dataclass(frozen=True)
class Layout:
    """How micro-batches are filled: at most `tokens` each (a single row may have more), prompts shared or packed where it can be."""

    tokens: int
    shared: bool
    packed: bool = False


def active(row: TrainRow) -> bool:
    """Whether any of its tokens has an advantage."""
    return any(row.token_advantages) if row.token_advantages is not None else row.advantage != 0.0


def plan(
    groups: Sequence[Sequence[TrainRow]],
    *,
    size: int,
    weigh: Weigh,
    skip_zero: bool,
    mask_truncated: bool,
    layout: Layout,
    rank: int = 0,
    world: int = 1,
) -> list[Step]:
    """The steps of a round as process `rank` of `world` does them.

    Args:
        size: prompts in a step.
        skip_zero: leave out rows whose advantage is zero.
        mask_truncated: leave out rows that were cut off, also from what the weights are made of.
    """
    places = iter(range(sum(map(len, groups))))
    placed = [[(next(places), row) for row in group] for group in groups]
    return [
        _step([pair for group in placed[at : at + size] for pair in group], weigh, skip_zero, mask_truncated, layout, rank, world)
        for at in range(0, len(placed), size)
    ]  # fmt: skip


def _step(
    rows: Sequence[tuple[int, TrainRow]],
    weigh: Weigh,
    skip_zero: bool,
    mask_truncated: bool,
    layout: Layout,
    rank: int,
    world: int,
) -> Step:
    lengths = [0 if mask_truncated and row.truncated else len(row.completion_ids) for _, row in rows]
    weights = weigh(lengths)
    computed = tuple(
        Item(place, row, weight)
        for (place, row), weight, length in zip(rows, weights, lengths, strict=True)
        if length and (not skip_zero or active(row))
    )
    shares = [fill(share, layout) for share in _deal(computed, world)]
    count = max(1, *map(len, shares))
    mine = shares[rank]
    if len(mine) < count:
        # All processes do as many forward passes, as what they exchange has to meet; one that has no rows left does the shortest for
        # nothing. So does a step without any: its gradient is zero, and the optimizer's moments go on as they do for that.
        place, row = min(rows, key=lambda pair: (len(pair[1].prompt_ids) + len(pair[1].completion_ids), pair[0]))
        # An advantage could make it infinite, and zero times that is no number.
        idle = Item(place, replace(row, advantage=0.0, token_advantages=None), 0.0)
        mine = mine + fill([idle], layout) * (count - len(mine))
    return Step(mine, len(rows), sum(lengths), computed)


def _deal(items: Sequence[Item], world: int) -> list[list[Item]]:
    """The longest first, each to the process that has the fewest tokens."""
    if world == 1:
        return [list(items)]
    shares: list[list[Item]] = [[] for _ in range(world)]
    loads = [0] * world
    for item in sorted(items, key=lambda item: (-(item.prompt + item.completion), item.place)):
        least = loads.index(min(loads))
        shares[least].append(item)
        loads[least] += item.prompt + item.completion
    return shares


def fill(items: Sequence[Item], layout: Layout) -> list[MicroBatch]:
    """Micro-batches that hold all items: of the orders and layouts there are, those that compute the fewest tokens."""
    if not items:
        return []
    if layout.packed:
        return _filled(items, layout.tokens, _Packed)
    found = [_filled(sorted(items, key=lambda i: (i.prompt + i.completion, i.place)), layout.tokens, _Padded)]
    if layout.shared:
        orders: list[Callable[[Item], tuple[Any, ...]]] = [
            lambda i: (i.completion, i.place),
            lambda i: (i.prompt, i.row.prompt_ids, i.completion, i.place),
        ]
        found += [_filled(sorted(items, key=order), layout.tokens, _Shared) for order in orders]
    return min(found, key=lambda batches: sum(batch.tokens for batch in batches))


class _Padded:
    """Every row by itself, as long as the longest. The last token of a row is predicted and never read."""

    shared = False

    def __init__(self) -> None:
        self.rows = self.longest = self.needed = 0

    def with_(self, item: Item) -> int:
        """Tokens that are computed once the item is in."""
        return (self.rows + 1) * max(self.longest, item.prompt + item.completion - 1)

    def add(self, item: Item) -> None:
        length = item.prompt + item.completion - 1
        self.rows, self.longest, self.needed = self.rows + 1, max(self.longest, length), self.needed + length


class _Packed(_Padded):
    """One row after another, without padding."""

    def with_(self, item: Item) -> int:
        return self.needed + item.prompt + item.completion - 1


class _Shared:
    """Each prompt once, as long as the longest prompt; then the completions, as long as the longest completion."""

    shared = True

    def __init__(self) -> None:
        self.prompts: set[tuple[int, ...]] = set()
        self.rows = self.longest_prompt = self.longest = self.needed = 0

    def with_(self, item: Item) -> int:
        prompts = len(self.prompts) + (tuple(item.row.prompt_ids) not in self.prompts)
        rows = (self.rows + 1) * max(self.longest, item.completion - 1)
        return prompts * max(self.longest_prompt, item.prompt) + rows

    def add(self, item: Item) -> None:
        prompt = tuple(item.row.prompt_ids)
        self.needed += item.completion - 1 + (0 if prompt in self.prompts else item.prompt)
        self.prompts.add(prompt)
        self.longest_prompt = max(self.longest_prompt, item.prompt)
        self.rows, self.longest = self.rows + 1, max(self.longest, item.completion - 1)


def _filled(items: Iterable[Item], limit: int, kind: type[_Padded] | type[_Shared]) -> list[MicroBatch]:
    batches: list[MicroBatch] = []
    held: list[Item] = []
    size, tokens = kind(), 0

    def close() -> None:
        if held:
            batches.append(MicroBatch(tuple(held), kind.shared, tokens, size.needed))

    for item in items:
        if held and size.with_(item) > limit:
            close()
            held, size = [], kind()
        tokens = size.with_(item)
        size.add(item)
        held.append(item)
    close()
    return batches
