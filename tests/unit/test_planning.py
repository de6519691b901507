"""The cost model of ``vllm-nld plan``: manual results, monotonicity, errors, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support import commands
from tests.support.models import random_model, save, small_config
from tests.support.quantized import compress
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.headers import expected_tensors
from vllm_nld.config import NemotronLabsDiffusionConfig, NemotronLabsDiffusionVLMConfig
from vllm_nld.errors import NLDError
from vllm_nld.planning import this_machine
from vllm_nld.planning.cost_model import (
    AR,
    PAGE,
    ModelShape,
    PlannedMode,
    Setup,
    acceptance_at,
    crossover,
    estimate,
    forward,
    memory,
    passes,
)
from vllm_nld.planning.gpus import GPUS, Gpu
from vllm_nld.planning.models import PUBLISHED, RELEASED, VLM, PlannedModel, find_model
from vllm_nld.planning.weight_formats import weight_format

EIGHT = RELEASED["8b"].shape
H100 = GPUS["h100"]
SPECULATION = PlannedMode("self_speculation", 32, 6.82)

ROUND = ModelShape(
    vocab_size=1000,
    hidden_size=100,
    intermediate_size=200,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=10,
    block_size=8,
    max_positions=4096,
)
PLAIN = Gpu(
    "plain",
    memory=1e9,
    bandwidth=1e9,
    flops={"bfloat16": 1e12, "float32": 1e12},
    link_bandwidth=1e8,
    link_latency=1e-4,
    bandwidth_share=1.0,
    flops_share=1.0,
    kernel_seconds=1e-6,
    host_seconds=1e-3,
    reserved=0.0,
)


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [("3b", 3_831_659_520, 106_496), ("8b", 8_489_553_920, 139_264), ("14b", 13_506_073_600, 163_840)],
)
def test_released_sizes(name: str, parameters: int, kv_bytes: int) -> None:
    shape = RELEASED[name].shape
    assert shape.parameters == parameters
    assert shape.kv_bytes_per_token(2) == kv_bytes
    config = NemotronLabsDiffusionConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_hidden_layers=shape.layers
    )
    assert sum(math.prod(sizes) for sizes in expected_tensors(config).values()) == parameters


def test_forward_equals_manual_result() -> None:
    """2 layers of 100 x 10 x 2 x 6 + 3 x 100 x 200 = 72 000 weights, an output layer of 100 000; 3 x 4 rows."""
    found = forward(Setup(ROUND, PLAIN, context=96), requests=3, rows=4, logit_rows=2, logit_bytes=10)
    assert ROUND.parameters == 2 * 72_000 + 2 * 100_000 + 5 * 100
    assert found.layers == pytest.approx(math.hypot(2 * 12 * 144_000 / 1e12, 288_000 / 1e9))
    assert found.head == pytest.approx(math.hypot(2 * 6 * 100_000 / 1e12, 200_000 / 1e9))
    # A token's keys and values: 2 layers x 2 heads x 10 x (key and value) x 2 bytes = 160.
    assert found.attention == pytest.approx(math.hypot(4 * 2 * 12 * 100 * 40 / 1e12, 3 * 100 * 160 / 1e9))
    assert found.small_operators == pytest.approx(2 * 12 * (800 + 160 + 600) * 2 / 1e9)
    assert found.logits == pytest.approx(6 * 1000 * 10 / 1e9)
    assert found.kernels == pytest.approx(24e-6)
    assert found.all_reduce == 0
    parts = (found.layers, found.head, found.attention, found.small_operators, found.logits, found.kernels)
    assert found.seconds == pytest.approx(sum(parts))
    assert found.longest == "layers"


def test_all_reduce_equals_manual_result() -> None:
    """Two per layer and one for the embedding, each moving twice half of 12 rows; and half of the logits, gathered."""
    found = forward(Setup(ROUND, PLAIN, tp=2, context=96), requests=3, rows=4, logit_rows=2, logit_bytes=10)
    assert found.all_reduce == pytest.approx(6 * 1e-4 + (5 * 12 * 100 * 2 + 0.5 * 6 * 1000 * 2) / 1e8)
    assert found.layers == pytest.approx(math.hypot(2 * 12 * 72_000 / 1e12, 144_000 / 1e9))


def test_cost_of_8b_on_h100_equals_manual_result() -> None:
    """34 layers of 218 103 808 weights are 14.83 GB, and the output layer 1.07 GB, at 0.85 x 3.35 TB/s."""
    ((_, _, step),) = passes(Setup(EIGHT, H100, context=2048), AR, 1)
    assert step.layers * 1e3 == pytest.approx(5.2086, abs=1e-3)
    assert step.head * 1e3 == pytest.approx(0.3771, abs=1e-3)
    assert step.attention * 1e3 == pytest.approx(0.1002, abs=1e-3)  # 2049 x 139 264 bytes
    assert step.kernels * 1e3 == pytest.approx(1.032)  # 344 kernels of 3 microseconds
    assert estimate(Setup(EIGHT, H100), AR, 1).tokens_per_request == pytest.approx(1 / 0.00722, rel=2e-3)


def test_diffusion_block_is_denoised_and_committed() -> None:
    """A TPF of 2.5 over 8 tokens: 3.2 forwards, the last one the commit."""
    setup, mode = Setup(ROUND, PLAIN, context=96), PlannedMode("diffusion", 8, 2.5)
    (denoise, times, cheap), (commit, once, causal) = passes(setup, mode, 3)
    assert (denoise, commit, once) == ("denoise", "commit", 1)
    assert times == pytest.approx(2.2)
    assert cheap == forward(setup, 3, 8, 4, 28) and causal == forward(setup, 3, 8, 8, 16)
    found = estimate(setup, mode, 3)
    assert found.step_seconds == pytest.approx(2.2 * cheap.seconds + causal.seconds + 3.2 * PLAIN.host_seconds)
    assert found.tokens_per_request == pytest.approx(8 / found.step_seconds)


def test_short_block_takes_two_forwards() -> None:
    """The published TPF is for long blocks; a block of 2 cannot yield more than one token per forward."""
    report = json.loads(invoke("8b", "--block-length", "2", "--concurrency", "1", "--json").stdout)
    _, cycle, block = report["estimates"][0]["modes"]
    assert block["tokens_per_step"] == 2
    assert block["step_ms"] == pytest.approx(cycle["step_ms"], rel=0.01)


def test_memory_equals_manual_result() -> None:
    setup = Setup(EIGHT, H100, context=2048)
    found = memory(setup, AR, 1)
    assert found.weights == 2 * EIGHT.parameters
    row = (4 * 4096 + 2 * 14336 + 48 * 128) * 2
    assert found.activations == 8192 * row
    left = 72e9 - 2 * EIGHT.parameters - 8192 * row - 2e9
    each = 2064 * 139_264 + 131_072 * 6 + row  # 2049 tokens take 129 pages
    assert found.requests == int(left // each) == 180
    assert found.kv_tokens == int((left - 131_072 * 6 - row) // (139_264 * PAGE)) * PAGE
    block = memory(setup, SPECULATION, 100_000)
    assert block.blocks == block.requests * 32 * (131_072 * 10 + row)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_costs_grow_with_sizes(tp: int) -> None:
    setup = Setup(EIGHT, H100, tp=tp)
    for mode in (AR, SPECULATION, PlannedMode("diffusion", 32, 2.57)):
        found = [estimate(setup, mode, count) for count in (1, 2, 8, 64, 128)]
        assert all(a.step_seconds < b.step_seconds for a, b in pairwise(found))
        assert all(a.tokens_per_second < b.tokens_per_second for a, b in pairwise(found))
        longer = dataclasses.replace(setup, context=8192)
        assert estimate(longer, mode, 8).step_seconds > found[2].step_seconds
        assert memory(longer, mode, 8).requests < memory(setup, mode, 8).requests
        if tp > 1:
            one = setup.on(1)
            assert memory(setup, mode, 8).requests > memory(one, mode, 8).requests
            assert estimate(setup, mode, 64).tokens_per_gpu < estimate(one, mode, 64).tokens_per_gpu
    cycles = [estimate(setup, PlannedMode("self_speculation", block, 3.0), 64).step_seconds for block in (4, 8, 16, 32)]
    assert cycles == sorted(cycles)


def test_fewer_kv_heads_than_gpus_are_repeated() -> None:
    assert ROUND.kv_bytes_per_token(2, tp=2) == ROUND.kv_bytes_per_token(2, tp=4) == 80


def test_fp8_halves_only_the_layers() -> None:
    wide, narrow = Setup(EIGHT, H100), Setup(EIGHT, H100, dtype="fp8")
    assert wide.weight_bytes - narrow.weight_bytes == EIGHT.layers * EIGHT.layer_weights
    assert forward(narrow, 1, 1, 1, 12).head == forward(wide, 1, 1, 1, 12).head
    assert forward(narrow, 1, 1, 1, 12).layers == pytest.approx(forward(wide, 1, 1, 1, 12).layers / 2, rel=1e-3)


def test_quantized_weights_alone_are_read_faster_and_multiplied_as_before() -> None:
    wide, narrow = Setup(EIGHT, H100), Setup(EIGHT, H100, dtype="w4a16")
    one, many = ([forward(setup, rows, 1, 1, 12).layers for rows in (1, 4096)] for setup in (wide, narrow))
    assert one[0] / many[0] == pytest.approx(2 / 0.515625, rel=2e-2)
    assert one[1] / many[1] == pytest.approx(1, rel=2e-2)
    gains = [estimate(setup, SPECULATION, 8).tokens_per_request / estimate(setup, AR, 8).tokens_per_request
             for setup in (wide, narrow)]  # fmt: skip
    assert gains[1] < gains[0], "AR gains more than blocks do"


FORMAT_CASES = {
    "W8A8": "w8a8",
    "W4A16": "w4a16",
    "W4A16_ASYM": "w4a16",
    "W4A8": "w4a8",
    "W8A16": "w8a16",
    "FP8_DYNAMIC": "fp8",
    "FP8_BLOCK": "fp8",
    "NVFP4A16": "nvfp4a16",
    "MXFP4A16": "mxfp4a16",
    "MXFP8": "mxfp8",
}


@pytest.mark.parametrize("scheme", FORMAT_CASES)
def test_weight_format_comes_from_the_checkpoint(tmp_path: Path, scheme: str) -> None:
    plain = save(random_model(small_config()), tmp_path / "plain")
    compress(plain, tmp_path / scheme, scheme)
    assert weight_format(find_model(str(tmp_path / scheme)).quantization) == FORMAT_CASES[scheme]
    assert weight_format(find_model(str(plain)).quantization) == "bfloat16"


def test_weight_bytes_are_those_of_a_file() -> None:
    """Of the real tool: the tiny model in each scheme, and the bytes of its tensors (docs/user/quantization.md)."""
    shape = find_model("tiny").shape
    sizes = {"bfloat16": 9.97e6, "w4a16": 2.98e6, "w8a8": 5.29e6, "nvfp4a16": 3.20e6, "mxfp8": 5.41e6}
    for dtype, size in sizes.items():
        assert Setup(shape, H100, dtype=dtype).weight_bytes == pytest.approx(size, rel=0.02), dtype


def test_unknown_quantization_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(random_model(small_config()), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "quip"}}
    (folder / "config.json").write_text(json.dumps(config))
    result = invoke(str(folder), "--acceptance", "3", "--diffusion-tpf", "2")
    assert result.exit_code == 1
    assert "quip" in result.stderr and "w4a16" in result.stderr
    given = ["--acceptance", "3", "--diffusion-tpf", "2", "--dtype", "w4a16", "--context", "64"]
    assert invoke(str(folder), *given).exit_code == 0


@pytest.mark.parametrize("name", ["3b", "8b", "14b"])
def test_crossover_is_the_lowest_concurrency(name: str) -> None:
    setup = Setup(RELEASED[name].shape, GPUS["b200"], context=512)
    count, limit = crossover(setup, SPECULATION)
    assert count is not None and 2 < count < limit

    def gain(requests: int) -> float:
        speeds = (estimate(setup, mode, requests).tokens_per_second for mode in (AR, SPECULATION))
        ar, speculation = speeds
        return speculation / ar

    assert gain(1) > 2
    assert gain(count - 1) > 1 >= gain(count)


def test_crossovers_at_the_ends_of_the_search() -> None:
    setup = Setup(EIGHT, H100)
    assert crossover(setup, PlannedMode("self_speculation", 32, 1.0))[0] == 1
    none, limit = crossover(dataclasses.replace(setup, context=65536), SPECULATION)
    assert none is None and 1 <= limit < 10
    assert crossover(Setup(RELEASED["14b"].shape, GPUS["l4"]), SPECULATION) == (None, 0)


def test_acceptance_of_other_block_lengths() -> None:
    assert acceptance_at(11.92, 32, 32) == pytest.approx(11.92)
    assert acceptance_at(11.92, 32, 16) == pytest.approx(2 * 4.7464, rel=0.05)  # published
    assert acceptance_at(11.92, 32, 8) == pytest.approx(2 * 3.2095, rel=0.05)
    assert acceptance_at(32, 32, 8) == pytest.approx(8)
    assert acceptance_at(1, 32, 8) == pytest.approx(1)
    with pytest.raises(NLDError, match=r"--acceptance 33: allowed are 1 to 32"):
        acceptance_at(33, 32, 32)


def test_every_published_figure_can_be_predicted() -> None:
    from vllm_nld.cli.plan import against_published

    for figure in PUBLISHED:
        assert 0.3 < against_published(figure)["ratio"] < 4  # only checks the units, not the accuracy


def test_vendor_figures_at_one_request() -> None:
    """The efficiencies were set with knowledge of these, so this only guards the docs."""
    from vllm_nld.cli.plan import against_published

    stated = [figure for figure in PUBLISHED if figure.gpu in ("gb200", "b200") and "vendor, S" in figure.source]
    assert len(stated) == 3
    for figure in stated:
        assert against_published(figure)["ratio"] == pytest.approx(1, abs=0.1)


def invoke(*arguments: str) -> Any:
    return commands.invoke("plan", *arguments, env={"COLUMNS": "200"})


def test_json(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    result = invoke(
        *("8b", "--gpu", "h200", "--tp", "2,1", "--concurrency", "64,1", "--block-length", "8,32"),
        *("--acceptance", "6.82", "--json", "--plot", str(plot)),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["acceptance"], report["acceptance_source"], report["diffusion_tpf"]) == (6.82, "given", 2.57)
    assert [(row["tp"], row["concurrency"]) for row in report["estimates"]] == [(1, 1), (1, 64), (2, 1), (2, 64)]
    labels = ["ar", "self_speculation 8", "self_speculation 32", "diffusion 8", "diffusion 32"]
    for row in report["estimates"]:
        assert [mode["mode"] for mode in row["modes"]] == labels
        best = max(row["modes"], key=lambda mode: mode["tokens_per_second"])
        assert best["mode"] == row["best"]
        for mode in row["modes"]:
            total = mode["running"] * mode["tokens_per_step"] / mode["step_ms"] * 1e3
            assert mode["tokens_per_second"] == pytest.approx(total)
            assert mode["tokens_per_second_per_gpu"] == pytest.approx(total / row["tp"])
    assert {(row["tp"], row["mode"]) for row in report["crossover"]} == {
        (tp, mode) for tp in (1, 2) for mode in labels[1:3]
    }
    assert plot.stat().st_size > 5000


def test_sizes_that_do_not_fit_are_reported() -> None:
    report = json.loads(invoke("14b", "--gpu", "l4", "--tp", "1,4", "--concurrency", "1000", "--json").stdout)
    small, large = (row for row in report["memory"] if row["mode"] == "ar")
    assert not small["fits"] and small["kv_tokens"] == 0
    assert large["fits"]
    none, some = report["estimates"]
    assert none["best"] is None and all(mode["tokens_per_second"] == 0 for mode in none["modes"])
    for mode in some["modes"]:
        assert 0 < mode["running"] < 1000 and not mode["fits"]
    assert "does not fit" in invoke("14b", "--gpu", "l4").stdout


def test_tables() -> None:
    result = invoke("14b", "--published", "--concurrency", "1")
    assert result.exit_code == 0, result.output
    for words in (
        "13.51 G parameters",
        "memory per GPU",
        "self_speculation 32 (best)",
        "AR is at least as fast",
        "Uno",
    ):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["8b", "--gpu", "tpu"], ["--gpu tpu", "h100", "here"]),
        (["8b", "--tp", "3"], ["--tp 3", "1, 2, 4, 8"]),
        (["8b", "--tp", "one"], ["--tp one", "1,8,64"]),
        (["8b", "--concurrency", "0"], ["--concurrency 0"]),
        (["8b", "--dtype", "int3"], ["--dtype int3", "bfloat16"]),
        (["8b", "--dtype", "fp8", "--gpu", "a100"], ["--dtype fp8", "a100"]),
        (["8b", "--kv-dtype", "int3"], ["--kv-dtype int3", "fp8"]),
        (["8b", "--block-length", "64"], ["--block-length 64", "2 to 32"]),
        (["8b", "--acceptance", "40"], ["--acceptance 40", "1 to 32"]),
        (["8b", "--diffusion-tpf", "20"], ["--diffusion-tpf 20", "0.5 to 16"]),
        (["8b", "--context", "300000"], ["--context 300000", "262144"]),
        (["8b", "--measured", "absent.json"], ["--measured absent.json", "bench cycle --json"]),
        (["tiny", "--published"], ["--published", "3b, 8b, 14b"]),
        (["absent"], ["MODEL=absent", "no such folder", "3b, 8b, 14b"]),
        (["8b", "--gpu", "here", "--dtype", "fp8"], ["--dtype fp8", "here measures bfloat16"]),
    ],
)
def test_errors(arguments: list[str], words: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("vllm-nld: error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def test_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> str:
        raise OSError("no network\nmore lines")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    result = invoke("someone/model")
    assert result.exit_code == 1
    for words in ("MODEL=someone/model", "config.json cannot be reached (no network)", "3b, 8b, 14b"):
        assert words in result.stderr
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    assert "model_type='llama'" in invoke("someone/model").stderr


def test_checkpoint_folder_is_planned(tmp_path: Path) -> None:
    assert "no config.json" in invoke(str(tmp_path)).stderr
    NemotronLabsDiffusionConfig().save_pretrained(tmp_path)  # sizes of the 8B
    found = find_model(str(tmp_path))
    assert (found.shape, found.yields) == (EIGHT, RELEASED["8b"].yields)
    NemotronLabsDiffusionVLMConfig().save_pretrained(tmp_path)
    assert find_model(str(tmp_path)) == PlannedModel(str(tmp_path), VLM.shape, VLM.yields)
    assert VLM.shape.parameters - EIGHT.parameters == VLM.shape.image_weights + 2 * 4096
    tiny = str(checkpoint_path("tiny"))
    assert "--acceptance is needed" in invoke(tiny).stderr
    assert "--diffusion-tpf is needed" in invoke(tiny, "--acceptance", "3").stderr
    result = invoke(tiny, "--acceptance", "3", "--diffusion-tpf", "1.3")
    assert result.exit_code == 0, result.output
    assert "acceptance length 3 (given)" in result.stdout


def test_gpu_here_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "SHAPE", (256, 128))
    monkeypatch.setattr(this_machine, "BUDGET", 0.01)
    found = this_machine.find_gpu("here", "bfloat16")
    assert found.bandwidth > 1e6 and found.flops["bfloat16"] > 1e6 and 0 < found.kernel_seconds < 1e-2
    assert found.memory > 1e9
    with pytest.raises(NLDError, match=r"--tp 2: no link between GPUs is known for --gpu here"):
        Setup(EIGHT, found, tp=2)


def test_predictions_next_to_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(this_machine, "calibrate", lambda dtype: dataclasses.replace(PLAIN, memory=1e11))
    parts = {"verify forward": 800.0, "sampling": 4.0}
    row = {"model": "3b", "block": 32, "ar_step_ms": 163.0, "draft_ms": 340.0, "cycle_ms": 690.0, "parts_ms": parts}
    file = tmp_path / "cycle.json"
    file.write_text(json.dumps({"prompt_tokens": 128, "results": [row]}))
    result = invoke("3b", "--gpu", "here", "--measured", str(file), "--json")
    assert result.exit_code == 0, result.output
    step, draft, verify, cycle = json.loads(result.stdout)["measured"]
    assert [each["measured_ms"] for each in (step, draft, verify, cycle)] == [163.0, 340.0, 804.0, 690.0]
    assert cycle["predicted_ms"] == pytest.approx(draft["predicted_ms"] + verify["predicted_ms"] + 2)
    setup = Setup(RELEASED["3b"].shape, PLAIN, context=128)
    assert step["predicted_ms"] == pytest.approx(passes(setup, AR, 1)[0][2].seconds * 1e3 + 1)
    assert step["ratio"] == pytest.approx(step["predicted_ms"] / 163)
    file.write_text('{"results": [{}]}')
    assert "bench cycle --json" in invoke("3b", "--gpu", "here", "--measured", str(file)).stderr
