"""Where problems come from: generated sums or programs, or data sets read in one of the formats of papo/engines/sources."""

from __future__ import annotations

from papo.engines.protocols import Source
from papo.params import PrepareParams


def make_source(params: PrepareParams) -> Source:
    """The source that `prepare.source` names."""
    if params.source == "sums":
        from papo.engines.sources.sums import SumsSource

        return SumsSource(params.sums, seed=params.seed, prompt_template=params.prompt_template)
    if params.source == "programs":
        from papo.engines.sources.programs import ProgramsSource

        return ProgramsSource(params.programs, seed=params.seed, prompt_template=params.prompt_template)
    from papo.engines.sources.formats import DatasetSource

    return DatasetSource(params)
