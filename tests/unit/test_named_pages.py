"""Pages that code, scripts and tests name are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("vllm_nld", "csrc", "benchmarks", "docker", "docs", "examples", "scripts", "tests", ".ci")
SUFFIXES = {".py", ".sh", ".yaml", ".yml", ".json", ".toml", ".md", ".h", ".cpp", ".cu", ".cuh", ""}
NAMED = re.compile(r"(?<![\w./-])docs/[\w/.-]+\.(?:md|png|svg|json|py)\b")
ELSEWHERE = {"tests/integration/test_docs_site.py"}  # names pages of a small site of its own


def test_named_pages_exist() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    files += ROOT.glob("*.md")
    named = {
        (page, str(file.relative_to(ROOT)))
        for file in files
        if file.is_file() and str(file.relative_to(ROOT)) not in ELSEWHERE
        for page in NAMED.findall(file.read_text(errors="ignore"))
    }
    assert len(named) > 20, "the search finds what is there"
    assert not [(page, file) for page, file in named if not (ROOT / page).exists()]
