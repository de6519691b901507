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
IGNORED = ("vllm_nld/_ops.so", "vllm_nld/__pycache__/plugin.pyc", ".venv/bin/python", "build/lib.py", "dist/old.whl")


def build(what: str, source: Path, folder: Path) -> Path:
    """Build without the compiled operators, whose build is tested by their own tests."""
    subprocess.run([sys.executable, "-c", BUILD.format(what), str(folder)], cwd=source, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def checkout(folder: Path) -> set[str]:
    """Copy what git lists to ``folder``, and return its names.

    A look at each file of this checkout's ``.venv`` would take most of the time, so what git ignores is represented by
    one file of each kind; so would compressing the weights, which are cut short.
    """
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    names = {name for name in listed if name and (ROOT / name).is_file()}
    for name in [*names, *IGNORED]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = b"ignored" if name in IGNORED else (ROOT / name).read_bytes()
        (folder / name).write_bytes(content[:1000] if name.endswith(".safetensors") else content)
    return names


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A pure Python wheel that the sdist has built, and the names of the files that git lists."""
    folder = tmp_path_factory.mktemp("packages")
    for name in ("checkout", "sdist", "source", "wheel"):
        (folder / name).mkdir()
    names = checkout(folder / "checkout")
    with tarfile.open(build("build_sdist", folder / "checkout", folder / "sdist")) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return build("build_wheel", source, folder / "wheel"), names


def test_the_wheel_has_the_files_of_the_package_and_no_others(packages: tuple[Path, set[str]]) -> None:
    """Checkpoints and web pages are in it; tests, build folders and compiled files of a checkout are not."""
    wheel, listed = packages
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {name for name in listed if name.startswith("vllm_nld/")}
    assert "vllm_nld/checkpoints/tiny/model.safetensors" in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_name_and_version_say_what_is_in_it(packages: tuple[Path, set[str]]) -> None:
    """The version is written in one place, and vLLM finds the plug-in by its entry point."""
    wheel, _ = packages
    assert wheel.name == f"vllm_nld-{vllm_nld.__version__}-py3-none-any.whl"
    files = {name.partition("/")[2]: name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name}
    entries = zipfile.ZipFile(wheel).read(files["entry_points.txt"]).decode()
    assert "vllm_nld = vllm_nld.plugin:register" in entries.replace("=", " = ").replace("  ", " ")
    assert f"## {vllm_nld.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
