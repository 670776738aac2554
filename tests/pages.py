"""The pages that people read, taken apart as GitHub reads them: anchors, links, code in the text, blocks, and the commands in blocks."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
GITHUB = MarkdownIt("commonmark").enable("table")

# What a line of a block begins with if the block is commands.
PROGRAMS = frozenset(
    [
        "apt",
        "apt-get",
        "bash",
        "cd",
        "conda",
        "curl",
        "docker",
        "dvc",
        "eval",
        "exec",
        "export",
        "for",
        "git",
        "helm",
        "hf",
        "initdb",
        "kubectl",
        "make",
        "mkdir",
        "mkdocs",
        "mlflow",
        "npm",
        "papo",
        "pg_dump",
        "pg_restore",
        "pip",
        "podman",
        "prefect",
        "psql",
        "pytest",
        "python",
        "python3",
        "ray",
        "rm",
        "rsync",
        "sh",
        "source",
        "sudo",
        "systemctl",
        "systemd-run",
        "uv",
        "vllm",
    ]
)
SHELL = ("", "bash", "console", "sh", "shell")


@dataclass(frozen=True)
class Block:
    """A block of code."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block, without what the shell takes of it: variables before it, redirections, comments."""

    page: str
    line: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.text[:60]}"


def pages(*, commands: bool = False) -> list[str]:
    """Paths of all pages from the root, or of those whose commands are for now: a changelog tells of what once was."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("infra/**/*.md")]
    return sorted(
        str(path.relative_to(ROOT)) for path in found if not commands or path.name != "CHANGELOG.md"
    )  # fmt: skip


@cache
def tokens(page: str) -> tuple[Token, ...]:
    return tuple(GITHUB.parse((ROOT / page).read_text()))


def inline(page: str) -> Iterator[tuple[int, Token]]:
    """What stands in the lines of a page: (line, token)."""
    for token in tokens(page):
        for child in token.children or ():
            yield (token.map or [0])[0] + 1, child


@cache
def anchors(page: str) -> frozenset[str]:
    """Those that GitHub gives headings, and those of the page's own HTML."""
    seen: Counter[str] = Counter()
    found = set()
    for opening, content in itertools.pairwise(tokens(page)):
        if opening.type == "heading_open":
            text = "".join(child.content for child in content.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return frozenset(found | set(re.findall(r'\b(?:id|name)="([^"]+)"', (ROOT / page).read_text())))


def links(page: str) -> Iterator[tuple[int, str]]:
    """Where links and pictures lead, also those in HTML: (line, address)."""
    html = [((token.map or [0])[0] + 1, token) for token in tokens(page) if token.type == "html_block"]
    for line, token in [*inline(page), *html]:
        for name in ("href", "src"):
            if address := token.attrGet(name):
                yield line, str(address)
        if token.type.startswith("html"):
            for address in re.findall(r'\b(?:href|src|srcset)="([^"\s]+)', token.content):
                yield line, address


def blocks(page: str) -> list[Block]:
    """Those between fences; of those that are indented, which blank lines do not end, commands apart from what else there is."""
    found: list[Block] = []
    for token in tokens(page):
        line = (token.map or [0])[0] + 1
        if token.type == "fence":
            found.append(Block(page, line + 1, token.info.strip().lower(), token.content))
        elif token.type == "code_block":
            first = len(found)
            for part in re.finditer(r"(?:.+\n?)+", token.content):
                block = Block(page, line + token.content.count("\n", 0, part.start()), "", part[0])
                if len(found) > first and not is_commands(block) and not is_commands(found[-1]):
                    last = found.pop()
                    gap = "\n" * (block.line - last.line - last.text.count("\n"))
                    block = Block(page, last.line, "", last.text + gap + block.text)
                found.append(block)
    return found


# ---- commands ----


def is_commands(block: Block) -> bool:
    """Whether a line begins with the name of a program, or with a script of this repository."""
    if block.language not in SHELL:
        return False
    first = [_first_word(line) for line in block.text.splitlines() if not line.startswith((" ", "\t"))]
    return block.language != "" or any(word in PROGRAMS or _is_script(word) for word in first)


def _is_script(word: str) -> bool:
    return "/" in word and not word.startswith("/") and (ROOT / word).is_file()


def _first_word(line: str) -> str:
    found = re.match(r"(?:\$ )?(?:[A-Za-z_]\w*=\S* +)*(\S*)", line)
    return found[1] if found else ""


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block; of a transcript, those behind a `$`."""
    if not is_commands(block):
        return
    typed = re.search(r"^\$ ", block.text, re.MULTILINE) is not None
    line, number = "", 0
    for offset, part in enumerate(block.text.splitlines()):
        if not line:
            if typed and not part.startswith("$ "):
                continue
            number = block.line + offset
        line += part.removeprefix("$ ") if not line else f"\n{part}"
        if line.endswith("\\"):
            line = line[:-1]
            continue
        try:
            split = _split(line)
        except ValueError:  # a quotation that goes on in the next line
            continue
        for words in split:
            yield from _of(block.page, number, words)
        line = ""
    if line:
        raise ValueError(f"{block.page}:{number}: no end of a quotation: {line[:100]}")


def _split(line: str) -> list[list[str]]:
    """The words of each command of a line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    into = False
    for word in lexer:
        if into:
            into = False
        elif word and set(word) <= set("<>&") and set(word) & set("<>"):
            into = True
            if found[-1] and found[-1][-1].isdigit():
                found[-1].pop()
        elif word and set(word) <= set(";&|()"):
            found.append([])
        else:
            found[-1].append(word)
    return found


def _of(page: str, number: int, words: list[str]) -> Iterator[Command]:
    """A command, and those that it has others run."""
    while words and (words[0] in ("do", "then") or re.match(r"[A-Za-z_]\w*=", words[0])):
        words = words[1:]
    words = [word for word in words if word != "..."]
    if not words or words[0] in ("for", "done", "fi"):
        return
    yield Command(page, number, tuple(words))
    texts = re.findall(r"\$\(([^()]+)\)", " ".join(words))
    if words[0] in ("exec", "systemd-run", "sudo"):
        inner = next((words[at:] for at in range(1, len(words)) if words[at] in PROGRAMS), [])
    elif words[0] == "kubectl" and "--" in words:
        inner = words[words.index("--") + 1 :]
    elif words[0] == "docker" and (at := next((at for at, word in enumerate(words) if word in ("run", "exec")), 0)):
        inner = [word for word in words[at + 1 :] if not word.startswith("--")][1:]
    else:
        inner = []
        if words[0] in ("bash", "sh") and "-c" in words:
            texts.append(words[words.index("-c") + 1])
    yield from _of(page, number, inner)
    for text in texts:
        for part in _split(text):
            yield from _of(page, number, part)
