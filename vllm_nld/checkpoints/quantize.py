"""A quantized copy of a checkpoint, by llm-compressor, which reads tensors without knowing the model.

llm-compressor shares neither compressed-tensors nor transformers with vLLM, so it runs in an environment of its own.
It would also quantize head and embedding, and fails over a folder with an adapter in it; so it sees only the top
level, with both named to leave out, and adapters and samplers are copied.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_nld.checkpoints.headers import check_tensors, expected_image_tensors, expected_tensors
from vllm_nld.config import NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig
from vllm_nld.errors import NLDError, shown

SCHEMES = {
    "W8A8": "int8 weights and activations",
    "W4A16": "int4 weights, groups of 128",
    "W4A16_ASYM": "the same with zero points",
    "W4A8": "int4 weights, int8 activations",
    "W8A16": "int8 weights",
    "FP8_DYNAMIC": "float8 weights and activations, a scale per channel and token",
    "FP8_BLOCK": "float8 weights and activations, a scale per 128 x 128 block",
    "NVFP4A16": "4-bit float weights, groups of 16",
    "MXFP4A16": "4-bit float weights, groups of 32",
    "MXFP8": "float8 weights and activations, groups of 32",
}
"""llm-compressor's schemes that need no calibration: name -> what they do."""

IGNORED = ["diffusion_head", "encoder.embed_tokens"]
"""Modules to leave as they are; of a model that reads images also every matrix of its image part, one by one: vLLM
translates names to its own, but no patterns."""
LARGEST_ERROR = 0.25
"""Of a weight matrix, relative to its size. Four bits make about 0.1; what is packed wrongly, about 1."""

_SCRIPT = """
import json, sys
from llmcompressor import model_free_ptq
model_free_ptq(**json.loads(sys.argv[1]))
"""
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"

Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Result:
    """What a quantization did.

    Attributes:
        scheme: of :data:`SCHEMES`.
        bytes_before: of all tensors of the model.
        bytes_after: the same, quantized.
        matrices: how many are quantized.
        error: root mean square of the largest change of a matrix, relative to that of the matrix.
        worst: the name of that matrix.
        carried: folders that were copied as they are.
    """

    scheme: str
    bytes_before: int
    bytes_after: int
    matrices: int
    error: float
    worst: str
    carried: list[str]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def quantize(source: Path, folder: Path, scheme: str, python: Path, device: str = "cpu", run: Run = _run) -> Result:
    """Write a quantized copy of a checkpoint, and check it against the source, matrix by matrix.

    Args:
        source: an NLD checkpoint that is not quantized.
        folder: to write; must not exist.
        scheme: one of :data:`SCHEMES`.
        python: an interpreter whose environment has llm-compressor.
        device: on which llm-compressor computes.
        run: runs a command; for tests.

    Raises:
        NLDError: an argument does not suit, llm-compressor failed, or its result is wrong. Nothing is written then.
    """
    config = _check(source, folder, scheme, python, run)
    ignored = [name.removesuffix(".weight") for name in _plain(config)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        plain, packed = Path(scratch, "plain"), Path(scratch, "packed")
        plain.mkdir()
        for file in source.iterdir():
            if file.is_file():
                (plain / file.name).symlink_to(file.resolve())
        settings = {"model_stub": str(plain), "save_directory": str(packed), "scheme": scheme, "ignore": ignored}
        done = run([str(python), "-c", _SCRIPT, json.dumps(settings | {"device": device})])
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise NLDError(f"--scheme {scheme}: llm-compressor failed: {last}")
        carried = [part for part in sorted(source.iterdir()) if part.is_dir() and not part.name.startswith(".")]
        for part in carried:
            shutil.copytree(part, packed / part.name)
        result = compare(source, packed, config, scheme, [part.name for part in carried])
        packed.rename(folder)
    return result


def _check(source: Path, folder: Path, scheme: str, python: Path, run: Run) -> NemotronLabsDiffusionConfig:
    """Return the source's config, if all arguments suit."""
    if scheme not in SCHEMES:
        raise NLDError(f"--scheme {shown(scheme)}: allowed are {', '.join(SCHEMES)}")
    if folder.exists():
        raise NLDError(f"FOLDER={folder}: is there already; allowed: a folder that does not exist yet")
    file = source / "config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    kinds = {kind.model_type: kind for kind in (NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig)}
    if settings.get("model_type") not in kinds or not list(source.glob("*.safetensors")):
        raise NLDError(
            f"SOURCE={source}: no checkpoint of this model; needed: *.safetensors, and a config.json with model_type "
            f"{' or '.join(kinds)}"
        )
    if settings.get("quantization_config"):
        raise NLDError(
            f"SOURCE={source}: is quantized already (config.json: quantization_config); needed: plain weights"
        )
    config: NemotronLabsDiffusionConfig = kinds[settings["model_type"]].from_dict(settings)
    check_tensors(source, config)
    try:
        there = run([str(python), "-c", _FIND]).returncode == 0
    except OSError as error:
        raise NLDError(f"--python {python}: {error.strerror}; needed: an interpreter") from error
    if not there:
        raise NLDError(
            f"--python {python}: has no llm-compressor. It shares no versions with vLLM, so make an environment: "
            "python -m venv ptq && ptq/bin/pip install llmcompressor; then --python ptq/bin/python"
        )
    return config


def _plain(config: NemotronLabsDiffusionConfig) -> list[str]:
    """Return the names of the matrices that stay as they are."""
    image_part = expected_image_tensors(config) if isinstance(config, NemotronLabsDiffusionVLMConfig) else {}
    return [f"{name}.weight" for name in IGNORED] + [name for name, shape in image_part.items() if len(shape) > 1]


def compare(source: Path, packed: Path, config: NemotronLabsDiffusionConfig, scheme: str, carried: list[str]) -> Result:
    """Check a quantized checkpoint: every tensor is there, plain ones are the source's, the others are near it.

    Raises:
        NLDError: something is not; the message names the tensor.
    """
    check_tensors(packed, config, quantized=True)
    with Tensors(source) as before, Tensors(packed) as after:
        quantization = Scheme.of(packed)
        plain = set(_plain(config))
        errors: dict[str, float] = {}
        for name, shape in expected_tensors(config).items():
            weight = before[name]
            if len(shape) == 1 or name in plain:
                if name not in after.files or not torch.equal(weight, after[name]):
                    raise NLDError(f"--scheme {scheme}: {name} is to stay as it is, but was changed")
                continue
            difference = quantization.unpacked(after, name.removesuffix(".weight")).float() - weight.float()
            errors[name] = float(difference.norm() / weight.float().norm().clamp(min=1e-30))
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        if not errors[worst] < LARGEST_ERROR:
            raise NLDError(f"--scheme {scheme}: {worst} differs by {errors[worst]:.0%} from the source's: unusable")
        return Result(scheme, before.bytes, after.bytes, len(errors), errors[worst], worst, carried)


class Tensors:
    """The tensors of a folder's safetensors files, read one at a time.

    Attributes:
        files: tensor name -> file.
        bytes: of all tensors.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*.safetensors"))
        self._opened = {path: safe_open(path, framework="pt") for path in paths}
        self.files = {name: path for path, file in self._opened.items() for name in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
        self.bytes = sum(path.stat().st_size for path in paths)

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.clear()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._opened[self.files[name]].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def of_module(self, module: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a module by the last part of their names."""
        for name in self.files:
            if name.rpartition(".")[0] == module:
                yield name.rpartition(".")[2], self[name]


class Scheme:
    """How a checkpoint's one scheme is undone, by compressed-tensors, which vLLM brings."""

    def __init__(self, settings: dict[str, object]) -> None:
        from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]
        from compressed_tensors.quantization import QuantizationConfig  # type: ignore[import-untyped]

        config = QuantizationConfig.model_validate({key: settings[key] for key in ("config_groups", "format")})
        (self._scheme,) = config.config_groups.values()
        self._compressor = BaseCompressor.get_value_from_registry(self._scheme.format or config.format)

    @classmethod
    def of(cls, folder: Path) -> Scheme:
        """Read a folder's config."""
        return cls(json.loads((folder / "config.json").read_text())["quantization_config"])

    def unpacked(self, tensors: Tensors, module: str) -> Tensor:
        """Return a module's weight ``[outputs, inputs]`` as it is multiplied by."""
        weight: Tensor = self._compressor.decompress(dict(tensors.of_module(module)), self._scheme)["weight"]
        return weight
