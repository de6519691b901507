"""The page of options is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import vllm_nld
from docs.options_page import PAGE, page
from vllm_nld.names import ENVIRONMENT


def test_page_is_fresh() -> None:
    assert PAGE.read_text() == page(), "run python docs/options_page.py"


def test_environment_variables_are_listed() -> None:
    """A variable that the code reads is named there by its value, so a search for such names finds it."""
    sources = [path.read_text() for path in Path(vllm_nld.__file__).parent.rglob("*.py")]
    names = {name for text in sources for name in re.findall(r'"(VLLM_NLD_[A-Z_]+)"', text)}
    assert names == set(ENVIRONMENT)
