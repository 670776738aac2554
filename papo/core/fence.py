"""Texts of others inside a prompt: fenced by a mark that they cannot know, and without what a model could take for something else.

    [response 3f9c0a1b2d4e5f60]
    ...
    [end of response 3f9c0a1b2d4e5f60]

`harmless` changes what only looks like text, and leaves the rest to be read as it was written:

    what cannot be seen                     its code point: <U+200B>, or <U+200B and 11 more> for a run
    what a chat template sets apart         a space within: < |im_end| >, < /s>, [ INST]
    a line of ours, such as [step 3]        round brackets: (step 3)
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Sequence
from itertools import groupby

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of Unicode: control, format (zero width, direction, tags), surrogate, private, unassigned, line and paragraph separator."""
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters of other categories that show nothing: fillers, variation selectors, the empty pattern of Braille."""
_UNUSUAL = re.compile(r"[^ -~\n\t]+")

# Every repeat is bounded, so that a text made to be slow takes linear time.
_TOKEN = re.compile(
    r"""
    [<\uff1c] (?= /? [|\uff5c] | /? \w [\w:.\-]{0,48} /? [>\uff1e] )  # <|im_end|> <s> </think> <start_of_turn>
    | [|\uff5c] (?= [>\uff1e] )                                       # <turn|>
    | \[ (?= [|\uff5c] | e~\[ | /? (?: [A-Z]{2,20} _ [A-Z_]{1,20}     # [|user|] [TOOL_CALLS]
        | (?i: inst | sys | think | args | cls | sep | mask | gmask | smask | unk | pad | bos | eos | stop | img | go ) ) \] )
    | \] (?= ~ )                                                      # ]~b]
    """,
    re.VERBOSE,
)
_MARKER = re.compile(
    r"[\[\uff3b\u3010]([^\S\n]{0,9}(?:end[\W_]{1,9}of|problem|reference|response|given|solution|answer|step)"
    r"[^\[\]\uff3b\uff3d\u3010\u3011\n]{0,99})([\]\uff3d\u3011]?)",
    re.IGNORECASE,
)


def draw_mark(*texts: str) -> str:
    """Sixteen random characters of 0-9a-f that none of the texts holds."""
    mark = secrets.token_hex(8)
    while any(mark in text for text in texts):
        mark = secrets.token_hex(8)
    return mark


def fence(name: str, text: str, mark: str) -> str:
    """The text, harmless, between two lines that bear its name and the mark.

    Raises:
        ValueError: the text holds the mark, which `draw_mark` was not told of.
    """
    return _between(name, harmless(text), mark)


def fence_steps(name: str, steps: Sequence[str], mark: str) -> str:
    """As `fence`, each step after its number from 1, `[step 1] `, and without the white space around it.

    Raises:
        ValueError: as `fence`.
    """
    numbered = (f"[step {number}] {harmless(step).strip()}".rstrip() for number, step in enumerate(steps, 1))
    return _between(name, "\n".join(numbered), mark)


def harmless(text: str) -> str:
    """The text as this module's table has it; it can be encoded, and a second time changes nothing."""
    spaced = _TOKEN.sub(r"\g<0> ", visible(text))
    return _MARKER.sub(lambda found: f"({found[1]}{')' if found[2] else ''}", spaced)


def visible(text: str) -> str:
    r"""The text with code points for what cannot be seen; \n and \t stay, \r\n is \n."""
    return _UNUSUAL.sub(_shown, text.replace("\r\n", "\n"))


def _between(name: str, body: str, mark: str) -> str:
    if mark in body:
        raise ValueError(f"the {name} holds the mark of its fence")
    return f"[{name} {mark}]\n{body}\n[end of {name} {mark}]"


def _shown(found: re.Match[str]) -> str:
    if found[0].isprintable() and not _BLANK.search(found[0]):
        return found[0]
    return "".join(
        _code_point(run) if unseen else "".join(run)
        for unseen, run in ((unseen, list(run)) for unseen, run in groupby(found[0], _unseen))
    )


def _unseen(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN or _BLANK.match(character) is not None


def _code_point(run: list[str]) -> str:
    """A run is counted and not spelled out, so that no text grows much: its first character and how many follow."""
    more = f" and {len(run) - 1} more" if len(run) > 1 else ""
    return f"<U+{ord(run[0]):04X}{more}>"
