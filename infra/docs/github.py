"""MkDocs' hook for pages that are read on GitHub, too: they look as they do there, and links that leave docs/ name the file."""

from __future__ import annotations

import posixpath
import re
from typing import Any
from xml.etree.ElementTree import Element, SubElement

from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from markdown.util import AtomicString
from mkdocs.config.defaults import MkDocsConfig


def slug(heading: str, separator: str = "-") -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


class GitHub(Extension):
    """What Python-Markdown does otherwise."""

    page = ""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # Markdown calls it so
        # The last but the paragraph (10); and when links are parsed (20), before MkDocs looks where they lead (0).
        md.parser.blockprocessors.register(_Begins(md.parser), "begins", 12)
        md.treeprocessors.register(_Links(self), "out_of_docs", 10)


class _Begins(BlockProcessor):
    """A list or a table ends the paragraph above it, without a blank line between."""

    STARTS = re.compile(r"\n(?= {0,3}(?:[*+-]|1[.)]) +\S| {0,3}\|.*\n {0,3}\|[ :|-]+$)", re.MULTILINE)

    def test(self, parent: Element, block: str) -> bool:
        return self.STARTS.search(block) is not None

    def run(self, parent: Element, blocks: list[str]) -> None:
        blocks[:1] = self.STARTS.split(blocks[0], maxsplit=1)


class _Links(Treeprocessor):
    """A link to a file of the repository that is no page becomes that file's path: the site has no such place."""

    def __init__(self, extension: GitHub) -> None:
        super().__init__()
        self._extension = extension

    def run(self, root: Element) -> None:
        for link in root.iter("a"):
            target, _, _ = link.get("href", "").partition("#")
            path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(self._extension.page), target))
            if ":" in target or target.startswith("/") or path == "docs" or path.startswith("docs/"):
                continue
            said = "".join(link.itertext())
            link.tag, link.attrib = "span", {}
            if named := said in (path, posixpath.basename(path)):
                link.text, link[:] = None, []
            shown = SubElement(link, "span")
            code = SubElement(shown, "code")
            shown.text, code.tail = ("", "") if named else (" (", ")")
            code.text = AtomicString(path)


_GITHUB = GitHub()


def on_config(config: MkDocsConfig) -> None:
    """Before the pages are read."""
    config.markdown_extensions.append(_GITHUB)  # type: ignore[arg-type]  # it takes an extension, too, and is declared to take names
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> None:
    """Before a page is rendered."""
    _GITHUB.page = page.file.src_uri


def on_page_content(html: str, **_: Any) -> str:
    """After a page is rendered: what scrolls by itself can be reached with the keyboard."""
    return re.sub(r"<(pre|table)>", r'<\1 tabindex="0">', html)
