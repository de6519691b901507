"""``vllm-nld plan``: memory and speed of a model on GPUs, by mode and concurrency; needs none of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_nld.cli.console import report_console
from vllm_nld.cli.engine import prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import check_writable, within
from vllm_nld.cli.plot import file_pyplot
from vllm_nld.errors import NLDError, shown_key
from vllm_nld.planning.cost_model import AR, PlannedMode, Setup, acceptance_at, crossover, estimate, memory, passes
from vllm_nld.planning.gpus import HERE, Gpu
from vllm_nld.planning.models import PUBLISHED, PlannedModel, Published, find_model
from vllm_nld.planning.this_machine import find_gpu
from vllm_nld.planning.weight_formats import FORMATS, weight_format

PLOT_STYLES = ("-", "--", ":", "-.")
MANY = 1_000_000
"""Most GPUs, requests or tokens that a list may name."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's options, as given."""

    model: str
    gpu: str
    tp: str
    concurrency: str
    block_length: str | None
    context: int
    dtype: str | None
    kv_dtype: str | None
    acceptance: float | None
    diffusion_tpf: float | None


def run(options: Options, published: bool, measured: Path | None, as_json: bool, plot: Path | None) -> None:
    """Plan and print tables or one JSON object.

    Raises:
        NLDError: an option's value does not exist; it is named.
    """
    if plot is not None:
        check_writable("--plot", plot)
    model = find_model(options.model)
    dtype = options.dtype or weight_format(model.quantization)
    if options.gpu == HERE:
        prepare_environment()
    with stdout_to_stderr():
        gpu = find_gpu(options.gpu, FORMATS[dtype].units if dtype in FORMATS else dtype)
    report = plan(model, gpu, dtype, options)
    if published:
        report["published"] = [against_published(figure) for figure in PUBLISHED if figure.model == options.model]
        if not report["published"]:
            raise NLDError(f"--published with MODEL={options.model}: figures are known for 3b, 8b, 14b")
    if measured is not None:
        report["measured"] = against_measured(measured, gpu)
    if plot is not None:
        draw(report, plot)
    if as_json:
        print(json.dumps(report))
    else:
        show(report)


def numbers(option: str, text: str, least: int) -> list[int]:
    """Return the numbers of a comma-separated list, sorted, without repetition.

    Raises:
        NLDError: one is not a number, too small or too large.
    """
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise NLDError(
            f"{option} {shown_key(text)}: allowed are whole numbers separated by commas, such as 1,8,64"
        ) from None
    within(option, found[0], least, MANY, "each")
    within(option, found[-1], least, MANY, "each")
    return found


def plan(model: PlannedModel, gpu: Gpu, dtype: str, options: Options) -> dict[str, Any]:
    """Return the report: assumptions, memory, estimates and crossovers."""
    shape = model.shape
    wide = FORMATS[dtype].wide if dtype in FORMATS else "bfloat16"
    first = Setup(shape, gpu, 1, dtype, options.kv_dtype or wide, options.context)
    setups = [first.on(tp) for tp in numbers("--tp", options.tp, 1)]
    concurrencies = numbers("--concurrency", options.concurrency, 1)
    blocks = numbers("--block-length", options.block_length or str(shape.block_size), 2)
    acceptance, acceptance_source = _yield(options.acceptance, model, "acceptance")
    tpf, tpf_source = _yield(options.diffusion_tpf, model, "diffusion_tpf")
    if blocks[-1] > shape.block_size:
        raise NLDError(f"--block-length {blocks[-1]}: allowed are 2 to {shape.block_size}, the checkpoint's")
    if not 0.5 <= tpf <= shape.block_size / 2:
        raise NLDError(f"--diffusion-tpf {tpf}: allowed are 0.5 to {shape.block_size / 2} (one denoising, one commit)")
    speculations = [PlannedMode("self_speculation", b, acceptance_at(acceptance, shape.block_size, b)) for b in blocks]
    modes = [AR, *speculations, *(PlannedMode("diffusion", block, min(tpf, block / 2)) for block in blocks)]
    return {
        "model": model.name,
        "parameters": shape.parameters,
        "gpu": dataclasses.asdict(gpu),
        "dtype": dtype,
        "kv_dtype": first.kv_dtype,
        "context": options.context,
        "acceptance": acceptance,
        "acceptance_source": acceptance_source,
        "diffusion_tpf": tpf,
        "diffusion_source": tpf_source,
        "memory": [_memory(setup, mode, concurrencies[-1]) for setup in setups for mode in modes],
        "estimates": [_estimates(setup, modes, count) for setup in setups for count in concurrencies],
        "crossover": [_crossover(setup, mode) for setup in setups for mode in speculations],
    }


def _yield(given: float | None, model: PlannedModel, name: str) -> tuple[float, str]:
    """Return a yield and its source: from the option, or published."""
    if given is not None:
        return given, "given"
    if model.yields is None:
        raise NLDError(f"--{name.replace('_', '-')} is needed: none is published for MODEL={model.name}")
    source = "acceptance_source" if name == "acceptance" else "diffusion_source"
    return getattr(model.yields, name), getattr(model.yields, source)


def _memory(setup: Setup, mode: PlannedMode, concurrency: int) -> dict[str, Any]:
    found = memory(setup, mode, concurrency)
    return {"tp": setup.tp, "mode": mode.label, **dataclasses.asdict(found), "fits": found.fits}


def _estimates(setup: Setup, modes: Sequence[PlannedMode], concurrency: int) -> dict[str, Any]:
    """Return one concurrency's row: every mode, and the best one."""
    found = [estimate(setup, mode, concurrency) for mode in modes]
    best = max(found, key=lambda each: each.tokens_per_second)
    return {
        "tp": setup.tp,
        "concurrency": concurrency,
        "best": best.mode.label if best.running else None,
        "modes": [
            {
                "mode": each.mode.label,
                "running": each.running,
                "fits": each.running == concurrency,
                "step_ms": each.step_seconds * 1e3,
                "tokens_per_step": each.tokens_per_step,
                "tokens_per_second_per_request": each.tokens_per_request if each.running else 0.0,
                "tokens_per_second": each.tokens_per_second,
                "tokens_per_second_per_gpu": each.tokens_per_gpu,
                "longest": each.longest,
            }
            for each in found
        ],
    }


def _crossover(setup: Setup, mode: PlannedMode) -> dict[str, Any]:
    concurrency, limit = crossover(setup, mode)
    return {"tp": setup.tp, "mode": mode.label, "acceptance": mode.yields, "concurrency": concurrency, "up_to": limit}


def against_published(figure: Published) -> dict[str, Any]:
    """Return a published figure next to the cost model's prediction."""
    shape = find_model(figure.model).shape
    setup = Setup(shape, find_gpu(figure.gpu, figure.dtype), 1, figure.dtype, context=figure.context)
    mode = PlannedMode(figure.mode, figure.block, figure.yields or 1.0)
    found = estimate(setup, mode, figure.concurrency)
    predicted = {
        "forward ms": passes(setup, mode, figure.concurrency)[-1][2].seconds * 1e3,
        "tokens/s": found.tokens_per_request,
        "total tokens/s": found.tokens_per_second,
    }[figure.quantity]
    row = dataclasses.asdict(figure) | {"mode": mode.label, "predicted": predicted}
    return row | {"ratio": predicted / figure.value}


def against_measured(path: Path, gpu: Gpu) -> list[dict[str, Any]]:
    """Return the times of a ``vllm-nld bench cycle --json`` file next to predicted ones, in milliseconds.

    Raises:
        NLDError: the file is not such a report.
    """
    try:
        bench = json.loads(path.read_text(encoding="utf-8"))
        return [line for row in bench["results"] for line in _cycle(row, bench["prompt_tokens"], gpu)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, NLDError):
            raise
        raise NLDError(f"--measured {path}: not the output of vllm-nld bench cycle --json ({error!r})") from None


def _cycle(row: dict[str, Any], context: int, gpu: Gpu) -> list[dict[str, Any]]:
    setup = Setup(find_model(row["model"]).shape, gpu, context=context)
    mode, host = PlannedMode("self_speculation", row["block"]), gpu.host_seconds
    ((_, _, step),) = passes(setup, AR, 1)
    (_, _, draft), (_, _, verify) = passes(setup, mode, 1)
    parts = row["parts_ms"]
    pairs = {
        "AR step": (step.seconds + host, row["ar_step_ms"]),
        "draft": (draft.seconds, row["draft_ms"]),
        "verify": (verify.seconds, parts["verify forward"] + parts["sampling"]),
        "cycle": (draft.seconds + verify.seconds + 2 * host, row["cycle_ms"]),
    }
    return [
        {"model": row["model"], "block": row["block"], "quantity": name, "predicted_ms": seconds * 1e3,
         "measured_ms": milliseconds, "ratio": seconds * 1e3 / milliseconds}
        for name, (seconds, milliseconds) in pairs.items()
    ]  # fmt: skip


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot tokens/s per GPU against concurrency: a panel per ``--tp``, a line per mode, only where all requests fit.

    Raises:
        NLDError: matplotlib is not installed.
    """
    pyplot = file_pyplot()
    degrees = sorted({row["tp"] for row in report["estimates"]})
    labels = [mode["mode"] for mode in report["estimates"][0]["modes"]]
    colours = {"ar": "black", "self_speculation": "tab:blue", "diffusion": "tab:orange"}
    styles = {kind: iter(PLOT_STYLES * len(labels)) for kind in colours}
    looks = {label: (colours[label.split()[0]], next(styles[label.split()[0]])) for label in labels}
    figure, panels = pyplot.subplots(1, len(degrees), figsize=(1 + 4.5 * len(degrees), 4.5), sharey=True, squeeze=False)
    for axes, tp in zip(panels[0], degrees, strict=True):
        rows = [row for row in report["estimates"] if row["tp"] == tp]
        for index, label in enumerate(labels):
            points = [(row["concurrency"], row["modes"][index]) for row in rows if row["modes"][index]["fits"]]
            speeds = [mode["tokens_per_second_per_gpu"] for _, mode in points]
            colour, style = looks[label]
            axes.plot([count for count, _ in points], speeds, color=colour, linestyle=style, marker=".", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([row["concurrency"] for row in rows], [str(row["concurrency"]) for row in rows])
        axes.minorticks_off()
        axes.set_xlabel("concurrency")
        axes.set_title(f"TP {tp}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens/s per GPU (estimate)")
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(f"{report['model']} on {report['gpu']['name']}, {report['dtype']}, context {report['context']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    console = report_console()
    gpu = report["gpu"]
    console.print(f"{report['model']}: {report['parameters'] / 1e9:.2f} G parameters in {report['dtype']}, KV in "
                  f"{report['kv_dtype']}; {report['context']} cached tokens a request")  # fmt: skip
    console.print(f"{gpu['name']}: {gpu['memory'] / 1e9:.0f} GB, {gpu['bandwidth'] / 1e9:.0f} GB/s, "
                  f"{gpu['flops'][FORMATS[report['dtype']].units] / 1e12:.3g} TFLOP/s")  # fmt: skip
    console.print(f"acceptance length {report['acceptance']:g} ({report['acceptance_source']}); "
                  f"diffusion {report['diffusion_tpf']:g} tokens a forward ({report['diffusion_source']})")  # fmt: skip
    console.print(_memory_table(report))
    console.print(_estimate_table(report))
    for row in report["crossover"]:
        where = "nowhere" if row["concurrency"] is None else f"from concurrency {row['concurrency']}"
        console.print(f"TP {row['tp']}, {row['mode']} (acceptance {row['acceptance']:.2f}): AR is at least "
                      f"as fast {where} (searched to {row['up_to']})")  # fmt: skip
    if "published" in report:
        console.print(_published_table(report["published"]))
    if "measured" in report:
        table = Table("model", "block", "", "predicted ms", "measured ms", "ratio")
        for row in report["measured"]:
            table.add_row(row["model"], str(row["block"]), row["quantity"], f"{row['predicted_ms']:.2f}",
                          f"{row['measured_ms']:.2f}", f"{row['ratio']:.2f}")  # fmt: skip
        console.print(table)
    console.print("estimates of decoding only, from a model; docs/research/scaling.md has its assumptions and errors")


def _memory_table(report: dict[str, Any]) -> Table:
    table = Table("TP", "mode", "weights GB", "other GB", "blocks GB", "KV bytes/token", "KV tokens", "requests",
                  title="memory per GPU")  # fmt: skip
    for row in report["memory"]:
        other = (row["activations"] + row["reserved"]) / 1e9
        table.add_row(str(row["tp"]), row["mode"], f"{row['weights'] / 1e9:.2f}", f"{other:.2f}",
                      f"{row['blocks'] / 1e9:.2f}", str(row["kv_bytes_per_token"]), str(row["kv_tokens"]),
                      str(row["requests"]) if row["fits"] else "does not fit")  # fmt: skip
    return table


def _estimate_table(report: dict[str, Any]) -> Table:
    table = Table("TP", "concurrency", "mode", "running", "step ms", "tokens/step", "tokens/s each", "tokens/s",
                  "tokens/s per GPU", "longest part", title="speed")  # fmt: skip
    for row in report["estimates"]:
        for mode in row["modes"]:
            best = " (best)" if mode["mode"] == row["best"] else ""
            shown = (f"{mode['step_ms']:.2f}", f"{mode['tokens_per_step']:.2f}",
                     f"{mode['tokens_per_second_per_request']:.0f}", f"{mode['tokens_per_second']:.0f}",
                     f"{mode['tokens_per_second_per_gpu']:.0f}", mode["longest"])  # fmt: skip
            table.add_row(str(row["tp"]), str(row["concurrency"]), mode["mode"] + best, str(mode["running"]),
                          *(shown if mode["running"] else ("does not fit",)))  # fmt: skip
    return table


def _published_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("GPU", "mode", "concurrency", "acceptance", "", "predicted", "published", "ratio", "source")
    for row in rows:
        table.add_row(row["gpu"], row["mode"], str(row["concurrency"]), f"{row['yields']:.2f}" if row["yields"] else "",
                      row["quantity"], f"{row['predicted']:.4g}", f"{row['value']:g}", f"{row['ratio']:.2f}",
                      row["source"] + (f" ({row['dtype']})" if row["dtype"] != "bfloat16" else ""))  # fmt: skip
    return table
