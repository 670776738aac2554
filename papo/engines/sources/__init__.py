"""Where problems come from: generated sums, or data sets read in one of the formats of papo/engines/sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from papo.engines.protocols import Drop, Problem, Source
from papo.params import PrepareParams


def make_source(params: PrepareParams) -> Source:
    """The source that `prepare.source` names; `prepare.eval_sources` are benchmarks of any source."""
    from papo.engines.sources.formats import DatasetSource

    if params.source != "sums":
        return DatasetSource(params)
    from papo.engines.sources.sums import SumsSource

    sums = SumsSource(params.sums, seed=params.seed, prompt_template=params.prompt_template)
    return _WithBenchmarks(sums, DatasetSource(params)) if params.eval_sources else sums


class _WithBenchmarks:
    """Everything of `own`, and the benchmarks of `other` after its own."""

    def __init__(self, own: Source, other: Source) -> None:
        self._own, self._other = own, other
        self.train, self.traces = own.train, own.traces

    def benchmarks(self) -> Mapping[str, Iterator[Problem | Drop]]:
        return {**self._own.benchmarks(), **self._other.benchmarks()}
