"""``vllm-nld sol``: tokens per forward of a perfect sampler, next to those of the real modes on the same prompts."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vllm_nld.checkpoints import named_or_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.cli.console import report_console
from vllm_nld.cli.limits import check_device, check_writable
from vllm_nld.cli.plot import file_pyplot
from vllm_nld.errors import NLDError

if TYPE_CHECKING:
    from vllm_nld.reference import ReferenceModel

CONVENTION = "tokens per decode forward: every draft, verify, denoising and commit forward counts, the prefill does not"

PAPER = "acceptance"
"""The definition of "safe" that is drawn; a table has them all."""


def run(
    model: str,
    prompts: Path | None,
    held_out: int,
    max_tokens: int,
    block_lengths: Sequence[int],
    budget: int,
    device: str,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Analyze and print a table or one JSON object.

    Raises:
        NLDError: a file is missing or empty, or the checkpoint cannot be read.
    """
    folder = named_or_path(model)
    if not (folder / "config.json").is_file():
        raise NLDError(f"MODEL={model}: no config.json there; allowed: a checkpoint folder, tiny or smollm2")
    check_device(device)
    if plot is not None:
        check_writable("--plot", plot)
    texts = read_prompts(prompts) if prompts else [text for _, text in held_out_prompts(held_out)]
    loaded, ids = load(folder, texts, device)
    report = {
        "model": model,
        "prompts": len(texts),
        "max_tokens": max_tokens,
        "budget": budget,
        "tpf_convention": CONVENTION,
        "speed_of_light": speed_of_light(loaded, ids, max_tokens, block_lengths, budget),
        "modes": real_modes(loaded, ids, max_tokens),
    }
    if plot is not None:
        draw(report, plot)
    if as_json:
        print(json.dumps(report))
    else:
        _show(report)


def read_prompts(path: Path) -> list[str]:
    """Return a file's prompts: one per line, or of a ``.jsonl`` file each line's ``prompt``.

    Raises:
        NLDError: the file cannot be read, holds no prompt, or a line has the wrong form.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise NLDError(f"--prompts {path}: {error}; allowed: a text file with one prompt per line") from None
    if path.suffix == ".jsonl":
        try:
            lines = [str(json.loads(line)["prompt"]) for line in lines]
        except (ValueError, KeyError, TypeError):
            raise NLDError(f'--prompts {path}: every line must be an object such as {{"prompt": "..."}}') from None
    if not lines:
        raise NLDError(f"--prompts {path}: the file is empty; allowed: a text file with one prompt per line")
    return lines


def load(folder: Path, texts: list[str], device: str = "cpu") -> tuple[ReferenceModel, list[list[int]]]:
    """Return the model of a checkpoint, and the token ids of each text."""
    from tokenizers import Tokenizer

    from vllm_nld.reference import load_reference

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return load_reference(folder).to(device), [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def speed_of_light(
    model: ReferenceModel,
    prompts: list[list[int]],
    max_tokens: int,
    block_lengths: Sequence[int],
    budget: int = 5000,
) -> list[dict[str, Any]]:
    """Return one row per block length and definition of what is safe to commit."""
    from vllm_nld.reference.speed_of_light import Safety, SpeedOfLight, analyse

    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        for length, safety in itertools.product(block_lengths, Safety):
            task = progress.add_task(f"block length {length}, {safety}", total=max_tokens * len(prompts))
            total = SpeedOfLight()
            for ids in prompts:
                advance = functools.partial(progress.advance, task)
                total.add(analyse(model, ids, max_tokens, length, budget, advance, safety))
            rows.append(
                {
                    "block_length": length,
                    "safe": safety.value,
                    "tpf": round(total.tpf, 3),
                    "tpf_denoising": round(total.tpf_denoising, 3),
                    "tokens": total.tokens,
                    "denoising_forwards": total.denoising,
                    "serial_forwards": total.serial,
                    "simulated_forwards": total.simulated,
                    "incomplete_blocks": total.incomplete,
                    "given_tokens": total.given,
                }
            )
    return rows


def real_modes(model: ReferenceModel, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Return TPF (and acceptance length) of the modes, from the reference, at the checkpoint's block length."""
    from vllm_nld.reference import generate, linear_spec_generate

    spec = [linear_spec_generate(model, ids, max_tokens, eos_token_id=-1) for ids in prompts]
    tokens = max_tokens * len(prompts)
    cycles = [count for result in spec for count in result.accepted]
    rows: list[dict[str, Any]] = [{"mode": "AR", "tpf": 1.0}]
    rows.append(
        {
            "mode": "self-speculation",
            "tpf": round(tokens / sum(result.nfe - 1 for result in spec), 3),
            "acceptance_length": round(sum(cycles) / len(cycles), 3),
        }
    )
    for threshold in (0.9, 0.7):
        nfe = sum(generate(model, ids, max_tokens, threshold=threshold, eos_token_id=-1).nfe for ids in prompts)
        rows.append({"mode": f"diffusion {threshold}", "tpf": round(tokens / nfe, 3)})
    return rows


def draw(report: dict[str, Any], path: Path) -> None:
    """Plot TPF as bars.

    Raises:
        NLDError: matplotlib is not installed.
    """
    pyplot = file_pyplot()
    names = [row["mode"] for row in report["modes"]]
    of_paper = [row for row in report["speed_of_light"] if row["safe"] == PAPER]
    names += [f"speed of light\nblock {row['block_length']}" for row in of_paper]
    values = [row["tpf"] for row in (*report["modes"], *of_paper)]
    figure, axes = pyplot.subplots(figsize=(8, 4))
    bars = axes.bar(names, values, color=["tab:blue"] * len(report["modes"]) + ["tab:orange"] * len(of_paper))
    axes.bar_label(bars, fmt="%.2f")
    axes.set_ylabel("tokens per forward")
    axes.set_title(f"{report['model']}, {report['prompts']} prompts x {report['max_tokens']} tokens")
    axes.tick_params(axis="x", labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _show(report: dict[str, Any]) -> None:
    table = Table("", "TPF", "without commits", "serial / oracle forwards", "acceptance length")
    for row in report["modes"]:
        length = row.get("acceptance_length")
        table.add_row(row["mode"], f"{row['tpf']:.2f}", "", "", "" if length is None else f"{length:.2f}")
    for row in report["speed_of_light"]:
        name = f"speed of light, block {row['block_length']}, safe: {row['safe']}"
        name += f" ({row['incomplete_blocks']} blocks over budget)" if row["incomplete_blocks"] else ""
        name += f" ({row['given_tokens']} tokens given)" if row["given_tokens"] else ""
        forwards = f"{row['serial_forwards']} / {row['denoising_forwards']}"
        table.add_row(name, f"{row['tpf']:.2f}", f"{row['tpf_denoising']:.2f}", forwards, "")
    console = report_console()
    console.print(table)
    console.print(f"TPF: {report['tpf_convention']}; {report['prompts']} prompts x {report['max_tokens']} tokens")
