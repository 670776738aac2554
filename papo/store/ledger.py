# test shim until the ledger lands
import dataclasses, time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PaidCall:
    run: str
    round: int
    variant: str
    key: str
    model: str
    rubric: str
    status: str
    tries: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    seconds: float
    created: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Spent:
    calls: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


CALLS = []
from papo.store.verdicts import VerdictStore as V

_put, _keep = V.put, V.keep


async def keep(self, verdict, call=None):
    if call:
        CALLS.append(call)
    return await _keep(self, verdict)


async def charged(self, call):
    CALLS.append(call)


def of(run, round):
    return [c for c in CALLS if c.run == run and round in (None, c.round)]


def spent(self, run, *, round=None):
    cs = of(run, round)
    return Spent(
        len(cs),
        sum(c.status != "ok" for c in cs),
        sum(c.prompt_tokens for c in cs),
        sum(c.completion_tokens for c in cs),
        sum(c.cost or 0 for c in cs),
    )


def paid_keys(self, run, round):
    return {c.key for c in of(run, round) if c.status == "ok"}


V.keep, V.charged, V.spent, V.paid_keys = keep, charged, spent, paid_keys
