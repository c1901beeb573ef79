"""What the documentation site adds to the pages of `docs/`: `mkdocs build` calls these functions (see `mkdocs.yml`).

Pages that a reader of the repository looks for at its root are pages of the site too, each written once. Links are
those of the repository; on the site they lead to the page made of a file, and a file that is no page is named without.
"""

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FROM_THE_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",  # beside docs/security.md, from which some file systems can't tell it
    "benchmarks/RESULTS.md": "results.md",
}
"""Files outside `docs/`, and the page of the site that is made of each."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[\w-]+)?\)")


def page_of(file: str) -> str | None:
    """The site's page or picture of a file of the repository; none for source code and folders."""
    return FROM_THE_ROOT.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)


def turned(markdown: str, file: str, titles: Mapping[str, str]) -> str:
    """A page's text with its links as they are on the site.

    Args:
        markdown: text, with links relative to its place in the repository.
        file: that place.
        titles: the site's pages with their titles, which stand where a link's text is a file name.
    """
    folder = posixpath.dirname(page_of(file) or "")

    def link(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups(default="")
        page = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(file), target)))
        if page is None:
            return text
        shown = titles.get(page, text) if text.endswith(".md") else text
        return f"{mark}[{shown}]({posixpath.relpath(page, folder or '.')}{anchor})"

    return LINK.sub(link, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie outside `docs/`."""
    from mkdocs.structure.files import File

    for file, page in FROM_THE_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns the links of one page."""
    file = {page: file for file, page in FROM_THE_ROOT.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    titles = {other.src_uri: other.page.title for other in files.documentation_pages() if other.page is not None}
    return turned(markdown, file, titles)
