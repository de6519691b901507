"""``vllm-nld bench tasks``: every mode on prompts by category, next to plain vLLM and vLLM's own ``ngram``.

Engines run one after another, AR first, because all texts are compared with its texts. With the lowest concurrency
each category runs by itself; with the others all prompts are mixed. Results are shown, and written, as they come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vllm_nld.checkpoints import named_or_path
from vllm_nld.cli.bench_tasks.figures import ALL, Figures, rows_of
from vllm_nld.cli.bench_tasks.measure import Encoded, complete, encoded, figures, measured_by
from vllm_nld.cli.bench_tasks.prompts import chosen, from_file, from_packages, own_completions, own_questions
from vllm_nld.cli.bench_tasks.published import ACCEPTANCE_LENGTH, SOURCE
from vllm_nld.cli.bench_tasks.ways import AR, Way, all_ways
from vllm_nld.cli.engine import engine_with, prepare_environment, stdout_to_stderr
from vllm_nld.cli.limits import DTYPES, MODEL_LENGTH, check_writable, one_of, within
from vllm_nld.cli.plot import file_pyplot

CONVENTION = "tokens per decode forward (AR, draft, verify, denoise and commit all count); the prefill is left out"


@dataclass(frozen=True)
class Options:
    """What the command's options say.

    Attributes:
        model: name, folder or Hugging Face id.
        file: of prompts, instead of those of packages and of this project.
        categories: to run; all where empty.
        prompts: of each category, at most.
        ways: to run besides AR; all where empty.
        thresholds: of diffusion.
        concurrency: requests in flight; categories are told apart with the lowest.
        max_tokens: of each answer, at most.
        dtype: of the weights.
        draft_lora: another adapter than the checkpoint's, or ``off``.
    """

    model: str = "tiny"
    file: Path | None = None
    categories: Sequence[str] = ()
    prompts: int = 4
    ways: Sequence[str] = ()
    thresholds: Sequence[float] = (0.5, 0.7, 0.9)
    concurrency: Sequence[int] = (1,)
    max_tokens: int = 128
    dtype: str = "float32"
    draft_lora: str | None = None


def run(options: Options, output: Path | None, plot: Path | None, as_json: bool) -> None:
    """Measure; show each result as it comes, then a table or one JSON object.

    Args:
        options: what to measure.
        output: file that has all results so far, at any time.
        plot: picture to write at the end.
        as_json: print one JSON object instead of the table.

    Raises:
        NLDError: an option is out of range, or the prompts are too long for the model.
    """
    one_of("--dtype", options.dtype, DTYPES)
    for option, path in (("--output", output), ("--plot", plot)):
        if path is not None:
            check_writable(option, path)
    ways = _chosen_ways(options)
    if plot is not None:
        file_pyplot()
    prompts = chosen(_prompts(options), options.categories, options.prompts)
    prepare_environment()
    report = _report(options, {name: len(own) for name, own in prompts.items()})
    with stdout_to_stderr():
        tasks = {name: encoded(_tokenizer(options.model), own) for name, own in prompts.items()}
        measured: list[Figures] = []
        for figure in measure(options, ways, tasks):
            measured.append(figure)
            report["results"] = rows_of(measured, AR)
            if output is not None:
                output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        from vllm_nld.cli.bench_tasks.plots import draw

        draw(report, plot)
    if as_json:
        print(json.dumps(report))
    else:
        show(report)


def _chosen_ways(options: Options) -> dict[str, Way]:
    ways = all_ways(options.thresholds)
    for name in options.ways:
        one_of("--way", name, tuple(ways))
    # AR always runs, because texts and speeds are compared with it; the others in the order of the table.
    return {name: way for name, way in ways.items() if name == AR or not options.ways or name in options.ways}


def _prompts(options: Options) -> list[Any]:
    if options.file is not None:
        return from_file(options.file)
    return own_completions() + (from_packages() or own_questions())


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(named_or_path(model)))


def _report(options: Options, prompts: dict[str, int]) -> dict[str, Any]:
    settings = asdict(options) | {"file": options.file and options.file.name}
    published = {name: ACCEPTANCE_LENGTH[name] for name in prompts if name in ACCEPTANCE_LENGTH}
    return {
        "settings": settings,
        "prompts_by_category": prompts,
        "tpf_convention": CONVENTION,
        "published": {"source": SOURCE, "acceptance_length_without_and_with_adapter": published},
        "results": [],
    }


@dataclass
class Pool:
    """Prompts that run together.

    Attributes:
        category: their name.
        clients: requests in flight.
        prompts: what is asked.
        expected: AR's answers, once it has run.
    """

    category: str
    clients: int
    prompts: list[Encoded]
    expected: list[list[int]] = field(default_factory=list)


def pools(tasks: dict[str, list[Encoded]], concurrency: Sequence[int]) -> list[Pool]:
    """Return each category with the lowest concurrency, and all prompts with the others, as often as fills those."""
    lowest, *others = sorted(set(concurrency))
    found = [Pool(name, lowest, own) for name, own in tasks.items()]
    mixed = [prompt for own in tasks.values() for prompt in own]
    return found + [Pool(ALL, clients, mixed * -(-clients // len(mixed))) for clients in others]


def measure(options: Options, ways: dict[str, Way], tasks: dict[str, list[Encoded]]) -> Iterator[Figures]:
    """Yield what each way did in each pool, AR first, with progress on standard error."""
    todo = pools(tasks, options.concurrency)
    columns = (
        "{task.description}",
        MofNCompleteColumn(),
        "requests",
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(),
    )
    total = len(ways) * sum(len(pool.prompts) for pool in todo)
    with Progress(*(TextColumn(c) if isinstance(c, str) else c for c in columns), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total)
        for together in _by_engine(ways):
            bar.update(task, description="starting an engine")
            with _engine(options, next(iter(together.values())), todo) as llm:
                for name, way in together.items():
                    _warm_up(llm, way, todo)
                    for pool in todo:
                        bar.update(task, description=f"{name}, {pool.category} x {pool.clients}")
                        found = _measure_one(llm, name, way, pool, options.max_tokens, lambda: bar.advance(task))
                        bar.console.print(line(found), markup=False, highlight=False, soft_wrap=True)
                        yield found


def _by_engine(ways: dict[str, Way]) -> Iterator[dict[str, Way]]:
    left = dict(ways)
    while left:
        settings = next(iter(left.values())).settings
        together = {name: way for name, way in left.items() if way.settings == settings}
        left = {name: way for name, way in left.items() if name not in together}
        yield together


def _engine(options: Options, way: Way, todo: list[Pool]) -> Any:
    import torch

    from vllm_nld.planning.models import find_model

    folder = str(named_or_path(options.model))
    longest = max(len(prompt.ids) for pool in todo for prompt in pool.prompts)
    limit = find_model(folder).shape.max_positions
    why = f"the model has {limit} positions, of which the longest prompt takes {longest}"
    within("--max-tokens", options.max_tokens, 1, limit - longest, why)
    adapter = {"draft_lora": options.draft_lora} if options.draft_lora and way.nld else {}
    return engine_with(
        model=folder,
        dtype=options.dtype,
        max_num_seqs=max(options.concurrency),
        max_model_len=min(limit, max(MODEL_LENGTH, longest + options.max_tokens)),
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
        enforce_eager=not torch.cuda.is_available(),
        **({"additional_config": {"nld": adapter}} if adapter else {}),
        **way.settings,
    )


def _warm_up(llm: Any, way: Way, todo: list[Pool]) -> None:
    most = max(todo, key=lambda pool: pool.clients)
    complete(llm, [prompt.ids for prompt in most.prompts[: most.clients]], way.nld, most.clients, 16)


def _measure_one(llm: Any, name: str, way: Way, pool: Pool, max_tokens: int, done: Any) -> Figures:
    ids = [prompt.ids for prompt in pool.prompts]
    answers, spent = measured_by(llm, way.nld, lambda: complete(llm, ids, way.nld, pool.clients, max_tokens, done))
    pool.expected = pool.expected or answers.ids
    decode = llm.get_tokenizer().decode
    return figures(name, pool.category, pool.clients, pool.prompts, answers, spent, pool.expected, decode)


def line(found: Figures) -> str:
    """Return a result as it is printed when it comes."""
    row = found.row(None)
    parts = [f"TPF {row['tpf'] or 0:.2f}"]
    parts += [f"acceptance length {row['acceptance_length']:.2f}"] if row["acceptance_length"] else []
    parts += [f"{row['same_text']} of {row['requests']} texts as AR's", f"{row['tokens_per_s']:.1f} tokens/s"]
    return f"{found.way}, {found.category} x {found.concurrency}: " + ", ".join(parts)


def show(report: dict[str, Any]) -> None:
    """Print a table for each category, and for all of them by concurrency."""
    console = Console()
    published = report["published"]["acceptance_length_without_and_with_adapter"]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in report["results"]:
        groups.setdefault((row["concurrency"], row["category"]), []).append(row)
    for (clients, category), rows in sorted(groups.items(), key=lambda group: group[0][0]):
        title = f"{category}, {clients} at once, {rows[0]['requests']} requests"
        if category in published:
            title += " (8B of the paper: acceptance length {} without, {} with the adapter)".format(
                *published[category]
            )
        table = Table(
            "way", "TPF", "acceptance\nlength", "agree-\nment", "right", "tokens/s", "speed-\nup",
            title=title, title_justify="left",
        )  # fmt: skip
        for row in rows:
            table.add_row(row["way"], *_cells(row))
        console.print(table)
    if published:
        console.print(report["published"]["source"])
    console.print(f"TPF: {CONVENTION}")
    console.print("agreement: share of AR's text before the first token that differs")


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    forms = {"tpf": ".2f", "acceptance_length": ".2f", "agreement": ".0%", "accuracy": ".0%", "tokens_per_s": ".1f"}
    return [cell(row[name], form) for name, form in (forms | {"speed_up": ".2f"}).items()]
