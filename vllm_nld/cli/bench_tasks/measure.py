"""Run prompts through an engine with so many requests in flight, and count what that took and yielded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_nld.cli.bench_tasks.figures import Figures, agreeing_share, is_right
from vllm_nld.cli.bench_tasks.prompts import TaskPrompt
from vllm_nld.serving.ledger import Tally

DRAFTS = "vllm:spec_decode_num_drafts"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class Encoded:
    """A prompt, and its tokens with the model's chat template."""

    prompt: TaskPrompt
    ids: list[int]


@dataclass
class Answers:
    """What came back, in the prompts' order.

    Attributes:
        ids: token ids of each answer.
        seconds: from each request's start to its end.
        forwards: outputs with new tokens of each request, which are its decode forwards and its prefill.
    """

    ids: list[list[int]]
    seconds: list[float] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)


def encoded(tokenizer: Any, prompts: Sequence[TaskPrompt]) -> list[Encoded]:
    """Return the prompts' tokens; a model without a chat template gets the bare text."""
    found = []
    for prompt in prompts:
        text, chat = prompt.text, prompt.chat and bool(tokenizer.chat_template)
        if chat:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found.append(Encoded(prompt, tokenizer.encode(text, add_special_tokens=not chat)))
    return found


def complete(
    llm: Any,
    prompts: Sequence[list[int]],
    nld: dict[str, Any] | None,
    clients: int,
    max_tokens: int,
    done: Callable[[], None] = lambda: None,
) -> Answers:
    """Return the greedy answers; a new request begins when one ends, so that ``clients`` are in flight.

    Args:
        llm: the engine, in this process.
        prompts: token ids.
        nld: every request's options.
        clients: requests in flight.
        max_tokens: of each answer, at most.
        done: called when a request ends.
    """
    from vllm import SamplingParams

    options = {"extra_args": {"nld": nld}} if nld else {}
    params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, **options)
    core, running, number = llm.llm_engine, 0, 0
    answers = Answers([[] for _ in prompts], [0.0] * len(prompts), [0] * len(prompts))
    places: dict[str, int] = {}
    while number < len(prompts) or running:
        while running < clients and number < len(prompts):
            name = f"{os.urandom(8).hex()}-{number}"
            core.add_request(name, {"prompt_token_ids": prompts[number]}, params)
            places[name], answers.seconds[number] = number, -time.perf_counter()
            number, running = number + 1, running + 1
        for output in core.step():
            place = places[output.request_id]
            ids = list(output.outputs[0].token_ids)
            answers.forwards[place] += len(ids) > len(answers.ids[place])
            answers.ids[place] = ids
            if output.finished:
                answers.seconds[place] += time.perf_counter()
                running -= 1
                done()
    return answers


@dataclass(frozen=True)
class Spent:
    """What an engine did between two readings of its counters.

    Attributes:
        drafts: proposals that were verified.
        accepted: drafts accepted, by position.
        forwards: decode forwards of each request, summed; None where the engine does not count them.
        seconds: on the clock.
        cpu_seconds: of all threads of this process.
    """

    drafts: int
    accepted: tuple[int, ...]
    forwards: int | None
    seconds: float
    cpu_seconds: float


def measured_by(llm: Any, nld: dict[str, Any] | None, work: Callable[[], Answers]) -> tuple[Answers, Spent]:
    """Do some work, and return its result and what the engine's counters say about it.

    Args:
        llm: the engine, in this process.
        nld: the requests' options; with them, this extension's workers count forwards.
        work: what to do.
    """

    def tally() -> Any:
        return llm.collective_rpc("nld_tally")[0] if nld else None

    drafts, positions, before = _drafts(llm), _positions(llm), tally()
    clock, cpu = time.perf_counter(), time.process_time()
    answers = work()
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
    after = _positions(llm)
    positions += (0,) * (len(after) - len(positions))
    accepted = tuple(now - then for now, then in zip(after, positions, strict=True))
    forwards = None
    if nld:
        spent = Tally.between(before, tally()).forwards
        forwards = sum(count for kind, count in spent.items() if kind != "prefill")
    if nld and nld["mode"] == "diffusion":  # vLLM takes a denoised block for drafts that are all accepted
        return answers, Spent(0, (), forwards, seconds, cpu_seconds)
    return answers, Spent(_drafts(llm) - drafts, accepted, forwards, seconds, cpu_seconds)


def _drafts(llm: Any) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == DRAFTS)


def _positions(llm: Any) -> tuple[int, ...]:
    found = [metric.values for metric in llm.get_metrics() if metric.name == PER_POSITION]
    return tuple(found[0]) if found else ()


def figures(
    way: str,
    category: str,
    clients: int,
    prompts: Sequence[Encoded],
    answers: Answers,
    spent: Spent,
    expected: Sequence[list[int]],
    decode: Callable[[list[int]], str],
) -> Figures:
    """Return what one way did in one category.

    Args:
        way: its name.
        category: of the prompts.
        clients: requests in flight.
        prompts: in the answers' order.
        answers: what came back.
        spent: what that took.
        expected: AR's answers to the same prompts.
        decode: from token ids to text.
    """
    tokens = sum(map(len, answers.ids))
    pairs = list(zip(answers.ids, expected, strict=True))
    checked = [(decode(ids), own.prompt.answer) for ids, own in zip(answers.ids, prompts, strict=True)]
    marks = [is_right(text, answer) for text, answer in checked if answer is not None]
    # Plain vLLM counts no forwards. The prefill yields the first token. Accepted drafts do not tell how many forwards
    # there were, because those after the last token of an answer are accepted, too, and cut off.
    counted = sum(answers.forwards) - len(prompts) if spent.forwards is None else spent.forwards
    return Figures(
        way=way,
        category=category,
        concurrency=clients,
        requests=len(prompts),
        tokens=tokens,
        forwards=counted,
        drafts=spent.drafts,
        accepted=spent.accepted,
        seconds=spent.seconds,
        cpu_seconds=spent.cpu_seconds,
        user_rates=sum(len(ids) / took for ids, took in zip(answers.ids, answers.seconds, strict=True)),
        same=sum(ids == other for ids, other in pairs),
        agreement=sum(agreeing_share(*pair) for pair in pairs),
        checked=len(marks),
        right=sum(marks),
    )
