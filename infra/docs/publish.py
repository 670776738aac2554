"""Puts the results of ablations among the docs: docs/results/<plan>.md, .json and plots, and the claims in docs/results.md and README.md.

python infra/docs/publish.py runs/ablations/claims/report runs/ablations/judge-noise/report
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papo.ablations.markdown import as_markdown, table_of_claims

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- claims: infra/docs/publish.py -->", "<!-- end of claims -->"


def publish(report: Path, root: Path = ROOT) -> None:
    """Copies the plots and figures of a report, and writes its page from the figures."""
    content = json.loads((report / "results.json").read_text(encoding="utf-8"))
    pages, name = root / "docs/results", content["plan"]
    shutil.rmtree(pages / name, ignore_errors=True)
    (pages / name).mkdir(parents=True)
    for plot in content["plots"]:
        shutil.copy(report / "plots" / f"{plot['name']}.svg", pages / name)
    shutil.copy(report / "results.json", pages / f"{name}.json")
    (pages / f"{name}.md").write_text(as_markdown(content, name), encoding="utf-8")


def published(root: Path = ROOT) -> list[dict[str, Any]]:
    """The figures of what was published, that of the plan `claims` first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (root / "docs/results").glob("*.json")]
    return sorted(found, key=lambda content: (content["plan"] != "claims", content["plan"]))


def with_claims(text: str, contents: Sequence[Mapping[str, Any]], folder: str) -> str:
    """A page with the table of claims of now between its two marks, the paper's claims in their order and first.

    Args:
        folder: of the pages of plans, as seen from the page.
    """
    claims = [(claim, content["plan"]) for content in contents for claim in content["claims"]]
    claims.sort(key=lambda one: int(one[0]["name"]) if one[0]["name"].isdigit() else sys.maxsize)
    table = table_of_claims([(claim, f"[{plan}]({folder}/{plan}.md)") for claim, plan in claims])
    return re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text, flags=re.DOTALL
    )


def main(reports: Sequence[str], root: Path = ROOT) -> None:
    """Publishes the reports, and brings the pages that cite them up to date."""
    for report in reports:
        publish(Path(report), root)
    for page, folder in ((root / "docs/results.md", "results"), (root / "README.md", "docs/results")):
        page.write_text(with_claims(page.read_text(encoding="utf-8"), published(root), folder), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
