"""The ``vllm-nld`` command. Each sub-command imports what it needs when it runs, so ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.errors import NLDError

app = typer.Typer(
    name="vllm-nld", help="Nemotron-Labs-Diffusion in vLLM.", no_args_is_help=True, pretty_exceptions_enable=False
)
bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def _fail(error: NLDError) -> typer.Exit:
    typer.echo(f"vllm-nld: error: {error}", err=True)
    return typer.Exit(1)


@app.command()
def demo(
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to complete.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 compares token for token; bfloat16 has near-ties.")] = "float32",
    json: Json = False,
) -> None:
    """Complete held-out code with the embedded checkpoint in AR and in self-speculation, and compare."""
    from vllm_nld.cli.demo import run

    try:
        run(checkpoint_path("tiny"), prompts, max_tokens, dtype, json)
    except NLDError as error:
        raise _fail(error) from None


@app.command()
def doctor(json: Json = False) -> None:
    """Show versions, devices and the attention in use, and say what is missing. Exit code 1 if something is."""
    from vllm_nld.cli.doctor import run

    if not run(json):
        raise typer.Exit(1)


@app.command()
def path(name: Annotated[str, typer.Argument(help="Embedded checkpoint, such as tiny.")]) -> None:
    """Print the folder of an embedded checkpoint, for ``vllm serve "$(vllm-nld path tiny)"``."""
    try:
        typer.echo(checkpoint_path(name))
    except NLDError as error:
        raise _fail(error) from None


@bench.command()
def cycle(
    model: Annotated[list[str] | None, typer.Option(help="tiny or 3b (dummy weights); may be repeated.")] = None,
    block: Annotated[list[int] | None, typer.Option(min=2, help="Block lengths; may be repeated.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the cached prefix.")] = 128,
    steps: Annotated[int, typer.Option(min=3, help="Timed steps per measurement.")] = 20,
    json: Json = False,
) -> None:
    """Cost of one draft + verify cycle in AR steps, against what this machine's GEMM and memory reach."""
    from vllm_nld.cli.bench_cycle import run

    try:
        run(model or ["tiny", "3b"], block or [], prompt_tokens, steps, json)
    except NLDError as error:
        raise _fail(error) from None


@bench.command()
def modes(
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to complete.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 compares token for token; bfloat16 has near-ties.")] = "float32",
    sol: Annotated[bool, typer.Option(help="Add the speed of light (minutes).")] = True,
    json: Json = False,
) -> None:
    """TPF, acceptance, agreement with AR and speed of every mode on held-out text."""
    from vllm_nld.cli.bench_modes import run

    try:
        run(prompts, max_tokens, dtype, sol, json)
    except NLDError as error:
        raise _fail(error) from None


@bench.command()
def auto(
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Requests in flight; may be repeated.")] = None,
    workload: Annotated[list[str] | None, typer.Option(help="code, random or mix; may be repeated.")] = None,
    turns: Annotated[int, typer.Option(min=2, help="Turns of half a second per engine.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=8, help="Tokens to generate per request.")] = 96,
    dtype: Annotated[str, typer.Option(help="Of the embedded checkpoint.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Auto mode against plain AR and always-on self-speculation, over concurrency."""
    from vllm_nld.cli.bench_auto import run

    try:
        run(concurrency or [1, 2, 4, 8, 16, 32], workload or ["code", "mix"], turns, max_tokens, dtype, json)
    except NLDError as error:
        raise _fail(error) from None


@app.command()
def sol(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or tiny.")],
    prompts: Annotated[Path | None, typer.Option(help="One prompt per line, or .jsonl with a key prompt.")] = None,
    held_out: Annotated[int, typer.Option(min=1, help="Without --prompts: held-out prompts to take.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 128,
    block_length: Annotated[list[int] | None, typer.Option(min=2, help="May be repeated.")] = None,
    budget: Annotated[int, typer.Option(min=1, help="Forwards the analysis may take per prompt.")] = 5000,
    device: Annotated[str, typer.Option(help="PyTorch device of the dense model.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart here (needs matplotlib).")] = None,
    json: Json = False,
) -> None:
    """Tokens per forward that a perfect sampler would reach, beside those of the real modes."""
    from vllm_nld.cli.sol import run

    try:
        run(model, prompts, held_out, max_tokens, block_length or [8, 16, 32], budget, device, json, plot)
    except NLDError as error:
        raise _fail(error) from None


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Hugging Face id, or 3b, 8b, 14b, tiny.")],
    gpu: Annotated[str, typer.Option(help="h100, b200, ... or here: this machine, measured now.")] = "h100",
    tp: Annotated[str, typer.Option(help="GPUs that share each layer, such as 1,2,4,8.")] = "1",
    concurrency: Annotated[str, typer.Option(help="Requests at once, such as 1,8,64.")] = "1,8,64",
    block_length: Annotated[str | None, typer.Option(help="Such as 8,16,32. Default: the checkpoint's.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Cached tokens per request.")] = 2048,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16, float32, fp8.")] = "bfloat16",
    kv_dtype: Annotated[str | None, typer.Option(help="Of keys and values. Default: as the activations.")] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="Acceptance length at the checkpoint's block length. Default: published.")
    ] = None,
    diffusion_tpf: Annotated[
        float | None, typer.Option(help="Block diffusion's tokens per forward. Default: published.")
    ] = None,
    published: Annotated[bool, typer.Option(help="Add the model's published figures, beside predictions.")] = False,
    measured: Annotated[
        Path | None, typer.Option(help="Add a file of bench cycle --json, beside predictions; with --gpu here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot tokens/s per GPU here (needs matplotlib).")] = None,
    json: Json = False,
) -> None:
    """Memory and speed by mode and concurrency, on GPUs that need not be there, by a cost model."""
    from vllm_nld.cli.plan import Options, run

    options = Options(
        model, gpu, tp, concurrency, block_length, context, dtype, kv_dtype, acceptance, diffusion_tpf
    )  # fmt: skip
    try:
        run(options, published, measured, json, plot)
    except NLDError as error:
        raise _fail(error) from None
