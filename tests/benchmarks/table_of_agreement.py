r"""Our verdicts on (gold, answer) pairs from the tests of public graders: agreement with what each of them expects.

    python tests/benchmarks/table_of_agreement.py ORACLE_FOLDER [--strict]

What is compared is the comparison of two answers. A prediction that is no bare answer (prose, several boxes) is first brought
into one box by `handed_over`, a reading that is more lenient than any that a policy is trained or measured with. With --strict
the pair is judged as in training: a prediction with boxes stands as it is, and the last box alone is its answer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from papo.engines.protocols import VerifyItem
from papo.engines.verifiers.math_verify import MathVerifier
from papo.schemas import Grading

FILES = ("math_verify", "olympiadbench_scoring", "hendrycks_is_equiv", "tinker_grade_answer")
MATH_VERIFY_AGREES = {
    "math_verify": 261,
    "olympiadbench_scoring": 30,
    "hendrycks_is_equiv": 13,
    "tinker_grade_answer": 10,
}
"""Of math-verify 0.9.0 with default settings, as the files' own description has it."""

_MATHS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^\n]+?)(?<!\\)\$|\\\(([^\n]+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOX = re.compile(r"\\boxed\{((?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.|\{(?:[^{}\\]|\\.)*\})*\})*\})*)\}")
_NUMBER = re.compile(r"(?<![A-Za-z0-9])-?(?:[0-9][0-9,]*)?[.,]?[0-9]+(?:/[0-9]+)? ?%?")
_CONCLUSION = re.compile(r"(?:Final Answer:|Therefore,) ([^\n]*?)(?:\.? I hope[^\n]*|\.? ?<\|[^\n]*|\.?)$")
_NUMBER_AT_END = re.compile(r" is \$?(-?[0-9][0-9.,]*)\$?$")
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,} (?:: |[^$]* [a-z]{2,}(?![A-Za-z}]))")
_NEIGHBOUR_CHARS = 40


class Agreement(NamedTuple):
    """How many pairs there are, and the lines of the file (from 1) where our verdict is another one."""

    rows: int
    differ: frozenset[int]


def box(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def boxed(prediction: str) -> str:
    r"""As in training: a prediction without a box gets one around its last formula, or around the whole."""
    if "\\boxed" in prediction:
        return prediction
    formulas = _MATHS.findall(prediction)
    return box("".join(formulas[-1]) if formulas else prediction)


def handed_over(prediction: str) -> str:
    r"""The final answer of a prediction in one box: its last neighbouring boxes, else its last number or formula in prose."""
    text = prediction.replace("\\\\", "\\") if "\\\\boxed" in prediction else prediction
    if conclusion := _concluded(text):
        return box(conclusion)
    boxes = list(_BOX.finditer(text))
    if boxes:
        return box(", ".join(one[1] for one in _neighbours(text, boxes)))
    formulas, numbers = _MATHS.findall(text), _NUMBER.findall(text)
    if formulas:
        return box("".join(formulas[-1]))
    return box(numbers[-1] if numbers and _PROSE.search(text) else prediction)


def _concluded(text: str) -> str | None:
    """The number that the last sentence states without a formula."""
    sentence = _CONCLUSION.search(text)
    if sentence is None or "boxed" in sentence[1]:
        return None
    if number := _NUMBER_AT_END.search(sentence[1]):
        return number[1]
    numbers = [] if re.search(r"[$\\]", sentence[1]) else _NUMBER.findall(sentence[1])
    return numbers[-1] if numbers else None


def _neighbours(text: str, boxes: list[re.Match[str]]) -> list[re.Match[str]]:
    """The last box and those before it with little but `and` or a comma between; a box that is repeated counts once."""
    chosen = [boxes[-1]]
    for earlier in reversed(boxes[:-1]):
        if chosen[0].start() - earlier.end() > _NEIGHBOUR_CHARS:
            break
        if earlier[1] not in {one[1] for one in chosen}:
            chosen.insert(0, earlier)
    return chosen


def grading(file: str, row: dict[str, Any]) -> Grading:
    """As the grader of the file does it: lists in any order or in theirs, and the tolerance that a test asks for."""
    digits = row.get("context", {}).get("precision") if isinstance(row.get("context"), dict) else None
    if file == "olympiadbench_scoring":
        return Grading(several=True)
    if file == "hendrycks_is_equiv":
        return Grading(several=True, ordered=True)
    return Grading(tolerance=10.0**-digits) if digits else Grading()


def agreement(path: Path, *, strict: bool = False, workers: int = 2, timeout_s: float = 30.0) -> Agreement:
    """Judges every pair of one file; a prediction that is null is an empty completion."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    read = boxed if strict else handed_over
    items = [VerifyItem(row["gold"], read(row["pred"]) if row["pred"] else "", grading(path.stem, row)) for row in rows]
    verdicts = MathVerifier(timeout_s=timeout_s, workers=workers).verify(items, lambda _: None)
    judged = enumerate(zip(rows, verdicts, strict=True), 1)
    return Agreement(len(rows), frozenset(line for line, (row, v) in judged if v.score != float(row["expected"])))


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Agreement with the tests of public graders.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strict", action="store_true", help="judge as in training: the last box alone")
    args = parser.parse_args(None if argv is None else list(argv))
    print(f"{'file':<24} {'rows':>5} {'agree':>6} {'math-verify':>12}  lines judged otherwise")
    for name in FILES:
        rows, differ = agreement(args.folder / f"{name}.jsonl", strict=args.strict)
        print(f"{name:<24} {rows:>5} {rows - len(differ):>6} {MATH_VERIFY_AGREES[name]:>12}  {sorted(differ)}")


if __name__ == "__main__":
    main()
