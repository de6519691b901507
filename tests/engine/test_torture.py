"""Random requests of every mode in one cramped engine. Each text must equal that of the request run by itself.

The short run belongs to the suite. By hand, for an hour or a night:

    VLLM_NLD_TORTURE=5000 VLLM_NLD_TORTURE_SEED=1 python -m pytest tests/engine/test_torture.py -s
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.engines import accepted, branches, engine, metric, runner, shun_ar
from tests.support.models import save_first_layers
from vllm_nld.checkpoints.held_out import held_out_prompts

REQUESTS = int(os.environ.get("VLLM_NLD_TORTURE", "100"))
SEED = int(os.environ.get("VLLM_NLD_TORTURE_SEED", "0"))

CRAMPED: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,  # three blocks
    "num_gpu_blocks_override": 18,
    "block_size": 32,
    "max_model_len": 320,
    "enable_prefix_caching": True,
    "skip_tokenizer_init": False,
}
DIFFUSION: list[dict[str, Any]] = [
    {"threshold": 0.0},
    {"threshold": 0.7},
    {"threshold": 0.9, "block_length": 5},
    {"threshold": 0.8, "seed_first": False},
    {"sampler": "top_k", "tokens_per_step": 4},
    {"sampler": "left_to_right", "max_denoising_steps": 3},
    {"sampler": "entropy_budget", "entropy_budget": 0.5},
]
SPECULATION: list[dict[str, Any]] = [{}, {"prompt_lookup": 3}, {"block_length": 6}, {"draft_threshold": 0.5}]
BRANCHES: list[dict[str, Any]] = [
    {"branches": 3},
    {"branches": "auto"},
    {"branches": "all", "branch_length": 4, "block_length": 5},
]
PARAMS: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 90},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"min_tokens": 20, "stop_token_ids": [11, 30, 40]},
    {"stop": ["\n"]},
    {"stop": ["self", ")"], "include_stop_str_in_output": True},
    {"allowed_token_ids": list(range(20, 200))},
    {"bad_words": ["self", " ="]},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"ignore_eos": True, "max_tokens": 60},
]
MODES = ("diffusion: finished", "auto: finished")
GRAMMARS: dict[str, Any] = {
    "choice": ["yes", "no", "import os"],
    "regex": r"[a-z]{3,8}=\d{1,4};",
    "json": {"type": "object", "properties": {"lines": {"enum": [1, 2, 30]}}, "required": ["lines"],
             "additionalProperties": False},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A request that may be sent any number of times.

    Attributes:
        key: identifies the request that gives the expected text.
        prompt: token ids.
        params: arguments of ``SamplingParams``.
        nld: the options under ``nld``.
        exact: whether its text must be equal in any schedule.
        grammar: what every text of it must match.
    """

    key: str
    prompt: tuple[int, ...]
    params: dict[str, Any]
    nld: dict[str, Any]
    exact: bool = True
    grammar: str | None = None

    def settings(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        given: dict[str, Any] = {"temperature": 0, "max_tokens": 30, "extra_args": {"nld": self.nld}} | self.params
        if self.grammar is not None:
            given |= {"structured_outputs": StructuredOutputsParams(**{self.grammar: GRAMMARS[self.grammar]})}
        return SamplingParams(**given)

    def alone(self) -> Case:
        """The request whose text is expected: that of AR if the mode is lossless."""
        lossless = self.nld["mode"] in ("self_speculation", "auto") and "seed" not in self.params
        return Case(self.key, self.prompt, self.params, {"mode": "ar"}, True, self.grammar) if lossless else self


def prompts_of(llm: Any) -> list[tuple[int, ...]]:
    """Prompts that share prefixes of whole cache pages, some with one token to compute after them."""
    tokenizer = llm.llm_engine.get_tokenizer()
    first, second, third = (tokenizer.encode(text)[:110] for _, text in held_out_prompts(3, characters=600))
    made = [first[:65], first[:64] + second[:1], first[:64] + second[:30], first, second[:33], second[:97]]
    made += [second[:32] + third[:32], second[:40], third[:1], third[:7], third[:50], third[:100]]
    return [tuple(ids) for ids in made]


def random_case(rng: random.Random, prompts: list[tuple[int, ...]]) -> Case:
    """One of few cases, so that few expected texts have to be generated."""
    prompt = rng.choice(prompts)
    mode = rng.choice(["ar", "self_speculation", "self_speculation", "auto", "diffusion", "diffusion"])
    by_mode: dict[str, list[dict[str, Any]]] = {
        "diffusion": DIFFUSION,
        "ar": [{}],
        "self_speculation": SPECULATION + BRANCHES,
    }
    of_mode = by_mode.get(mode, SPECULATION)
    nld = {"mode": mode} | rng.choice(of_mode)
    index = prompts.index(prompt)
    kind = rng.random()
    if kind < 0.15:
        grammar = rng.choice(list(GRAMMARS))
        nld.pop("seed_first", None)  # a grammar decides the seed
        # If a budget or a preemption cuts a diffusion block under a grammar, the causal pass decides a token.
        return Case(f"{index} {grammar} {_kind(nld)}", prompt, {"max_tokens": 40}, nld, mode != "diffusion", grammar)
    if kind < 0.3:
        seed = rng.randrange(2)
        params = {"temperature": 0.8, "seed": seed, "top_p": 0.95}
        return Case(f"{index} seed {seed} {json.dumps(nld)}", prompt, params, nld, exact=True)
    if kind < 0.35:
        return Case(f"{index} sampled", prompt, {"temperature": 1.0}, nld, exact=False)
    number = rng.choice([n for n, params in enumerate(PARAMS) if mode != "diffusion" or "bad_words" not in params])
    params = PARAMS[number]
    if mode == "diffusion" and "logprobs" in params:
        nld.pop("seed_first", None)
    exact = mode != "diffusion" or "logprobs" not in params
    return Case(f"{index} params {number} {_kind(nld)}", prompt, params, nld, exact)


def _kind(nld: dict[str, Any]) -> str:
    return json.dumps(nld) if nld["mode"] == "diffusion" else "lossless"


def result(output: Any) -> tuple[list[int], str]:
    completion = output.outputs[0]
    return list(completion.token_ids), completion.text


@dataclass
class Torture:
    """An engine under random requests, and their results."""

    llm: Any
    rng: random.Random
    live: dict[str, Case] = field(default_factory=dict)
    expected: dict[str, tuple[list[int], str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def text_alone(self, case: Case) -> tuple[list[int], str]:
        """The text of a case in an empty engine, generated once."""
        if case.key not in self.expected:
            alone = case.alone()
            prompt = {"prompt_token_ids": list(alone.prompt)}
            (output,) = self.llm.generate([prompt], alone.settings(), use_tqdm=False)
            self.expected[case.key] = result(output)
        return self.expected[case.key]

    def run(self, cases: list[Case]) -> None:
        """Send all, a few at a time, abort some, and reset the engine's cache now and then."""
        core, waiting = self.llm.llm_engine, list(enumerate(cases))
        while waiting or core.has_unfinished_requests():
            while waiting and (len(self.live) < 4 or (len(self.live) < 14 and self.rng.random() < 0.3)):
                number, case = waiting.pop()
                self.live[str(number)] = case
                core.add_request(str(number), {"prompt_token_ids": list(case.prompt)}, case.settings())
            if self.live and self.rng.random() < 0.01:
                gone = self.rng.choice(list(self.live))
                core.abort_request([gone])
                del self.live[gone]
                self.counts["aborted"] += 1
            if self.rng.random() < 0.003:
                core.engine_core.engine_core.scheduler.reset_prefix_cache(reset_running_requests=True)
                self.counts["resets"] += 1
            for output in core.step():
                self.check(output)

    def check(self, output: Any) -> None:
        """Compare a request's text so far, or its whole text."""
        case = self.live.get(output.request_id)
        if case is None:
            return
        found = result(output)
        if output.finished:
            del self.live[output.request_id]
            self.counts[f"{case.nld['mode']}: finished"] += 1
            self.counts["compared"] += case.exact
        if case.exact:
            ids, text = self.expected[case.key]
            if found != (ids, text) if output.finished else found[0] != ids[: len(found[0])]:
                self.note(case, f"{found} instead of {ids, text}")
        reason = output.outputs[0].finish_reason
        if output.finished and reason not in ("stop", "length"):
            self.note(case, f"ended by {reason}")
        elif output.finished and not self.is_valid(case, found[1], reason):
            self.note(case, f"{found[1]!r} is not valid")

    def note(self, case: Case, what: str) -> None:
        self.wrong.append(f"{case.nld} {case.params} {case.grammar} prompt of {len(case.prompt)}: {what}")

    @staticmethod
    def is_valid(case: Case, text: str, reason: str) -> bool:
        if case.grammar is None or reason == "length":
            return True
        if case.grammar == "json":
            return bool(json.loads(text)["lines"] in (1, 2, 30))
        if case.grammar == "choice":
            return text in GRAMMARS["choice"]
        return re.fullmatch(GRAMMARS["regex"], text) is not None

    def drain(self) -> None:
        """One more request, with which the worker learns of the last one's end."""
        from vllm import SamplingParams

        self.llm.generate([{"prompt_token_ids": [20]}], SamplingParams(max_tokens=1), use_tqdm=False)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from vllm.config import StructuredOutputsConfig

    folder = save_first_layers(tmp_path_factory.mktemp("model") / "tiny")
    grammars = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
    with engine(folder, spec=True, **CRAMPED, structured_outputs_config=grammars) as made:
        shun_ar(made)
        yield made


@pytest.mark.timeout(300 + REQUESTS)
def test_every_text_equals_that_of_its_request_by_itself(llm: Any) -> None:
    rng = random.Random(SEED)
    torture = Torture(llm, rng)
    prompts = prompts_of(llm)
    pool = [random_case(rng, prompts) for _ in range(min(REQUESTS // 2, 200))]
    for case in pool:
        if case.exact:
            torture.text_alone(case)
    names = {
        "preemptions": "vllm:num_preemptions",
        "cached tokens": "vllm:prefix_cache_hits",
        "drafts": "vllm:spec_decode_num_drafts",
    }
    before = {name: metric(llm, of) for name, of in names.items()} | {"accepted": accepted(llm)}
    torture.run([rng.choice(pool) for _ in range(REQUESTS)])
    counts = torture.counts
    counts.update({name: metric(llm, of) - before[name] for name, of in names.items()})
    counts["branch hits"] = sum(branches(llm)[kind] for kind in ("guess", "mask"))
    counts["accepted"] = accepted(llm) - before["accepted"]
    counts.update({"texts alone": len(torture.expected), "wrong": len(torture.wrong)})
    print(f"\n{REQUESTS} requests, seed {SEED}: {dict(sorted(counts.items()))}")
    assert not torture.wrong, "\n".join(torture.wrong[:20])
    for happened in ("preemptions", "cached tokens", "aborted", "accepted", "branch hits", *MODES):
        assert counts[happened] > 0, f"no {happened}: the engine was not cramped"
    assert counts["compared"] > REQUESTS / 2
    torture.drain()
    scheduler, drafter = llm.llm_engine.engine_core.engine_core.scheduler, runner(llm).drafter
    assert not scheduler.running
    assert not scheduler.parked
    assert not drafter.parked
    assert scheduler.kv_cache_manager.usage == 0, "pages without an owner"
    assert len(drafter._requests._states) <= 1
