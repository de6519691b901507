"""One line for a quantization that vLLM cannot run on this device: which scheme, which device, and why.

vLLM says it in several ways: over many lines when it makes the layers, by an operator that its build for this CPU lacks
when it repacks weights, or by a wrong dtype in the first forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_nld.errors import NLDError

_PRODUCTS = {"CPUWNA16LinearKernel": ("cpu_gemm_wna16", "AVX-512")}
"""vLLM's kernels for CPUs -> the operator that a build may lack, and what the builds that have it need."""


def scheme(model_config: Any) -> str:
    """Return the name of a model's quantization: the method, and what a checkpoint says of weights and activations."""
    method, settings = str(model_config.quantization), getattr(model_config.hf_config, "quantization_config", None)
    if not isinstance(settings, dict):
        return f"{method} (of plain weights)"
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        bits = settings.get("bits") or settings.get("w_bit")
        return f"{method}, {bits} bits" if bits else method
    return f"{method} {' and '.join(sorted({_group(name, group) for name, group in groups.items()}))}"


def _group(name: str, group: dict[str, Any]) -> str:
    """Return what a group of compressed-tensors does, such as ``W4A8 (int4 weights per group, ...)``."""
    title = "" if name.startswith("group_") else name  # which preset, if the tool says so
    parts = []
    for name in ("weights", "input_activations"):
        args = group.get(name)
        if args:
            zero_points = "" if args.get("symmetric", True) else " asymmetric"
            how = f"{args.get('type')}{args.get('num_bits')}{zero_points}"
            parts.append(f"{how} {name.removeprefix('input_')} per {args.get('strategy')}")
    return f"{title} ({', '.join(parts)})".strip()


@contextmanager
def named(vllm_config: Any) -> Iterator[None]:
    """Turn what vLLM raises inside into one line that names scheme and device, if there is a quantization.

    Raises:
        NLDError: vLLM cannot run the quantization.
    """
    try:
        yield
    except NLDError:
        raise
    except Exception as error:
        if vllm_config.model_config.quantization is None:
            raise
        raise _refusal(vllm_config, _reason(error)) from error


def check_and_name(model: Any, vllm_config: Any) -> None:
    """Refuse what fails in the first forward only, and have failures while weights are repacked named.

    Raises:
        NLDError: vLLM cannot run the quantization.
    """
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    if vllm_config.model_config.quantization is None:
        return
    methods = {id(method): method for module in model.modules() if (method := getattr(module, "quant_method", None))}
    for method in methods.values():
        if isinstance(method, QuantizeMethodBase) and not isinstance(method, UnquantizedLinearMethod):
            method.process_weights_after_loading = _naming(method.process_weights_after_loading, vllm_config)
    kernels = {type(_kernel(module)).__name__ for module in model.modules()}
    for kernel, (operator, needed) in _PRODUCTS.items():
        if kernel in kernels and not hasattr(torch.ops._C, operator):
            raise _refusal(vllm_config, f"its build for this CPU has no operator {operator}, which needs {needed}")
    dtype = vllm_config.model_config.dtype
    if "CPUInt8ScaledMMLinearKernel" in kernels and dtype == torch.float32 and torch.cpu._is_amx_tile_supported():
        raise _refusal(vllm_config, "its product for AMX takes no float32; use --dtype bfloat16")


def _kernel(module: Any) -> Any:
    return getattr(getattr(module, "scheme", None) or getattr(module, "quant_method", None), "kernel", None)


def _naming(process: Any, vllm_config: Any) -> Any:
    def named_process(layer: Any) -> None:
        with named(vllm_config):
            process(layer)

    return named_process


def _refusal(vllm_config: Any, reason: str) -> NLDError:
    config, device = vllm_config.model_config, vllm_config.device_config.device_type
    where = f"on {device} in {str(config.dtype)[6:]}"
    return NLDError(f"quantization {scheme(config)} {where}: vLLM cannot run it: {reason}")


def _reason(error: Exception) -> str:
    lines = [line.strip(" .") for line in str(error).replace("Reasons:", "").splitlines()]
    return "; ".join(line for line in lines if line) or type(error).__name__
