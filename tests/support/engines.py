"""Real vLLM engines inside the test process, and access to their parts."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.startup.quick_start import PRICING_SECONDS
from vllm_nld.cli.engine import PROPOSER, stop
from vllm_nld.proposer.self_speculation import SelfSpeculation

CACHE_BYTES = 1 << 25
SelfSpeculation.pricing_seconds = PRICING_SECONDS
DRAFTS_OF_THE_REFERENCE: dict[str, Any] = {"mode": "self_speculation", "prompt_lookup": 0}
engines_before = itertools.count()
freeze = gc.freeze  # prepare_process takes it away from vLLM, which would freeze dead engines, too


def leave_out_of_garbage() -> None:
    """Leave all that lives now out of later garbage collections.

    An engine asks for ten full ones. Each takes half a second, for it looks at all that was imported, which is never
    garbage.
    """
    gc.collect()
    freeze()


@functools.cache
def prepare_process() -> None:
    """Do once what vLLM does again for each of the many engines of a process: with it, one starts in half a second."""
    from vllm import LLM  # noqa: F401
    from vllm.platforms import current_platform
    from vllm.v1.engine import core, llm_engine  # noqa: F401

    if current_platform.is_cpu():
        import vllm_nld.worker.cpu  # noqa: F401
    leave_out_of_garbage()
    gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]
    # It looks through all modules for kernels to replace: a second time there are none.
    platform = type(current_platform)
    if hasattr(platform, "register_triton_kernel_overrides"):
        once = functools.cache(platform.register_triton_kernel_overrides)
        platform.register_triton_kernel_overrides = staticmethod(once)


@contextlib.contextmanager
def engine(folder: Path, spec: bool | int = False, options: dict[str, Any] | None = None, **settings: Any) -> Iterator:
    """Yield an LLM on random or embedded weights.

    ``spec`` is False, True (default drafts) or a number of drafts; with it, the default mode is self-speculation.
    """
    from vllm import LLM

    prepare_process()
    if next(engines_before) == 1:
        leave_out_of_garbage()  # the first one has imported more
    speculative = None
    if spec:
        speculative = {"model": PROPOSER} | ({} if spec is True else {"num_speculative_tokens": spec})
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": CACHE_BYTES,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        # Auto mode, the default, chooses by measured time, so its drafts differ from run to run.
        # And drafts equal those of the reference, which looks nothing up.
        "additional_config": {"nld": DRAFTS_OF_THE_REFERENCE | (options or {}) if spec else options or {}},
        "speculative_config": speculative,
    }
    settings = defaults | settings
    if torch.cuda.is_available():
        from vllm.compilation.monitor import set_cudagraph_capturing_enabled

        set_cudagraph_capturing_enabled(True)  # the first runner takes it away from the process's later engines
        settings.setdefault("gpu_memory_utilization", 0.1)  # several engines share the device
        if settings["dtype"] == "float32":
            settings.setdefault("attention_backend", "TRITON_ATTN")  # the only one that takes it
    llm = LLM(model=str(folder), **settings)
    try:
        yield llm
    finally:
        stop(llm)


def generate(
    llm: Any, prompts: list[list[int]], each: list[dict[str, Any]] | None = None, loras: Any = None, **params: Any
) -> list[list[int]]:
    """Complete token prompts in one batch; greedy by default. Returns the new token ids.

    ``each`` are the requests' own options, under ``nld``; ``loras`` their LoRAs.
    """
    from vllm import SamplingParams

    params = {"temperature": 0, "max_tokens": 24, "detokenize": False} | params
    settings: Any = SamplingParams(**params)
    if each is not None:
        settings = [SamplingParams(**params, extra_args={"nld": options}) for options in each]
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(inputs, settings, use_tqdm=False, lora_request=loras)
    return [list(output.outputs[0].token_ids) for output in outputs]


NEAR_TIE = 0.2
"""Log probability that bfloat16 may lose between a step of one token and one of several."""


def far_from_best(llm: Any, prompt: list[int], text: list[int]) -> float:
    """The largest gap, in AR's log probabilities, between a token of the text and the likeliest one at its place."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False, extra_args={"nld": {"mode": "ar"}})
    (output,) = llm.generate([{"prompt_token_ids": prompt + text}], params, use_tqdm=False)
    places = list(zip(text, output.prompt_logprobs[len(prompt) :], strict=True))
    return max(max(one.logprob for one in at.values()) - at[token].logprob for token, at in places)


def runner(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def replace_drafts(llm: Any, drafts: Callable[[Any], list[int]]) -> None:
    """Have every block filled with ``drafts(block)``, its tokens after the seed, without a forward."""

    def run(blocks: Any, leave: Any = None) -> None:
        for block in blocks:
            block.tokens[1:] = drafts(block)
            block.passes = 1

    runner(llm).drafter.draft_pass.run = run


def shun_ar(llm: Any, drafts: Callable[[int], int] = lambda count: count) -> None:
    """Have auto mode verify ``drafts(n)`` of every n drafts at hand, and draft if there is none, at any price."""
    from vllm_nld.auto.candidates import Taken
    from vllm_nld.auto.search import Search

    class Eager(Search):
        def at_hand(self, offers: Any, requests: int, tokens: int) -> tuple[dict[int, Taken], float, float]:
            taken = {row: Taken(offer.source, drafts(len(offer.chances))) for row, offer in offers.items()}
            taken = {row: some for row, some in taken.items() if some.drafts}
            return taken, 0.0, float("inf") if taken else 0.0

        def floor(self, requests: int, tokens: int) -> float:
            return 0.0

    auto = runner(llm).drafter.auto
    auto.search = Eager(auto.search.prices, auto.search.lengths)
    auto.probing.due = lambda *_: None


def watch_blocks(llm: Any, seen: Callable[[Any], None]) -> None:
    """Call ``seen(block)`` for every block, once it is filled."""
    draft_pass = runner(llm).drafter.draft_pass
    original = draft_pass.run

    def run(blocks: Any, leave: Any = None) -> None:
        original(blocks, leave)
        for block in blocks:
            if block.is_done(draft_pass.mask_token_id):
                seen(block)

    draft_pass.run = run


def metric(llm: Any, name: str) -> int:
    """The value of a counter, summed over labels."""
    found = [m.value for m in llm.get_metrics() if m.name == name]
    assert found, f"no metric {name}"
    return int(sum(found))


def accepted(llm: Any) -> int:
    return metric(llm, "vllm:spec_decode_num_accepted_tokens")


def counters(llm: Any) -> dict[str, int]:
    return dict(llm.collective_rpc("nld_counters")[0])


def branches(llm: Any) -> Counter[str]:
    """What branches did since start-up: their tokens, and hits by kind."""
    return Counter(llm.collective_rpc("nld_tally")[0]["branches"])


def random_prompts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths without the mask token (id 5) or other special ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(6, vocab_size, (n,), generator=generator).tolist() for n in lengths]
