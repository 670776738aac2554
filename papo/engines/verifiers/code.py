"""Programs as outcomes: a completion is right if its code passes the tests, in a sandbox.

    the program passes its tests                          1.0   ok
    it fails, takes too long, or dies                     0.0   ok               unlike an answer nobody could compare, its fate is known
    no code, or over 100,000 characters of it             0.0   no_answer
    the gold answer, which is the tests, is empty         None  unparsable_gold
    the sandbox itself failed                             None  error

What became of the program is the verdict's `detail`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing

from papo.core.code import extract_code, missing_prefix
from papo.engines.protocols import Progress, Verdict, VerifyItem
from papo.engines.sandbox import Program, Ran, Sandbox
from papo.schemas import Grading


class CodeVerifier:
    """Outcome of completions that are programs; see the table of this module.

    Args:
        sandbox: runs the programs; looked for when there is one to run.
        workers: programs that run at a time.
    """

    def __init__(self, sandbox: Sandbox, *, workers: int = 1) -> None:
        self._sandbox, self._workers = sandbox, workers
        self._checked = False

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        """One verdict an item, in order; each distinct program is run once.

        Raises:
            SetupError: there are programs to run, and this machine has no sandbox.
        """
        codes = [extract_code(item.completion) for item in items]
        keys = [_program(item.gold, code, item.grading) for item, code in zip(items, codes, strict=True)]
        counts = Counter(keys)
        progress(counts.pop(None, 0))
        programs = [program for program in counts if program is not None]
        runs: dict[Program | None, Ran | None] = {}
        if programs:
            self._check()
            with closing(self._sandbox.run_many(programs, self._workers)) as ran:
                for program, run in zip(programs, ran, strict=True):
                    runs[program] = run
                    progress(counts[program])
        return [
            _unrun(item.gold, code) if program is None else _verdict(code, runs[program])
            for item, code, program in zip(items, codes, keys, strict=True)
        ]

    def versions(self) -> dict[str, str]:
        """What made the sandbox; nothing where no program was run."""
        return self._sandbox.versions() if self._checked else {}

    def _check(self) -> None:
        if not self._checked:
            self._sandbox.check()
            self._checked = True


def _program(gold: str, code: str | None, grading: Grading) -> Program | None:
    """Code with what it lacks of the prefix; None where there is nothing to run."""
    if code is None or not gold.strip():
        return None
    prefix = missing_prefix(code, grading.prefix, grading.entry_point)
    return Program(prefix + code, gold, grading.entry_point)


def _unrun(gold: str, code: str | None) -> Verdict:
    return Verdict(0.0, code, "no_answer") if gold.strip() else Verdict(None, code, "unparsable_gold")


def _verdict(code: str | None, run: Ran | None) -> Verdict:
    if run is None:
        return Verdict(None, code, "error")
    return Verdict(float(run.verdict == "passed"), code, "ok", run.verdict)
