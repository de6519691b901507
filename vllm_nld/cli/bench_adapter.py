"""``vllm-nld bench adapter``: what a draft adapter adds to a draft pass, and to a causal step that does not use it.

Two adapters: the released layout, and one on all projections with the mask token's row. One engine with random weights
for each. Forwards with and without the adapter alternate, so that drift affects both equally.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from vllm_nld.checkpoints.draft_lora import FOLDER, RELEASED_TARGETS, TARGETS
from vllm_nld.cli.console import report_console
from vllm_nld.cli.dummy import DUMMY_SETTINGS, dummy_config
from vllm_nld.cli.engine import engine, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import one_of
from vllm_nld.config import NemotronLabsDiffusionConfig

MODELS = ("3b", "8b")
SCALE = 4.0
BLOCK = 32


@dataclass(frozen=True)
class Layout:
    """What an adapter consists of."""

    name: str
    targets: tuple[str, ...]
    rank: int
    mask_row: bool


LAYOUTS = (Layout("o_proj", RELEASED_TARGETS, 128, False), Layout("all, mask row", TARGETS, 64, True))


def run(models: list[str], layers: int | None, repeats: int, as_json: bool) -> None:
    """Measure every shape; print a table or one JSON object.

    Raises:
        NLDError: a model name is unknown.
    """
    for name in models:
        one_of("--model", name, MODELS)
    prepare_environment()
    with stdout_to_stderr():
        rows = [_measure(name, layout, layers, repeats) for name in models for layout in LAYOUTS]
    if as_json:
        print(json.dumps({"block": BLOCK, "repeats": repeats, "results": rows}))
    else:
        _show(rows, repeats)


def _measure(name: str, layout: Layout, layers: int | None, repeats: int) -> dict[str, Any]:
    config = dummy_config(name, layers)
    print(f"bench: {name}, {config.num_hidden_layers} layers, {layout.name} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _dummy_model(config, layout, Path(scratch))
        with engine(str(folder), drafts=BLOCK - 1, skip_tokenizer_init=True, **DUMMY_SETTINGS) as llm:
            core = llm.llm_engine.engine_core.engine_core
            runner = core.model_executor.driver_worker.worker.model_runner
            parts = _parts(runner.model)
            size = sum(buffer.nbytes for _, _, part in parts for buffer in part.buffers())
            draft = _alternate(_draft(runner), repeats)
            causal = _alternate(_causal(llm, parts), repeats)
    return {
        "model": name,
        "layers": config.num_hidden_layers,
        "adapter": layout.name,
        "rank": layout.rank,
        "bytes": size,
        "draft": draft,
        "causal_step": causal,
    }


def _dummy_model(config: NemotronLabsDiffusionConfig, layout: Layout, folder: Path) -> Path:
    from vllm_nld.reference import DraftAdapter

    config.save_pretrained(folder)
    row = torch.zeros(config.hidden_size) if layout.mask_row else None
    generator = torch.Generator().manual_seed(0)
    adapter = DraftAdapter.fresh(config, layout.rank, SCALE * layout.rank, generator, layout.targets, row)
    adapter.b = {place: torch.randn(b.shape) * 1e-3 for place, b in adapter.b.items()}
    adapter.write(folder / FOLDER, "dummy", torch.bfloat16)
    return folder


def _draft(runner: Any) -> Callable[[bool], None]:
    """Return a function that runs one draft forward, with the adapter or without."""
    from vllm_nld.draft_pass.block import Block

    draft_pass = runner.drafter.draft_pass

    def forward(adapted: bool) -> None:
        seed, mask = 7, draft_pass.mask_token_id
        draft_pass.run([Block(0, [seed] + [mask] * (BLOCK - 1), adapted=adapted)])

    return forward


def _parts(model: Any) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return the adapter's modules, each with its owner and its name there."""
    from vllm_nld.model.draft_adapter import DraftAdapter, MaskRow

    children = [(owner, name, child) for owner in model.modules() for name, child in owner.named_children()]
    return [part for part in children if isinstance(part[2], (DraftAdapter, MaskRow))]


def _causal(llm: Any, parts: list[tuple[nn.Module, str, nn.Module]]) -> Callable[[bool], None]:
    """Return a function that runs one AR step, in layers that have an adapter or in layers that have none."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=1500, ignore_eos=True, detokenize=False, extra_args={"nld": {"mode": "ar"}}
    )
    llm.llm_engine.add_request("bench", {"prompt_token_ids": [200 + i for i in range(128)]}, params)
    llm.llm_engine.step()

    def step(loaded: bool) -> None:
        for owner, name, part in parts:
            setattr(owner, name, part if loaded else None)
        llm.llm_engine.step()

    return step


def _alternate(call: Callable[[bool], None], repeats: int) -> dict[str, float]:
    """Return median milliseconds with and without, and the median ratio of adjacent forwards."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    for number in range(-2, repeats):
        for on in (number % 2 == 0, number % 2 != 0):
            started = time.perf_counter()
            call(on)
            if number >= 0:
                taken[on].append(time.perf_counter() - started)
    ratios = [with_it / without for with_it, without in zip(taken[True], taken[False], strict=True)]
    return {
        "with_ms": round(statistics.median(taken[True]) * 1e3, 2),
        "without_ms": round(statistics.median(taken[False]) * 1e3, 2),
        "ratio": round(statistics.median(ratios), 4),
    }


def _show(rows: list[dict[str, Any]], repeats: int) -> None:
    table = Table("model", "layers", "adapter", "rank", "MiB", "forward", "with ms", "without ms", "ratio")
    for row in rows:
        for kind, name in (("draft", f"draft of {BLOCK}"), ("causal_step", "AR step")):
            found = row[kind]
            values = (f"{found['with_ms']:.1f}", f"{found['without_ms']:.1f}", f"{found['ratio']:.3f}")
            table.add_row(
                row["model"], str(row["layers"]), row["adapter"], str(row["rank"]), f"{row['bytes'] / 2**20:.0f}",
                name, *values,
            )  # fmt: skip
    console = report_console()
    console.print(table)
    console.print(f"medians of {repeats} alternating forwards, bfloat16; in an AR step it is loaded but inactive")
