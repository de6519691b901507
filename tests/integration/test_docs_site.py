"""The site is built strictly: a small one with each kind of fault, by the settings of the real one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("myst_parser", reason="the extra docs is not installed")

CONF = Path(__file__).parents[2] / "docs"
PAGES = {
    "README.md": "# Front\n\nSee [the pages](docs/index.md), [a part](docs/user/page.md#a-part).\n",
    "docs/index.md": "# Pages\n\n## Use it\n\n- [Page](user/page.md): one\n\n## More\n\n- [Changes](../CHANGES.md)\n",
    "docs/user/page.md": "# Page\n\n## A part\n\nIts code: [file](../../code.py). [Front](../../README.md#front)\n",
    "CHANGES.md": "# Changes\n",
    "code.py": "",
}
FAULTS = {
    "'gone.md'": "[a page that is gone](gone.md)",
    "'../../gone.py'": "[a file that is gone](../../gone.py)",
    "'another-part'": "[a part that is gone](#another-part)",
    "'yet-another-part'": "[a part of another page that is gone](../../CHANGES.md#yet-another-part)",
    "image file not readable": "![a picture that is gone](gone.png)",
}


def _build(pages: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-c", str(CONF)]
    return subprocess.run([*command, str(folder), str(folder / "site")], capture_output=True, text=True, check=False)


def test_site_without_faults_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = _build(PAGES, tmp_path)
    assert built.returncode == 0, built.stderr
    front = (tmp_path / "site/index.html").read_text()
    assert re.search(r'caption-text">Use it<.*href="docs/user/page.html">Page<', front, re.S), "the navigation"
    elsewhere = re.compile(r"""<(?:script|link|img)[^>]*(?:src|href)=["'](?:https?:)?//""")
    for page in (tmp_path / "site").rglob("*.html"):
        assert not elsewhere.search(page.read_text()), page.name


def test_each_fault_is_an_error(tmp_path: Path) -> None:
    faulty = {**PAGES, "docs/user/page.md": PAGES["docs/user/page.md"] + "\n\n".join(FAULTS.values()) + "\n"}
    built = _build({**faulty, "docs/user/unlisted.md": "# A page that the index does not list\n"}, tmp_path)
    assert built.returncode == 1
    assert not [message for message in FAULTS if message not in built.stderr], built.stderr
    assert re.search(r"unlisted\.md: WARNING: document isn't included in any toctree", built.stderr)
