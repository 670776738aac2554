"""Where problems come from: generated sums, or data sets read in one of the formats of papo/engines/sources."""

from __future__ import annotations

from collections.abc import Callable

from papo.engines.protocols import Source
from papo.params import PrepareParams


def make_source(params: PrepareParams, *, warn: Callable[[str], None] = lambda text: None) -> Source:
    """The source that `prepare.source` names; `warn` is told what does not stop it."""
    if params.source == "sums":
        from papo.engines.sources.sums import SumsSource

        return SumsSource(params.sums, seed=params.seed, prompt_template=params.prompt_template)
    from papo.engines.sources.formats import DatasetSource

    return DatasetSource(params, warn=warn)
