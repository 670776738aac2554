r"""Multiple choice: the letter of a completion against the letter of the gold answer.

    the gold letter                                       1.0   ok
    another letter, or several different ones             0.0   ok               several letters are no choice
    no box, no letter in the last one                     0.0   no_answer
    the gold answer is no letter from A to J              None  unparsable_gold

Where the grading says `answer_is` and there is no box at all, "the answer is (B)" counts as a box does.
"""

from __future__ import annotations

from collections.abc import Sequence

from papo.core.answers import choices_in, extract_answer
from papo.engines.protocols import Progress, Verdict, VerifyItem


class ChoiceVerifier:
    """Outcome of completions that end in a letter from A to J; see the table of this module."""

    def verify(self, items: Sequence[VerifyItem], progress: Progress) -> list[Verdict]:
        """One verdict an item, in order; `extracted` is the letter, or the letters parted by a comma."""
        verdicts = [_verdict(item) for item in items]
        progress(len(verdicts))
        return verdicts

    def versions(self) -> dict[str, str]:
        """None: no library decides."""
        return {}


def _verdict(item: VerifyItem) -> Verdict:
    answer = extract_answer(item.completion, stated=item.grading.extraction == "answer_is")
    letters = choices_in(answer) if answer is not None else []
    extracted = ", ".join(letters) or None
    wanted = choices_in(item.gold)
    if len(wanted) != 1:
        return Verdict(None, extracted, "unparsable_gold")
    if not letters:
        return Verdict(0.0, None, "no_answer")
    return Verdict(float(letters == wanted), extracted, "ok")
