"""What a release uploads: the wheel has the package's files and nothing else, and the sdist builds the same wheel."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import vllm_nld

ROOT = Path(__file__).parents[2]
BUILD = "from scikit_build_core.build import {0}; import sys; {0}(sys.argv[1], {{'wheel.cmake': 'false'}})"


def build(what: str, source: Path, folder: Path) -> Path:
    """Build without the compiled operators, whose build is tested by their own tests."""
    subprocess.run([sys.executable, "-c", BUILD.format(what), str(folder)], cwd=source, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure Python wheel that the sdist has built."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("sdist", "source", "wheel"):
        (folder / name).mkdir()
    with tarfile.open(build("build_sdist", ROOT, folder / "sdist")) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return build("build_wheel", source, folder / "wheel")


def test_the_wheel_has_the_files_of_the_package_and_no_others(wheel: Path) -> None:
    """Checkpoints and web pages are in it; tests, build folders and compiled files of this checkout are not."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "vllm_nld"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    expected = {name for name in listed if name and (ROOT / name).is_file()}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "vllm_nld/checkpoints/tiny/model.safetensors" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_name_and_version_say_what_is_in_it(wheel: Path) -> None:
    """The version is written in one place, and vLLM finds the plug-in by its entry point."""
    assert wheel.name == f"vllm_nld-{vllm_nld.__version__}-py3-none-any.whl"
    files = {name.partition("/")[2]: name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    entries = zipfile.ZipFile(wheel).read(files["entry_points.txt"]).decode()
    assert "vllm_nld = vllm_nld.plugin:register" in entries.replace("=", " = ").replace("  ", " ")
    assert f"## {vllm_nld.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
