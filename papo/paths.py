"""Where the files that params name may lie: in the project's folder or the workspace, unless a person says otherwise.

What a person gives to one run (`--set prepare.source=/data/x.jsonl`, the overrides of a flow) is allowed as it stands: they have named it.
What a params file or a preset says is not; it takes PAPO_ALLOW_PATHS, folders with colons between, which is no param, so that it changes
neither a result nor what a run is called.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from papo.errors import ParamsError
from papo.params import Params, PathMark

ALLOWED = "PAPO_ALLOW_PATHS"


def check_paths(params: Params, workspace: Path, *, overrides: Collection[str] = ()) -> None:
    """Refuses files outside of the current folder, the workspace and the folders of PAPO_ALLOW_PATHS; symbolic links are followed.

    Args:
        overrides: `key=value`, as given to this run; the files that they name may lie anywhere.

    Raises:
        ParamsError: naming each.
    """
    named = [override.partition("=")[0].strip() for override in overrides]
    further = [Path(folder).expanduser() for folder in os.environ.get(ALLOWED, "").split(":") if folder]
    roots = [folder.resolve() for folder in (Path.cwd(), workspace, *further)]
    outside = [
        f"{key}: {file}"
        for key, text in paths_of(params)
        if not any(key == name or key.startswith(f"{name}.") for name in named)
        and (file := file_of(text)) is not None
        and not any(file.is_relative_to(root) for root in roots)
    ]
    if outside:
        raise ParamsError(
            "params name files outside of the project:\n" + "\n".join(f"  - {line}" for line in outside),
            where="the params file or preset",
            fix=f"copy or link them into the project (a link has to be allowed, too), name them by --set on the command line, or export "
            f"{ALLOWED}=FOLDER[:FOLDER]",
        )


def file_of(text: str) -> Path | None:
    """The file that a param names, without links and `..`; a name that is no file gives one under the current folder. None: a server."""
    scheme, separator, path = text.partition("://")
    if not separator:
        path = text
    elif scheme.split("+")[0] == "sqlite":
        path = path.partition("?")[0].removeprefix(
            "/"
        )  # three slashes and a relative path, or four for an absolute one
    elif scheme == "file":
        path = path.partition("?")[0].removeprefix("localhost")
    else:
        return None
    # Who reads the file does not expand ~; whoever wrote it means a home.
    home = os.path.expanduser(path)  # noqa: PTH111  Path.expanduser raises where there is no such user
    return Path(home).resolve() if path else None


def paths_of(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of every param that is marked as a path, wherever it is nested."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        marked = any(isinstance(mark, PathMark) for mark in (*field.metadata, *_marks(field.annotation)))
        yield from _found(value, f"{prefix}{name}", marked=marked)


def _found(value: Any, key: str, *, marked: bool) -> Iterator[tuple[str, str]]:
    if isinstance(value, BaseModel):
        yield from paths_of(value, f"{key}.")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _found(item, f"{key}.{name}", marked=marked)
    elif isinstance(value, str) and marked:
        yield key, value


def _marks(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _marks(argument)
