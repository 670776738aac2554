"""warmstart: the policy that round 0 samples from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from papo.engines.protocols import WarmStarter
from papo.params import WarmstartParams
from papo.schemas import TRACES
from papo.store.faults import reached
from papo.store.files import replacing
from papo.store.manifest import Context, Manifest, Task
from papo.store.tables import read_rows

CODE = ("stages/warmstart.py", "engines/warmstart.py", "engines/tokenizer.py", "engines/policy.py")


@dataclass(frozen=True)
class Inputs:
    """`checkpoint` counts by its content where it is a folder of this machine: other weights are another policy."""

    traces: Path
    checkpoint: Path | None = None


def local_checkpoint(params: WarmstartParams) -> Path | None:
    """The folder that the params name, where it is one of this machine."""
    return Path(params.checkpoint) if params.checkpoint is not None and Path(params.checkpoint).is_dir() else None


def run(
    params: WarmstartParams, inputs: Inputs, out: Path, *, engine: WarmStarter, context: Context = Context()
) -> Manifest:
    """Writes the first policy, in Hugging Face form, to the folder `out`."""
    task = Task("warmstart", params, inputs, [out], code=CODE, context=context)
    if done := task.done():
        return done
    traces = [(row["prompt"], row["completion"]) for row in read_rows(inputs.traces, TRACES)]
    with replacing(out) as folder, context.progress("warmstart", engine.steps()) as progress:
        reached("fit")
        history = engine.fit(traces, folder, progress)
        reached("fitted")
    last = {f"final_{name}": value for name, value in history[-1].items() if name != "step"} if history else {}
    return task.finish(rows=len(traces), metrics=last, history=history, versions=engine.versions())
