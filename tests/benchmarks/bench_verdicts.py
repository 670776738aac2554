"""Speed of the store of verdicts: puts one after the other and by many threads, claims, and the lookup of a whole table.

    python tests/benchmarks/bench_verdicts.py [--folder DIR] [--verdicts N]

DIR is on the disk that the store would be on, for a put waits for the disk. Answers have 300 to 1,500 characters.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from papo.store.owners import new_owner
from papo.store.verdicts import StoredVerdict, VerdictStore, verdict_key, verdict_parts

SAMPLING = {"temperature": 0.0, "seed": 0, "max_tokens": 1024}


def made(count: int) -> list[StoredVerdict]:
    chance = random.Random(0)
    some = []
    for number in range(count):
        named = ("judge-7b", "r" * 64, f"prompt {number}", SAMPLING, 0)
        answer = "".join(chance.choices("abcdefghij {}:,\n", k=chance.randrange(300, 1500)))
        some.append(
            StoredVerdict(
                verdict_key(verdict_parts(*named)),
                "judge-7b",
                "levels/1",
                answer,
                "stop",
                900,
                200,
                1.5,
                parts=verdict_parts(*named),
            )
        )
    return some


def timed(name: str, count: int, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(f"{name:<44} {count / seconds:>10,.0f}/s   {count:,} in {seconds:.2f} s")


def put_all(store: VerdictStore, some: Sequence[StoredVerdict], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(store.put, some):
            pass


async def put_in_loop(store: VerdictStore, some: Sequence[StoredVerdict]) -> None:
    await asyncio.gather(*(store.keep(one) for one in some))


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the store of verdicts.")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--verdicts", type=int, default=20_000)
    options = parser.parse_args()
    some = made(options.verdicts)
    keys = [one.key for one in some]
    alone = min(200, len(some))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "verdicts.sqlite"
        with VerdictStore.open(path) as store:
            owner = new_owner()
            timed("claims, a whole table at once", len(keys), lambda: store.claim(keys, owner))
            timed("claims refused, a whole table at once", len(keys), lambda: store.claim(keys, new_owner()))
            timed("puts, one after the other", alone, lambda: [store.put(one) for one in some[:alone]])
            timed("puts, 32 threads", len(some) - alone, lambda: put_all(store, some[alone:], 32))
        with VerdictStore.open(Path(folder) / "loop.sqlite") as store:
            timed(
                "puts, from an event loop", min(5000, len(some)), lambda: asyncio.run(put_in_loop(store, some[:5000]))
            )
        with VerdictStore.open(path) as store:
            timed("lookup of a whole table, just opened", len(keys), lambda: store.get_many(keys))
            timed("lookup of a whole table, again", len(keys), lambda: store.get_many(keys))
            timed("lookup, one key at a time", 2000, lambda: [store.get_many([key]) for key in keys[:2000]])
            timed("claims, one key at a time", 500, lambda: [store.claim([f"{n:064x}"], owner) for n in range(500)])
            timed("verify", len(keys), store.verify)
            timed("export to Parquet", len(keys), lambda: store.export(Path(folder) / "out.parquet"))
            print(f"{path.stat().st_size / len(keys):,.0f} bytes a verdict")


if __name__ == "__main__":
    main()
