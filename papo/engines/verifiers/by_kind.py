"""One verifier for problems of several kinds: each goes to the verifier of its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from papo.engines.protocols import Progress, Verdict, Verifier, VerifyItem
from papo.errors import DataError


class VerifierByKind:
    """Routes items by `grading.kind`; a verifier whose kind does not occur is not asked, so what it needs may be absent.

    Args:
        verifiers: by kind, asked in this order.
    """

    def __init__(self, verifiers: Mapping[str, Verifier]) -> None:
        self._verifiers = dict(verifiers)

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        """One verdict an item, in order.

        Raises:
            DataError: an item of a kind that has no verifier.
            PapoError: what the verifiers raise.
        """
        unknown = {item.grading.kind for item in items} - self._verifiers.keys()
        if unknown:
            raise DataError(
                f"no verifier for problems of the kind {', '.join(sorted(unknown))}",
                where="column grading of the problems",
                fix=f"leave them out; known kinds: {', '.join(self._verifiers)}",
            )
        verdicts: dict[int, Verdict] = {}
        for kind, verifier in self._verifiers.items():
            rows = [row for row, item in enumerate(items) if item.grading.kind == kind]
            if rows:
                verdicts |= zip(rows, verifier.verify([items[row] for row in rows], progress), strict=True)
        return [verdicts[row] for row in range(len(items))]

    def versions(self) -> dict[str, str]:
        """Those of all verifiers."""
        return {name: version for each in self._verifiers.values() for name, version in each.versions().items()}
