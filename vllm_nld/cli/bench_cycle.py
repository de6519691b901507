"""``vllm-nld bench cycle``: the cost of a draft + verify cycle, in AR steps of the same model on the same machine."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.quantize import SCHEMES
from vllm_nld.cli.console import report_console
from vllm_nld.cli.dummy import DUMMY_SETTINGS, dummy_config
from vllm_nld.cli.engine import engine, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import DTYPES, MODEL_LENGTH, one_of, within
from vllm_nld.cli.stopwatch import PARTS, Stopwatch, Watch

MODELS = ("tiny", "3b")
COLUMNS = (
    "model", "block", "ar_step_ms", "cycle_ms", "draft_ms", "cycle_in_ar_steps", "cycle_in_two_causal_forwards",
    "outside_forwards_ms", "outside_forwards_share",
)  # fmt: skip
DEFAULT_BLOCKS = {"tiny": [16], "3b": [32, 16]}
LONGEST_BLOCK = {"tiny": 16, "3b": 32}


@dataclass(frozen=True)
class Variant:
    """What of a model differs from the released one.

    Attributes:
        dtype: of activations, and of weights that are not quantized.
        layers: of the dummy model, at most. With few, ratios mean nothing, but the time outside the forwards does, and
            two numbers of layers give the cost of one.
        scheme: of the dummy model's quantized layers, if they are.
    """

    dtype: str = "bfloat16"
    layers: int | None = None
    scheme: str | None = None


def run(
    models: list[str], blocks: list[int], prompt_tokens: int, steps: int, as_json: bool, variant: Variant = Variant()
) -> None:
    """Measure every model and block length; print a table or one JSON object.

    Raises:
        NLDError: a name is unknown, a block too long for the model, or prompt and steps for its positions.
    """
    one_of("--dtype", variant.dtype, DTYPES)
    if variant.scheme is not None:
        one_of("--scheme", variant.scheme, tuple(SCHEMES))
    for name in models:
        one_of("--model", name, MODELS if variant.scheme is None else MODELS[1:])
        check_room(name, blocks or DEFAULT_BLOCKS[name], prompt_tokens, steps)
    prepare_environment()
    with stdout_to_stderr():
        report = {
            "prompt_tokens": prompt_tokens,
            "steps": steps,
            **asdict(variant),
            "machine": machine_limits(),
            "results": [row for name in models for row in _measure_model(name, blocks, prompt_tokens, steps, variant)],
        }
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def check_room(name: str, blocks: list[int], prompt_tokens: int, steps: int) -> None:
    """Refuse what does not fit a model's block length or its positions."""
    for block in blocks:
        within("--block", block, 2, LONGEST_BLOCK[name], f"the block length of {name}")
    block = max(blocks)
    most = (MODEL_LENGTH - 1 - generated(0, block - 1)) // (1 + block)
    within("--steps", steps, 3, most, f"{MODEL_LENGTH} positions, at block {block}")
    needed = generated(steps, block - 1)
    why = f"{MODEL_LENGTH} positions less {needed} for --steps {steps} at block {block}"
    within("--prompt-tokens", prompt_tokens, 1, MODEL_LENGTH - needed, why)


def generated(steps: int, drafts: int | None) -> int:
    """Return how many tokens to ask for, so that ``max_tokens`` cuts no block short while it is timed."""
    return steps * (2 + (drafts or 0)) + 64


def machine_limits() -> dict[str, float]:
    """Return this machine's speed: bf16 GEMM in GFLOP/s at 32 rows, and reading weights in GB/s at one row."""
    import torch

    weight = torch.randn(16384, 8192, dtype=torch.bfloat16)  # 268 MB: larger than any cache
    packed = torch.nn.Linear(8192, 16384, bias=False, dtype=torch.bfloat16)
    with torch.inference_mode():
        packed.weight.copy_(weight)
        block, row = torch.randn(32, 8192, dtype=torch.bfloat16), torch.randn(1, 8192, dtype=torch.bfloat16)
        gemm, gemv = _best_seconds(lambda: packed(block)), _best_seconds(lambda: packed(row))
    return {
        "gemm_gflops": round(2 * 32 * weight.numel() / gemm / 1e9, 1),
        "read_gb_per_s": round(2 * weight.numel() / gemv / 1e9, 1),
    }


def _best_seconds(call: Callable[[], Any], repeats: int = 15) -> float:
    """Seconds of the fastest call: a limit is what the machine can do, not what it usually does."""
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def _measure_model(
    name: str, blocks: list[int], prompt_tokens: int, steps: int, variant: Variant
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder, settings = _model(name, Path(scratch), variant)
        settings |= {"skip_tokenizer_init": True, "enable_prefix_caching": False}
        ar, _ = _steps(folder, None, prompt_tokens, steps, settings)
        rows = []
        for block in blocks or DEFAULT_BLOCKS[name]:
            cycle, parts = _steps(folder, block - 1, prompt_tokens, steps, settings)
            rows.append({"model": name, "block": block, **_summary(ar, cycle, parts)})
    return rows


def _summary(ar: float, cycle: float, parts: dict[str, float]) -> dict[str, Any]:
    """Return a result row: times in milliseconds, and the time outside the two forwards.

    The time outside is the sum of its parts. A difference of medians that are hundreds of times larger would be noise.
    """
    outside = sum(seconds for part, seconds in parts.items() if not part.endswith("forward"))
    return {
        "ar_step_ms": round(ar * 1e3, 2),
        "cycle_ms": round(cycle * 1e3, 2),
        "draft_ms": round((parts["draft forward"] + parts["draft pass"]) * 1e3, 2),
        "cycle_in_ar_steps": round(cycle / ar, 3),
        "cycle_in_two_causal_forwards": round(cycle / (2 * parts["verify forward"]), 3),
        "outside_forwards_ms": round(outside * 1e3, 2),
        "outside_forwards_share": round(outside / cycle, 4),
        "parts_ms": {part: round(seconds * 1e3, 3) for part, seconds in parts.items()},
    }


def _model(name: str, scratch: Path, variant: Variant) -> tuple[str, dict[str, Any]]:
    """Return the folder and the LLM settings of a benchmark model."""
    if name == "tiny":
        return str(checkpoint_path("tiny")), {"dtype": variant.dtype, "max_model_len": MODEL_LENGTH}
    dummy_config(name, variant.layers, variant.scheme).save_pretrained(scratch)
    return str(scratch), DUMMY_SETTINGS | {"dtype": variant.dtype}


def _steps(
    folder: str, drafts: int | None, prompt_tokens: int, steps: int, settings: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """Return the median seconds of a decode step (AR) or cycle (drafts given), and of its parts."""
    print(f"bench: {Path(folder).name}, {'AR' if drafts is None else f'block {drafts + 1}'} ...", file=sys.stderr)
    with engine(folder, drafts=drafts, **settings) as llm, Stopwatch(llm) as watch:
        times = time_decoding(llm, 1, prompt_tokens, steps, drafts or 0, watch)
    return statistics.median(times), watch.medians()


def time_decoding(
    llm: Any,
    requests: int,
    prompt_tokens: int,
    steps: int,
    drafts: int = 0,
    watch: Watch | None = None,
    ar: int = 0,
    **sampling: Any,
) -> list[float]:
    """Return the seconds of AR steps or cycles that decode for some requests at once, after all their prefills.

    A step counts when its tokens come out, because an asynchronous engine returns from some calls without tokens.

    Args:
        llm: an ``LLM`` that nothing else uses.
        requests: requests in flight.
        prompt_tokens: prompt length of each request.
        steps: steps to time; fewer if the requests end before.
        drafts: most drafts of a cycle, so that ``max_tokens`` cuts no block short while it is timed.
        watch: runs the steps and records their parts.
        ar: so many of the requests are asked for in AR mode.
        sampling: arguments of ``SamplingParams``; greedy by default.
    """
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": generated(steps, drafts), "ignore_eos": True, "detokenize": False}
    params = SamplingParams(**(defaults | sampling))
    in_ar_mode = SamplingParams(**(defaults | sampling | {"extra_args": {"nld": {"mode": "ar"}}}))
    core, names = llm.llm_engine, [f"bench-{number}" for number in range(requests)]
    for number, name in enumerate(names):
        prompt = {"prompt_token_ids": [200 + (number + i) % 200 for i in range(prompt_tokens)]}
        core.add_request(name, prompt, in_ar_mode if number < ar else params)
    waiting = set(names)
    while waiting:  # prefills, and the first drafts
        waiting -= {output.request_id for output in core.step()}
    core.step()
    times: list[float] = []
    last = time.perf_counter()
    while core.has_unfinished_requests() and len(times) < steps:
        outputs = core.step() if watch is None else watch.step(core.step)
        if outputs:
            now = time.perf_counter()
            times.append(now - last)
            last = now
    core.abort_request(names)
    while core.has_unfinished_requests():
        core.step()
    return times


def _show(report: dict[str, Any]) -> None:
    console = report_console()
    machine = report["machine"]
    console.print(
        f"machine: {machine['gemm_gflops']} GFLOP/s bf16 GEMM (32 rows), {machine['read_gb_per_s']} GB/s reads"
    )
    table = Table("model", "block", "AR step ms", "cycle ms", "of it draft ms", "cycle / AR step", "cycle / 2 causal",
                  "outside ms", "outside")  # fmt: skip
    for row in report["results"]:
        table.add_row(*(str(row[key]) for key in COLUMNS))
    console.print(table)
    parts = Table("model", "block", *(f"{part} ms" for part in PARTS))
    for row in report["results"]:
        parts.add_row(row["model"], str(row["block"]), *(f"{row['parts_ms'][part]:.2f}" for part in PARTS))
    console.print(parts)
    console.print("medians; one request; a cycle is one draft and one verify, ideal 2.0 where memory is the limit")
