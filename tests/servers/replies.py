"""What a model would say that goes by a rubric of papo; for `chat_process(reply="servers.replies:...")`."""

from __future__ import annotations

import json
import re
from typing import Any

from servers.chat import content_of

LEVELS = ("complete", "gaps", "failed")


def levels(body: dict[str, Any]) -> str:
    """A level of the rubric `levels` that the texts and the seed decide."""
    return _reply(LEVELS[int(content_of(body), 16) % len(LEVELS)])


def strict(body: dict[str, Any]) -> str:
    """A level that the response decides: complete if it says `good`, failed if it says `bad`."""
    response = _response(body)
    return _reply("complete" if "good" in response else "failed" if "bad" in response else "gaps")


def wrong_steps(body: dict[str, Any]) -> str:
    """The numbers of the steps that say `bad`."""
    steps = re.findall(r"(?m)^\[step (\d+)\] (.*)$", _response(body))
    return _reply([int(number) for number, text in steps if "bad" in text])


def _response(body: dict[str, Any]) -> str:
    user = str(body["messages"][1]["content"])
    # Without the line of its mark, sixteen random characters that may well say `bad`.
    return user[user.index("\n", user.index("[response ")) : user.index("[end of response ")]


def _reply(verdict: Any) -> str:
    return json.dumps({"reason": "because", "verdict": verdict})
