"""What the site takes from outside docs/: README.md as its first page, the model cards, the other guides, and pictures.

In the repository a page links to `../model_cards/local.md`; in the site that file stands beside the pages, so the leading
`../` goes. Links to source files and folders, which are no pages, become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"}
TAKEN = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff",
         "recipes/README.md", "conversion_scripts/README.md", "model_cards/*.md", "model_cards/results/*.png",
         "model_cards/results/*.json")  # fmt: skip
LINK = re.compile(r"(?<!\!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#]+)(#[^)]*)?\)|(!\[[^\]]*\])\(([^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what stands outside docs/, under the path that it has in the repository."""
    for pattern in TAKEN:
        for path in sorted(ROOT.glob(pattern)):
            name = str(path.relative_to(ROOT))
            if name != "model_cards/TEMPLATE.md":
                files.append(File.generated(config, PAGES.get(name, name), abs_src_path=str(path)))
    return files


def on_config(config: Any) -> Any:
    """One entry of the navigation for every card."""
    cards = sorted(path.name for path in (ROOT / "model_cards").glob("*.md") if path.name != "TEMPLATE.md")
    for entry in config.nav:
        if "Mechanisms" in entry:
            entry["Mechanisms"] = ["choosing.md", *(f"model_cards/{name}" for name in cards)]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are in the repository, turned into links between pages of the site."""
    name = next((theirs for theirs, ours in PAGES.items() if ours == page.file.src_uri), page.file.src_uri)
    outside = (ROOT / name).exists()
    folder = (ROOT / name).parent if outside else ROOT / "docs"

    def turned(match: re.Match[str]) -> str:
        text, target, anchor, picture, source = match.groups()
        path = (folder / (target or source)).resolve().relative_to(ROOT)
        uri = str(path.relative_to("docs")) if path.parts[0] == "docs" else str(path)
        uri = PAGES.get(uri, uri)
        if files.get_file_from_path(uri) is None:
            return text or ""
        up = "../" * page.file.src_uri.count("/")
        return f"{picture}({up}{uri})" if picture else f"[{text}]({up}{uri}{anchor or ''})"

    return LINK.sub(turned, markdown)
