"""How Sphinx makes the site: ``scripts/docs.sh``.

Pages are the repository's own Markdown files, where they are, so that a link works on the site and in a checkout. The
front page is ``README.md``. Pages are in the navigation because ``docs/index.md`` lists them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx

project = "vllm-nld"
copyright = "The vllm-nld developers, Apache-2.0"
html_title = "vllm-nld"

extensions = ["myst_parser"]
myst_heading_anchors = 4
smartquotes = False  # would make a dash of an option's --
root_doc = "README"
include_patterns = [
    "*.md",
    *(f"{folder}/**.md" for folder in ("docs", "benchmarks", "csrc", "docker", "examples", "vllm_nld")),
]

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def navigation(index: str) -> str:
    """Return tables of contents, for the README: of ``docs/index.md``, and of what each of its sections lists."""
    _, *parts = re.split(r"^## (.+)\n", index, flags=re.MULTILINE)
    tables = ["```{toctree}\n:hidden:\n\nAll pages </docs/index>\n```"]
    for caption, section in zip(parts[::2], parts[1::2], strict=True):
        entries = [
            f"{title} <{_docname(target)}>" for title, target in re.findall(r"^- \[(.+?)\]\((.+?)\.md\)", section, re.M)
        ]
        tables.append("\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"]))
    return "\n\n".join(tables)


def _docname(target: str) -> str:
    """Return the page that a link in ``docs/index.md`` leads to, from the repository's root: ``/docs/user/modes``."""
    parts: list[str] = []
    for part in PurePosixPath("docs", target).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/" + "/".join(parts)


def _add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        source[0] += "\n\n" + navigation((Path(app.srcdir) / "docs/index.md").read_text())


def _add_front_page(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _add_front_page)
