"""Where problems come from: generated sums or programs, or data sets read in one of the formats of papo/engines/sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from papo.engines.protocols import Drop, Problem, Source
from papo.params import GENERATED, PrepareParams


def make_source(params: PrepareParams, *, warn: Callable[[str], None] = lambda text: None) -> Source:
    """The source that `prepare.source` names, with the benchmarks of `prepare.eval_sources`; `warn` is told what does not stop it."""
    from papo.engines.sources.formats import DatasetSource

    loaded = DatasetSource(params, warn=warn)
    if params.source not in GENERATED:
        return loaded
    made = _generated(params)
    return _WithBenchmarks(made, loaded) if params.eval_sources else made


def _generated(params: PrepareParams) -> Source:
    if params.source == "programs":
        from papo.engines.sources.programs import ProgramsSource

        return ProgramsSource(params.programs, seed=params.seed, prompt_template=params.prompt_template)
    from papo.engines.sources.sums import SumsSource

    return SumsSource(params.sums, seed=params.seed, prompt_template=params.prompt_template)


class _WithBenchmarks:
    """Everything of `own`, and the benchmarks of `other` after its own."""

    def __init__(self, own: Source, other: Source) -> None:
        self._own, self._other = own, other
        self.train, self.traces = own.train, own.traces

    def benchmarks(self) -> Mapping[str, Iterator[Problem | Drop]]:
        return {**self._own.benchmarks(), **self._other.benchmarks()}
