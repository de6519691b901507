"""The draft adapter in engines: it changes drafts as in the reference, and nothing else, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.adapters import random_adapter, save_task_lora
from tests.support.cpus import needs_float32_int8
from tests.support.engines import (
    NEAR_TIE,
    accepted,
    engine,
    far_from_best,
    generate,
    random_prompts,
    runner,
    watch_blocks,
)
from tests.support.models import random_model, save, small_config
from vllm_nld.checkpoints.draft_lora import FOLDER, TARGETS
from vllm_nld.reference import DraftAdapter, ReferenceModel, ar_generate, linear_spec_generate
from vllm_nld.reference import generate as diffuse

SIZES: dict[str, Any] = {"eos_token_id": None, "block_size": 8}
CONFIG = small_config(**SIZES)
EVERYTHING: dict[str, Any] = {"targets": TARGETS, "mask_row": True, "size": 0.15}
PROMPTS = random_prompts([1, 40, 90, 17], 24, seed=7)
TOKENS = 24


@pytest.fixture
def model(request: pytest.FixtureRequest) -> ReferenceModel:
    """With an adapter on all projections and the mask token's row, or as a test asks for."""
    adapter = dict(getattr(request, "param", EVERYTHING))
    layers = adapter.pop("layers", CONFIG.num_hidden_layers)
    model = random_model(small_config(**SIZES, num_hidden_layers=layers), seed=3)
    model.draft_adapter = random_adapter(model.config, **adapter)
    return model


@pytest.fixture
def folder(model: ReferenceModel, tmp_path: Path) -> Path:
    assert model.draft_adapter is not None
    save(model, tmp_path / "model")
    model.draft_adapter.write(tmp_path / "model" / FOLDER, "somewhere")
    return tmp_path / "model"


def complete(llm: Any, prompts: list[list[int]], options: list[dict[str, Any]], loras: Any = None) -> list[list[int]]:
    """Complete prompts greedily in one batch, each with its own options."""
    return generate(llm, prompts, each=options, loras=loras, max_tokens=TOKENS)


def drafts_of(llm: Any, prompts: list[list[int]], options: dict[str, Any], lora: Any = None) -> list[list[list[int]]]:
    """The blocks of each prompt, run by itself."""
    blocks: list[list[int]] = []
    watch_blocks(llm, lambda block: blocks.append(list(block.tokens)))
    found = []
    for prompt in prompts:
        complete(llm, [prompt], [options], None if lora is None else [lora])
        found.append(blocks[:])
        blocks.clear()
    return found


def expected_drafts(model: ReferenceModel, adapter: DraftAdapter | None) -> list[list[list[int]]]:
    model.draft_adapter = adapter
    runs = [linear_spec_generate(model, ids, TOKENS) for ids in PROMPTS]
    return [[block for block in run.drafts if len(block) > 1] for run in runs]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        (EVERYTHING, {"enable_prefix_caching": True}),
        (EVERYTHING | {"targets": ("v_proj", "gate_proj")}, {}),
    ],
    indirect=["model"],
    ids=["released layout", "everything, cached prefixes", "parts of packed layers"],
)
def test_drafts_equal_reference_and_text_equals_ar(
    model: ReferenceModel, folder: Path, settings: dict[str, Any]
) -> None:
    """Drafts leave nothing in the cache, which later requests read again."""
    adapter = model.draft_adapter
    with_adapter, without = expected_drafts(model, adapter), expected_drafts(model, None)
    assert with_adapter != without
    with engine(folder, spec=True, **settings) as llm:
        assert drafts_of(llm, PROMPTS, {}) == with_adapter
        assert drafts_of(llm, PROMPTS, {"draft_adapter": False}) == without
        text = generate(llm, PROMPTS, max_tokens=TOKENS)
        assert text == [ar_generate(model, ids, TOKENS).ids[len(ids) :] for ids in PROMPTS]


def test_engine_without_adapter_drafts_without(model: ReferenceModel, folder: Path) -> None:
    with engine(folder, spec=True, options={"draft_lora": "off"}) as llm:
        assert drafts_of(llm, PROMPTS, {}) == expected_drafts(model, None)


def test_one_forward_serves_blocks_with_and_without_adapter(model: ReferenceModel, folder: Path) -> None:
    """Diffusion never drafts with the adapter, and a request can turn it off."""
    options: list[dict[str, Any]] = [{}, {"draft_adapter": False}, {"mode": "diffusion", "threshold": 0.4}, {}]
    adapter = model.draft_adapter
    attention = "vllm::unified_attention_with_output"
    with engine(folder, spec=True, compilation_config={"splitting_ops": [attention]}) as llm:
        operators = runner(llm).vllm_config.compilation_config.splitting_ops
        ours = ["vllm_nld::add_draft_adapter", "vllm_nld::set_mask_row"]
        assert operators == [attention, *ours], "on a GPU no CUDA graph holds them"
        seen: dict[int, list[list[int]]] = {}
        watch_blocks(llm, lambda block: seen.setdefault(block.prefix, []).append(list(block.tokens)))
        text = complete(llm, PROMPTS, options)
        batch = runner(llm).drafter.draft_pass
        assert batch.block_forwards > batch.forwards, "blocks did share forwards"
    plain = [ar_generate(model, ids, TOKENS).ids[len(ids) :] for ids in PROMPTS]
    diffused = diffuse(model, PROMPTS[2], TOKENS, threshold=0.4).ids[len(PROMPTS[2]) :]
    assert text == [plain[0], plain[1], diffused, plain[3]]
    for row, own in enumerate((adapter, None, None, adapter)):
        if row != 2:
            model.draft_adapter = own
            prompt = PROMPTS[row]
            run = linear_spec_generate(model, prompt, TOKENS)
            starts = [len(prompt) + sum(run.accepted[:cycle]) for cycle in range(len(run.drafts))]
            for start, block in zip(starts, run.drafts, strict=True):
                assert len(block) == 1 or block in seen[start]


@pytest.mark.parametrize(
    ("model", "eager"),
    [(EVERYTHING, True), (EVERYTHING | {"layers": 1}, False)],
    indirect=["model"],
    ids=["eager", "compiled"],
)
def test_causal_passes_are_bit_identical_with_and_without_adapter(
    model: ReferenceModel, folder: Path, eager: bool
) -> None:
    """Prefill, AR and verify, in float32 and compiled or not. Compiled drafts equal the reference's, too."""
    adapter = model.draft_adapter

    def logits_of(**options: Any) -> tuple[list[torch.Tensor], int]:
        found: list[torch.Tensor] = []
        with engine(folder, spec=True, options=options, enforce_eager=eager, max_num_seqs=4) as llm:
            if not (eager or options):
                assert drafts_of(llm, PROMPTS, {}) == expected_drafts(model, adapter)
            target, draft_pass = runner(llm).model, runner(llm).drafter.draft_pass
            compute, draft = target.compute_logits, draft_pass.run

            def keep(hidden: torch.Tensor) -> torch.Tensor:
                found.append(compute(hidden).clone())
                return found[-1].clone()

            def run(blocks: Any, leave: Any) -> None:
                target.compute_logits = compute  # a draft's logits are not compared
                draft(blocks, leave)
                target.compute_logits = keep
                for block in blocks:
                    block.tokens[1:] = [7] * (block.length - 1)  # verify equal drafts with and without the adapter

            target.compute_logits, draft_pass.run = keep, run
            complete(llm, PROMPTS, [{"mode": "ar"}, {}, {}, {"mode": "ar"}])
            return found, draft_pass.forwards

    with_adapter, drafted = logits_of()
    without, _ = logits_of(draft_lora="off")
    assert drafted > 0
    assert len(with_adapter) == len(without)
    assert all(map(torch.equal, with_adapter, without))


def merged(model: ReferenceModel, folder: Path) -> ReferenceModel:
    """The model with a request's LoRA in its weights."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, up in tensors.items():
            if ".lora_B." in name:
                target = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                model.get_parameter(f"{target}.weight").add_(up @ tensors[name.replace("lora_B", "lora_A")])
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's LoRA kernels for GPUs take no float32")
def test_request_lora_and_adapter_draft_together(model: ReferenceModel, folder: Path, tmp_path: Path) -> None:
    """The draft uses the request's LoRA and the draft adapter; the text equals AR's text with the request's LoRA."""
    from vllm.lora.request import LoRARequest

    tasks = [LoRARequest(f"task {n}", n, str(save_task_lora(tmp_path / f"task{n}", CONFIG, seed=n))) for n in (1, 2)]
    adapted = [merged(random_model(CONFIG, seed=3), tmp_path / f"task{n}") for n in (1, 2)]
    # No request without LoRA in this batch: vLLM 0.32's CPU operators give it the last LoRA, also in AR.
    models, loras = [adapted[0], adapted[1], adapted[1], adapted[0]], [tasks[0], tasks[1], tasks[1], tasks[0]]
    expected = [ar_generate(own, ids, TOKENS).ids[len(ids) :] for own, ids in zip(models, PROMPTS, strict=True)]
    plain = [ar_generate(model, ids, TOKENS).ids[len(ids) :] for ids in PROMPTS]
    with engine(folder, spec=True, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        assert complete(llm, PROMPTS, [{}, {}, {"mode": "ar"}, {}], loras) == expected
        assert accepted(llm) > 0
        assert complete(llm, PROMPTS, [{}] * 4) == plain
        diffused = [diffuse(own, ids, TOKENS).ids[len(ids) :] for own, ids in zip(models, PROMPTS, strict=True)]
        assert complete(llm, PROMPTS, [{"mode": "diffusion"}] * 4, loras) == diffused
        drafts = drafts_of(llm, PROMPTS, {}, tasks[0])
    assert drafts == expected_drafts(adapted[0], model.draft_adapter)
    assert drafts != expected_drafts(adapted[0], None)


def quantized(folder: Path, target: Path) -> Path:
    """Write the checkpoint with int8 weights, a scale per row, as llm-compressor does."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".layers." in name and weight.ndim == 2:
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[name.replace(".weight", ".weight_scale")] = scale
        else:
            tensors[name] = weight
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = weights | {"strategy": "token", "dynamic": True}
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    (target / "config.json").write_text(json.dumps(settings))
    shutil.copytree(folder / FOLDER, target / FOLDER)
    return target


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=needs_float32_int8), "bfloat16"])
def test_adapter_works_with_quantized_weights(dtype: str, folder: Path, tmp_path: Path) -> None:
    """In bfloat16 near-ties may be decided either way, so every token must be the best one of AR, or nearly so."""
    with engine(quantized(folder, tmp_path / "int8"), spec=True, dtype=dtype) as llm:
        with_adapter, without = (drafts_of(llm, PROMPTS[:2], {"draft_adapter": on}) for on in (True, False))
        (text,), (plain,) = (complete(llm, PROMPTS[:1], [{"mode": mode}]) for mode in ("self_speculation", "ar"))
        assert with_adapter != without
        if dtype == "float32":
            assert text == plain
        assert far_from_best(llm, PROMPTS[0], plain) < NEAR_TIE
        assert far_from_best(llm, PROMPTS[0], text) < NEAR_TIE
