"""What looks like a secret: no param may hold one, for params go into dvc.yaml, manifests, MLflow, Prefect and the report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# A digit keeps apart keys and words such as sk-learn-something.
_LOOKS = {
    "a key of OpenAI or alike": r"\bsk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{12,}",
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{16,}",
    "an access key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "a token of GitLab": r"\bglpat-[A-Za-z0-9_-]{16,}",
    "a token of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a key of Google": r"\bAIza[0-9A-Za-z_-]{30,}",
    "a key of Prefect": r"\bpn[ub]_[A-Za-z0-9]{16,}",
    "a signed token": r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in a URL": r"[A-Za-z][A-Za-z0-9+.-]*://[^/@\s:$]*:[^/@\s$][^/@\s]*@",
    "a token in a URL": r"[A-Za-z][A-Za-z0-9+.-]*://[^/@\s:$]{16,}@",
    "a key in the query of a URL": r"[?&;](?i:password|passwd|pwd|token|api[_-]?key|secret|signature|sig|x-amz-signature)=(?!\*{3})[^&\s$]",
    "a key on a command line": r"(?i:--(?:api-key|password|token|hf-token|secret))[= ]+['\"]?[^\s$'\"]",
    "a key in a header": r"(?i:\bauthorization\s*[:=]\s*(?:bearer|basic)?|\bbearer)\s+['\"]?(?=[^\s$'\"]*\d)[^\s$'\"]{8,}",
}
_PATTERNS = {what: re.compile(pattern) for what, pattern in _LOOKS.items()}
_NAMES = re.compile(
    r"(?i)(?:^|[-_])(?:password|passwd|secret|api[-_]?key|access[-_]?key|auth[-_]?token|hf[-_]?token|credentials?)$"
)


def secret_in(text: str) -> str | None:
    """What kind of secret a text seems to hold; None if none. `$NAME` stands for what the environment holds, and is none."""
    return next((what for what, pattern in _PATTERNS.items() if pattern.search(text)), None)


def secrets_of(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, kind) of everything in nested values that seems to be a secret; the value itself is in neither."""
    if isinstance(values, Mapping):
        for number, (name, value) in enumerate(values.items()):
            if found := secret_in(str(name)):
                yield f"{key}.<name {number + 1}>".lstrip("."), found
                continue
            here = f"{key}.{name}".lstrip(".")
            if isinstance(value, str) and value and not value.startswith("$") and _NAMES.search(str(name)):
                yield here, "a secret by its name"
            else:
                yield from secrets_of(value, here)
    elif isinstance(values, str):
        if found := secret_in(values):
            yield key, found
    elif isinstance(values, Sequence):
        for number, value in enumerate(values):
            yield from secrets_of(value, f"{key}[{number}]")


def without_secrets(text: str) -> str:
    """`text` with *** in place of what looks like a secret."""
    for pattern in _PATTERNS.values():
        text = re.sub(pattern.pattern + r"\S*", "***", text)
    return text
