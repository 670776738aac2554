r"""The schema of verl: `prompt` [{role, content}], `reward_model` {ground_truth}, `data_source`, `extra_info`.

Gold answers in which the backslashes were escaped once too often (`\\frac{1}{2}`) are put right: as they stand, they would be line
breaks before words. Only where no environment, whose rows `\\` separates, is in it.
"""

from __future__ import annotations

import re

from papo.engines.protocols import Drop, Problem
from papo.engines.sources.rows import Row

COLUMNS = {"prompt", "reward_model"}
ID = ""

_ESCAPED = re.compile(r"\\\\(?=[A-Za-z{}])")


def problem(row: Row, seed: int) -> Problem | Drop:
    """The messages, one after the other, as the prompt."""
    messages = row.get("prompt")
    names = [f"prompt.{n}.content" for n in range(len(messages))] if isinstance(messages, list) else ["prompt"]
    prompt = "\n\n".join(str(text) for name in names if (text := row.get(name)))
    return row.problem(prompt, _unescaped(row.text("reward_model.ground_truth")), source=row.maybe("data_source"))


def _unescaped(answer: str) -> str:
    return answer if r"\begin" in answer else _ESCAPED.sub(r"\\", answer)
