"""Looks for texts everywhere under a folder: in files of any kind, in what is compressed or encoded in them, in columns, rows and names."""

from __future__ import annotations

import base64
import gzip
import io
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq


def forms(text: str) -> set[bytes]:
    """The text as it is, in UTF-16, quoted for a URL, and in base64 wherever it begins in a longer text."""
    found = {text.encode(), quote(text, safe="").encode(), text.encode("utf-16-le")}
    for shift in range(3):
        coded = base64.b64encode(b"x" * shift + text.encode())
        found.add(coded[4 if shift else 0 : -4])  # without the characters that depend on the neighbours
    return found


def contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes) of a file: as it lies there, and unpacked where it is packed."""
    raw = path.read_bytes()
    yield "file", raw
    yield from _unpacked(raw)
    if raw[:4] == b"PAR1":
        frame = pq.read_table(io.BytesIO(raw))
        yield "parquet", repr(frame.schema).encode()
        for column in frame.columns:
            yield "parquet", "\n".join(map(str, column.to_pylist())).encode()
    if raw[:15] == b"SQLite format 3":
        with closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(raw[:18] + b"\x01\x01" + raw[20:])  # a copy in memory has no write-ahead log
            for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                for row in database.execute(f'select * from "{table}"'):
                    yield (
                        "sqlite",
                        "\n".join(
                            value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in row
                        ).encode(),
                    )


def _unpacked(raw: bytes) -> Iterator[tuple[str, bytes]]:
    if raw[:2] == b"\x1f\x8b":
        yield "gzip", gzip.decompress(raw)
    elif raw[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            yield from (("zip", archive.read(name)) for name in archive.namelist())
    elif raw[:4] == b"\x28\xb5\x2f\xfd":
        yield "zstd", pa.CompressedInputStream(pa.BufferReader(raw), "zstd").read()
    elif raw[:1] == b"\x78":  # an object of git
        try:
            yield "zlib", zlib.decompress(raw)
        except zlib.error:
            return
    elif raw[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            for member in archive:
                if (stream := archive.extractfile(member)) is not None:
                    yield "tar", stream.read()


def leaks(root: Path, texts: Sequence[str]) -> list[tuple[str, str, str]]:
    """(path, kind, text) of every place under `root` where one of the texts is."""
    wanted = {text: forms(text) for text in texts}
    found = []
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        parts = [("name", name.encode())]
        if path.is_file() and not path.is_symlink():
            parts += contents(path)
        elif path.is_symlink():
            parts.append(("link", str(path.readlink()).encode()))
        found += [
            (name, kind, text)
            for text, ways in wanted.items()
            for kind in dict.fromkeys(kind for kind, content in parts if any(way in content for way in ways))
        ]
    return found
