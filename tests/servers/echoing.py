"""A chat endpoint that repeats the headers it was sent: in the text of an error first, then in its verdict and around it.

python tests/servers/echoing.py '{}'    # as chat.py
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers.chat import Connection, Plan, arguments, content_of, serve


class Echoing(Connection):
    def chat(self, body: dict[str, Any], path: str, headers: dict[str, str]) -> None:
        self.headers = headers
        super().chat(body, path, headers)

    def answer(self, body: dict[str, Any], fault: str) -> None:
        said = "you sent " + ", ".join(f"{name} {value}" for name, value in self.headers.items())  # as no JSON in JSON
        self.state.now -= self.held
        self.held = 0
        if self.state.seen.requests[content_of(body)] == 1:
            self.send(500, json.dumps({"error": {"message": said, "type": said, "code": said}}).encode())
            return
        content = json.dumps({"reason": f"canary-of-the-judge {said}", "verdict": "gaps"})
        message = {"role": "assistant", "content": content, "reasoning_content": said}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "note": said}
        usage = {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
        whole = {
            "id": said,
            "object": "chat.completion",
            "created": 0,
            "model": said,
            "choices": [choice],
            "usage": usage,
        }
        self.send(200, json.dumps(whole).encode(), {"x-echo": said})


if __name__ == "__main__":
    plan, at = arguments()
    asyncio.run(serve(Plan(**plan), Echoing, port=at))
