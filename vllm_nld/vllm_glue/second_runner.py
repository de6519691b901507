"""What is needed of vLLM's second model runner (V2), and how an engine comes to use it.

vLLM itself picks the runner (``VllmConfig.use_v2_model_runner``): the second one wherever nothing that the engine asks
for is missing there. It counts every ``custom_class`` among what is missing. For self-speculation it is not: there is a
speculator for that runner. What self-speculation lacks there is said instead, so that such an engine takes the first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.logger import init_logger

from vllm_nld.errors import NLDError
from vllm_nld.options import NLDOptions
from vllm_nld.vllm_glue.versions import BAD_WORDS_SEE_DRAFTS, SUPPORTED, installed_release

logger = init_logger("vllm.nld.runner")

CUSTOM_CLASS = "speculative method 'custom_class'"
"""How vLLM lists the method among what its second runner lacks."""

WhyFirst = Callable[[Any], list[str]]
"""Takes a ``VllmConfig``; returns what self-speculation lacks on the second runner and the engine asks for."""


def allow_self_speculation(is_ours: Callable[[Any], bool], why_first: WhyFirst) -> None:
    """Have vLLM take the second runner for engines for which ``is_ours(vllm_config)`` holds; idempotent.

    Raises:
        NLDError: vLLM lists no missing features any more.
    """
    from vllm.config import VllmConfig

    name = "_get_v2_model_runner_unsupported_features"
    original = getattr(VllmConfig, name, None)
    if original is None:
        raise NLDError(f"this vLLM's VllmConfig has no {name!r}; vllm-nld supports vLLM {SUPPORTED}")
    if getattr(original, "allows_self_speculation", False):
        return

    @functools.wraps(original)
    def missing(self: Any) -> list[str]:
        found: list[str] = original(self)
        if not is_ours(self):
            return found
        return [feature for feature in found if feature != CUSTOM_CLASS] + why_first(self)

    missing.allows_self_speculation = True  # type: ignore[attr-defined]
    VllmConfig._get_v2_model_runner_unsupported_features = missing


def allow_asynchronous_scheduling(
    is_ours: Callable[[Any], bool], why_first: WhyFirst, settle: Callable[[Any, list[str]], None]
) -> None:
    """Let self-speculation on the second runner be scheduled asynchronously, unless the user said no; idempotent.

    Up to 0.32 vLLM allows that for speculative methods that it lists by name, in the middle of
    ``VllmConfig.__post_init__``. So it is told no, and the answer is corrected afterwards. ``settle`` is called then,
    with what ``why_first`` said of the user's own choices.
    """
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__
    if getattr(original, "settles_self_speculation", False):
        return

    @functools.wraps(original)
    def fill_in(self: Any, *args: Any) -> None:
        if not is_ours(self):
            original(self, *args)
            return
        reasons = why_first(self)
        scheduler, parallel = self.scheduler_config, self.parallel_config
        wanted, synchronize = scheduler.async_scheduling, parallel.disable_nccl_for_dp_synchronization
        if self.use_v2_model_runner:
            scheduler.async_scheduling = False
        original(self, *args)
        if self.use_v2_model_runner and wanted is not False and asynchronous_is_possible(self):
            scheduler.async_scheduling = True
            self.model_config.disable_cascade_attn = True  # this and the next as vLLM has it in this case
            if synchronize is None:
                parallel.disable_nccl_for_dp_synchronization = True
        settle(self, reasons)

    fill_in.settles_self_speculation = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = fill_in


def asynchronous_is_possible(vllm_config: Any) -> bool:
    """Whether platform and executor can schedule asynchronously; vLLM's CPU platform switches it off for all."""
    from vllm.platforms import current_platform
    from vllm.v1.executor.abstract import Executor

    return not current_platform.is_cpu() and bool(Executor.get_class(vllm_config).supports_async_scheduling())


def describe(vllm_config: Any, reasons: list[str]) -> str:
    """Say which runner an engine with self-speculation uses, and why.

    Args:
        vllm_config: filled in.
        reasons: what it asks for that self-speculation lacks on the second runner.
    """
    asked = asked_for()
    if vllm_config.use_v2_model_runner:
        way = "asynchronous" if vllm_config.scheduler_config.async_scheduling else "synchronous"
        why = "VLLM_USE_V2_MODEL_RUNNER=1" if asked else "vLLM's choice"
        return f"V2 ({why}), {way} scheduling"
    if asked is False:
        why = "VLLM_USE_V2_MODEL_RUNNER=0"
    elif not has_triton():
        why = "V2 wants Triton, which has no driver here"
    elif reasons:
        why = f"not on V2 yet: {', '.join(reasons)}"
    else:
        why = "vLLM's choice"
    return f"V1 ({why}), synchronous scheduling"


def expected() -> str:
    """Say which runner a server with self-speculation and nothing special takes on this machine, and why."""
    asked = asked_for()
    if asked is not None:
        return f"V{2 if asked else 1} (VLLM_USE_V2_MODEL_RUNNER={int(asked)})"
    if has_triton():
        return "V2, asynchronous (servers that ask for what docs/operate/runners.md says it lacks take V1)"
    return "V1 (V2 wants Triton, which has no driver here)"


def asked_for() -> bool | None:
    """Return what ``VLLM_USE_V2_MODEL_RUNNER`` says; None where it is not set."""
    from vllm import envs

    asked: bool | None = envs.VLLM_USE_V2_MODEL_RUNNER
    return asked


def has_triton() -> bool:
    """Whether vLLM finds a Triton that runs here."""
    from vllm.triton_utils import HAS_TRITON

    return bool(HAS_TRITON)


def install_speculator(make: Callable[[Any, Any], Any]) -> None:
    """Have runners of self-speculation use ``make(vllm_config, device)`` as their speculator; idempotent.

    vLLM has a factory with a branch for each of its own methods. The runner's module calls it by its own global name.
    """
    from vllm.v1.worker.gpu import model_runner

    original = getattr(model_runner, "init_speculator", None)
    if original is None:
        raise NLDError(f"this vLLM's second runner has no 'init_speculator'; vllm-nld supports vLLM {SUPPORTED}")
    if getattr(original, "knows_self_speculation", False):
        return

    @functools.wraps(original)
    def init_speculator(vllm_config: Any, device: Any, *others: Any, **named: Any) -> Any:
        if vllm_config.speculative_config.method == "custom_class":
            return make(vllm_config, device)
        return original(vllm_config, device, *others, **named)

    init_speculator.knows_self_speculation = True  # type: ignore[attr-defined]
    model_runner.init_speculator = init_speculator


def add_graphs_of_single_tokens(manager: Any) -> int:
    """Have full CUDA graphs also of steps in which every request computes one token; returns how many.

    With speculation vLLM plans full graphs for steps of whole blocks only. Requests that decode by AR would run
    piece by piece, every layer launched by the host. Call it before the graphs are captured.

    Args:
        manager: the runner's ``ModelCudaGraphManager``.
    """
    from vllm.config import CUDAGraphMode

    planned = manager._capture_descs.get(CUDAGraphMode.FULL, [])
    of_blocks = [found for found in planned if found.uniform_token_count == manager.decode_query_len]
    if not of_blocks or any(found.uniform_token_count == 1 for found in planned):
        return 0  # no full graphs of blocks, or of single tokens as well
    most = int(manager.max_num_reqs)
    sizes = sorted({min(size, most) for size in manager.compilation_config.cudagraph_capture_sizes})
    added = [
        replace(of_blocks[0], num_tokens=size, num_reqs=size, uniform_token_count=1, num_active_loras=loras)
        for size in sizes
        for loras in manager.lora_capture_cases
    ]
    # The largest is captured first: its output's buffer serves all.
    manager._capture_descs[CUDAGraphMode.FULL] = sorted([*planned, *added], key=lambda found: -found.num_tokens)
    smaller: dict[int, int] = {}
    for found in added:
        for tokens in range(smaller.get(found.num_active_loras, 0) + 1, found.num_tokens + 1):
            key = tokens, found.num_active_loras
            manager._candidates[key] = [found, *manager._candidates.get(key, [])]
        smaller[found.num_active_loras] = found.num_tokens
    return len(added)


def leave_graphs(manager: Any, leaves: Callable[[Any], bool]) -> None:
    """Have steps run without a CUDA graph for which ``leaves(description)`` says that the one found does not serve.

    Args:
        manager: the runner's ``ModelCudaGraphManager``.
        leaves: takes vLLM's ``BatchExecutionDescriptor``.
    """
    from vllm.config import CUDAGraphMode

    original = manager.dispatch

    @functools.wraps(original)
    def dispatch(num_reqs: int, num_tokens: int, *others: Any, **named: Any) -> Any:
        found = original(num_reqs, num_tokens, *others, **named)
        if found.cg_mode == CUDAGraphMode.NONE or not leaves(found):
            return found
        return replace(found, cg_mode=CUDAGraphMode.NONE, num_tokens=num_tokens, num_reqs=num_reqs,
                       uniform_token_count=None)  # fmt: skip

    manager.dispatch = dispatch


def words_miss_drafts(params: Any) -> bool:
    """Whether this vLLM would let drafts end a bad word of several tokens. Such a request decodes without drafts.

    Args:
        params: vLLM's ``SamplingParams``.
    """
    words = params.bad_words_token_ids or ()
    return installed_release() < BAD_WORDS_SEE_DRAFTS and any(len(word) > 1 for word in words)


def block_length(options: NLDOptions, params: Any, longest: int | None) -> int:
    """Return the tokens of a request's blocks, seed included; 1: it decodes without drafts.

    Args:
        options: the request's.
        params: vLLM's ``SamplingParams``.
        longest: tokens of the engine's longest block; None: it has no drafts.
    """
    if options.mode == "ar" or words_miss_drafts(params):
        return 1
    return options.block_length or longest or 1


VERIFIED = (
    "target_logits",
    "draft_logits",
    "draft_sampled",
    "cu_num_logits",
    "pos",
    "idx_mapping",
    "expanded_idx_mapping",
    "expanded_local_pos",
    "temperature",
    "seed",
    "num_speculative_steps",
)
"""First parameters of vLLM's ``rejection_sample``, in order."""


def install_verification(verify: Callable[..., tuple[Tensor, Tensor] | None]) -> None:
    """Have ``verify(original, arguments)`` asked before vLLM's rejection sampler; None leaves the step to that.

    Args:
        verify: takes vLLM's function and its arguments, by the names of :data:`VERIFIED`. Returns
            tokens int64 ``[requests, steps + 1]`` and how many each request gets, int32 ``[requests]``.

    Raises:
        NLDError: the function has other parameters.
    """
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    original = getattr(rejection_sampler, "rejection_sample", None)
    if original is None:
        raise NLDError(f"this vLLM's second runner has no 'rejection_sample'; vllm-nld supports vLLM {SUPPORTED}")
    if getattr(original, "asks_self_speculation", False):
        return
    names = list(inspect.signature(original).parameters)
    if tuple(names[: len(VERIFIED)]) != VERIFIED:
        raise NLDError(f"this vLLM's rejection_sample takes {names}; vllm-nld supports vLLM {SUPPORTED}")

    @functools.wraps(original)
    def rejection_sample(*args: Any, **others: Any) -> Any:
        arguments = dict(zip(VERIFIED, args, strict=False))
        rest = args[len(VERIFIED) :]
        found = verify(lambda known: original(*known.values(), *rest, **others), arguments)
        return original(*args, **others) if found is None else found

    rejection_sample.asks_self_speculation = True  # type: ignore[attr-defined]
    rejection_sampler.rejection_sample = rejection_sample


def divides_draft_logits() -> bool:
    """Whether vLLM's verification takes draft logits as the model makes them, and divides them by the temperature.

    Until 0.27 it wants them divided; its samplers put them away under another name.
    """
    return "logits_cache" in _sampler_parameters()


@functools.cache
def _sampler_parameters() -> frozenset[str]:
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    return frozenset(inspect.signature(gumbel_sample).parameters)


def draw(
    logits: Tensor,
    requests: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    tempered: bool,
    fp64: bool,
) -> Tensor:
    """Draw a token per row as vLLM does: by noise that belongs to a seed and a position. Temperature 0 takes the best.

    Args:
        logits: ``[rows, vocab]``.
        requests: int64 ``[rows]``, whose row each is; -1 for padding.
        temperature: float32 ``[requests]``.
        seeds: int64 ``[requests]``.
        positions: int64 ``[rows]``, of the token before the drawn one.
        tempered: whether the logits are divided by the temperature already.
        fp64: vLLM's ``use_fp64_gumbel``.

    Returns:
        int64 ``[rows]``.
    """
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    others: dict[str, Any] = {"use_fp64": fp64}
    if "is_drafting" in _sampler_parameters():
        others["is_drafting"] = False  # the caller keeps streams apart by positions
    drawn: Tensor = gumbel_sample(logits, requests, temperature, seeds, positions, not tempered, **others)
    return drawn
