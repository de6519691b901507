"""The choice of vLLM's worker class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_nld.worker.NLDCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_nld.worker.NLDGPUWorker",
}
SECOND_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_nld.worker.NLDSecondCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_nld.worker.NLDSecondGPUWorker",
}
"""For vLLM's second model runner."""


def use_worker_subclass(parallel_config: Any, second: bool = False) -> None:
    """Choose the worker subclass that attaches the proposer to the model runner, unless the user chose a worker.

    The platform sets ``worker_cls`` after this hook, so this asks for its choice.

    Args:
        parallel_config: vLLM's.
        second: whether the engine uses vLLM's second model runner.
    """
    if parallel_config.worker_cls != "auto":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        platform_worker = "vllm.v1.worker.cpu_worker.CPUWorker"
    elif current_platform.is_cuda_alike():
        platform_worker = "vllm.v1.worker.gpu_worker.Worker"
    else:
        return
    parallel_config.worker_cls = (SECOND_WORKERS if second else WORKERS)[platform_worker]


def ray_executor_runs_workers() -> bool:
    """Whether the chosen Ray executor runs a step with ``Worker.execute_model``, like the multiprocessing executor."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", False))


def transfers_layer_by_layer(kv_transfer_config: Any) -> bool:
    """Whether a KV connector transfers inside the attention of every layer, instead of between forwards.

    vLLM calls two hooks around each layer's attention in any forward with metadata, also in drafts. Most connectors
    leave them empty. A connector that may use either way says so with ``requires_piecewise_for_cudagraph``.
    """
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    extra = kv_transfer_config.kv_connector_extra_config
    if kv_transfer_config.kv_connector == "MultiConnector":
        return any(transfers_layer_by_layer(KVTransferConfig(**child)) for child in extra.get("connectors", []))
    connector = KVConnectorFactory.get_connector_class(kv_transfer_config)
    says_itself = "requires_piecewise_for_cudagraph"
    if getattr(connector, says_itself).__func__ is not getattr(KVConnectorBase_V1, says_itself).__func__:
        return bool(connector.requires_piecewise_for_cudagraph(extra))
    return not all(_is_empty(getattr(connector, hook)) for hook in ("wait_for_layer_load", "save_kv_layer"))


def _is_empty(function: Callable[..., Any]) -> bool:
    """Whether a function's source only returns."""
    import ast
    import textwrap

    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef), "a connector's hooks are methods"
    idle = (ast.Pass, ast.Expr, ast.Return)
    return all(
        isinstance(statement, idle) and isinstance(getattr(statement, "value", None), ast.Constant | None)
        for statement in definition.body
    )


def is_for_second_runner(worker_cls: str) -> bool:
    """Whether a worker, by its path, is a subclass of this extension's for vLLM's second runner."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return any(base.__name__ == "IntroducesSpeculator" for base in resolve_obj_by_qualname(worker_cls).__mro__)
