"""A real ``vllm serve`` on loopback with self-speculation on, through the official openai client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from grafana.panels import Query, Series, draw, queries
from openai import OpenAI

from tests.server.command_lines import python_with_lm_eval, run_in_one_process
from tests.server.fuzz_requests import fuzz, is_alive
from tests.support import dashboards
from tests.support.browser import accessibility_faults, browser, missing
from tests.support.ports import reserved_port
from tests.support.servers import serving
from tests.support.stand_in import running
from vllm_nld.chat.server import ChatServer, Target
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts

SPECULATE = {"vllm_xargs": {"nld.mode": "self_speculation"}}  # auto mode, the default, may choose AR
MODES = ["ar", "self_speculation", "auto", "diffusion"]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


@pytest.fixture(scope="module")
def base_url(port: int, log: Path) -> Iterator[str]:
    command = [str(checkpoint_path("tiny")), "--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 28)]
    # A model this small would fill an answer with white space, which a JSON grammar allows without limit.
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    # The chat template thinks only if a request asks for it, but this parser assumes the opposite.
    command += ["--reasoning-parser", "nemotron_v3", "--default-chat-template-kwargs", '{"enable_thinking": false}']
    command += ["--per-request-spec-decode-metrics", "summary", "--enforce-eager"]  # tests/engine compiles
    with serving(command, port, log):
        assert "Self-speculation is active" in log.read_text()
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=f"{base_url}/v1", api_key="none", timeout=300)


@pytest.fixture(scope="module")
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


@dataclass
class Parsed:
    """An answer after vLLM's parsers."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, message: Any) -> Parsed:
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
        return cls(message.content or "", (message.model_extra or {}).get("reasoning") or "", calls)

    @classmethod
    def joined(cls, chunks: Iterable[Any]) -> Parsed:
        found, calls = cls(), defaultdict[int, list[str]](lambda: ["", ""])
        for delta in (choice.delta for chunk in chunks for choice in chunk.choices):
            found.content += delta.content or ""
            found.reasoning += (delta.model_extra or {}).get("reasoning") or ""
            for call in delta.tool_calls or []:
                calls[call.index][0] += call.function.name or ""
                calls[call.index][1] += call.function.arguments or ""
        found.calls = [(name, json.loads(arguments)) for name, arguments in calls.values()]
        return found


def metric(base_url: str, name: str, label: str = "") -> float:
    """A metric's value, summed over the series that carry ``label``."""
    text = urllib.request.urlopen(f"{base_url}/metrics", timeout=60).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{") or line.startswith(f"{name}_total{{")]
    lines = [line for line in lines if label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_completions_streamed_and_not(client: OpenAI, model: str, base_url: str) -> None:
    from vllm_nld.reference import ar_generate, load_reference

    ((_, prompt),) = held_out_prompts(1)
    settings = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0.0, "extra_body": SPECULATE}
    before = metric(base_url, "vllm:spec_decode_num_accepted_tokens")
    whole = client.completions.create(**settings)
    assert metric(base_url, "vllm:spec_decode_num_accepted_tokens") > before
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True))
    assert streamed == whole.choices[0].text
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint_path("tiny") / "tokenizer.json"))
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    reference = ar_generate(load_reference(checkpoint_path("tiny")), ids, 48).ids[len(ids) :]
    assert whole.choices[0].text == tokenizer.decode(reference)


def test_aborted_stream_leaves_the_server_healthy(client: OpenAI, model: str) -> None:
    ((_, prompt),) = held_out_prompts(1)
    settings = {"model": model, "prompt": prompt, "temperature": 0.0}
    stream = client.completions.create(**settings, max_tokens=1000, stream=True)
    next(iter(stream))
    stream.close()
    first, second = (client.completions.create(**settings, max_tokens=16).choices[0].text for _ in range(2))
    assert first == second


def test_bad_requests_are_refused(client: OpenAI, model: str) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError):
        client.completions.create(model=model, prompt="x", max_tokens=100_000)


@pytest.mark.parametrize(
    "spelling",
    [lambda mode: {"nld.mode": mode}, lambda mode: {"nld": json.dumps({"mode": mode})}],
    ids=["flat", "json"],
)
def test_every_mode_on_one_server(client: OpenAI, model: str, spelling: Callable[[str], dict[str, str]]) -> None:
    ((_, prompt),) = held_out_prompts(1)
    texts = {}
    for mode in ("ar", "self_speculation", "auto", "diffusion"):
        settings = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0.0}
        settings["extra_body"] = {"vllm_xargs": spelling(mode)}
        completion = client.completions.create(**settings)
        texts[mode] = completion.choices[0].text
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 48
        streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True))
        assert streamed == texts[mode]
    assert texts["ar"] == texts["self_speculation"] == texts["auto"] != texts["diffusion"]


def chat(client: OpenAI, model: str, mode: str, xargs: dict[str, Any] | None = None, **settings: Any) -> Parsed:
    """A greedy chat request, sent whole and streamed; both must give equal results."""
    extra = {"vllm_xargs": {"nld.mode": mode}} | (xargs or {})
    settings = {"model": model, "temperature": 0.0, "extra_body": extra} | settings
    whole = Parsed.of(client.chat.completions.create(**settings).choices[0].message)
    streamed = Parsed.joined(client.chat.completions.create(**settings, stream=True))
    assert streamed == whole, mode
    return whole


PLAIN = {"messages": [{"role": "user", "content": "Write the Python function read."}], "max_tokens": 40}


@pytest.fixture(scope="module")
def plain_answers(client: OpenAI, model: str) -> dict[str, Parsed]:
    """The answer to ``PLAIN`` in every mode."""
    return {mode: chat(client, model, mode, **PLAIN) for mode in MODES}


def test_chat_in_every_mode(plain_answers: dict[str, Parsed]) -> None:
    found = plain_answers
    assert all(parsed.content and not parsed.reasoning and not parsed.calls for parsed in found.values())
    assert found["ar"] == found["self_speculation"] == found["auto"] != found["diffusion"]


def test_reasoning_parser_works_in_every_mode(client: OpenAI, model: str) -> None:
    """The embedded model never stops thinking by itself, so a budget ends it."""
    think = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 20}
    found = {mode: chat(client, model, mode, think, **PLAIN) for mode in MODES}
    assert found["ar"] == found["self_speculation"] == found["auto"]
    for mode, parsed in found.items():
        assert parsed.reasoning, mode
        assert parsed.content, mode
        assert "think>" not in parsed.reasoning + parsed.content, mode


@pytest.mark.parametrize(("choice", "thinks"), [("named", False), ("required", True)], ids=["named", "required"])
def test_tools_are_called_in_every_mode(client: OpenAI, model: str, choice: str, thinks: bool) -> None:
    """With ``strict``, because without it vLLM's hermes parser allows any JSON as arguments."""
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    think = {"chat_template_kwargs": {"enable_thinking": thinks}} | ({"thinking_token_budget": 8} if thinks else {})
    settings = {
        "messages": [{"role": "user", "content": "Pick."}],
        "tools": [{"type": "function", "function": {"name": "pick", "parameters": schema, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "pick"}} if choice == "named" else choice,
        "parallel_tool_calls": False,  # with the grammar of "required" this model would never stop calling
        "max_tokens": 100,
    }
    # The grammar keeps one or two tokens of a block, so that diffusion fills forty of them: with two forwards each.
    hasty = {"diffusion": {"vllm_xargs": {"nld.mode": "diffusion", "nld.max_denoising_steps": 2}}}
    found = {mode: chat(client, model, mode, think | hasty.get(mode, {}), **settings) for mode in MODES}
    assert found["ar"] == found["self_speculation"] == found["auto"]
    for mode, parsed in found.items():
        ((name, arguments),) = parsed.calls
        assert name == "pick", mode
        assert set(arguments) == {"n"}, mode
        assert arguments["n"] in (1, 2, 3), mode
        assert bool(parsed.reasoning) == thinks, mode
        assert not parsed.content, mode


def test_optional_tools_do_not_change_the_text(client: OpenAI, model: str, plain_answers: dict[str, Parsed]) -> None:
    """The embedded model knows no tools, so hermes finds no call, and the text equals that without tools."""
    tools = {"tools": [{"type": "function", "function": {"name": "pick"}}], "tool_choice": "auto"}
    for mode in MODES:
        assert chat(client, model, mode, **PLAIN, **tools) == plain_answers[mode], mode


def test_request_figures_are_in_its_response_and_in_the_log(client: OpenAI, model: str, log: Path) -> None:
    ((_, prompt),) = held_out_prompts(1)
    settings = {"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 0.0}
    for mode, words in {
        "ar": ["ar 40 tokens", "TPF", "forwards ar 39"],
        "self_speculation": ["self_speculation", "TPF", "acceptance length", "draft", "verify"],
        "diffusion": ["diffusion", "TPF", "denoising passes per block", "commit", "denoise"],
    }.items():
        answer = client.completions.create(**settings, extra_body={"vllm_xargs": {"nld.mode": mode}})
        figures = answer.model_extra["metrics"]["speculative_decoding"]
        assert (figures["num_spec_steps"] > 0) == (mode != "ar")
        assert (figures["draft_acceptance_rate"] == 1) == (mode == "diffusion")
        for _ in range(50):  # written with the step that tells the worker of the request's end
            lines = [line for line in log.read_text().splitlines() if answer.id in line and f"(mode {mode}): " in line]
            if lines:
                break
            time.sleep(0.1)
        assert len(lines) == 1
        for word in words:
            assert word in lines[0]


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"nld.mode": "fast"}, ["mode='fast'", "'self_speculation'"]),
        ({"nld.speed": 3}, ["speed=3", "unknown", "allowed keys"]),
        ({"nld": '{"mode": "ar", "threshold": 0.5}'}, ["threshold=0.5", "no effect in mode 'ar'"]),
        ({"nld.mode": "diffusion", "nld.block_length": 64}, ["block_length=64", "2 to 16"]),
        ({"nld": "diffusion"}, ["'diffusion'", "JSON"]),
    ],
)
def test_unsuitable_mode_is_http_400(client: OpenAI, model: str, xargs: dict[str, Any], words: list[str]) -> None:
    from openai import BadRequestError

    for create, ask in (
        (client.completions.create, {"prompt": "x"}),
        (client.chat.completions.create, {"messages": [{"role": "user", "content": "x"}]}),
    ):
        with pytest.raises(BadRequestError) as caught:
            create(model=model, max_tokens=4, extra_body={"vllm_xargs": xargs}, **ask)
        for word in words:
            assert word in str(caught.value)
    assert client.completions.create(model=model, prompt="x", max_tokens=4).choices[0].text


def test_no_request_ends_the_server(base_url: str) -> None:
    """A few requests of the kind that ``fuzz_requests.py`` sends by the thousand when run by hand."""
    statuses, faults = fuzz(base_url, 80, seed=3)
    assert not faults
    assert {200, 400} <= set(statuses) <= {200, 400, 404, 422}
    assert is_alive(base_url)


KINDS_OF_TOKENS = {
    "ar": {"ar"},
    "self_speculation": {"ar", "drafted", "looked_up", "corrected", "bonus"},
    "auto": {"ar", "drafted", "looked_up", "corrected", "bonus"},
    "diffusion": {"seed", "denoised"},
}


@pytest.mark.parametrize("mode", MODES)
def test_responses_say_how_tokens_came(client: OpenAI, model: str, mode: str) -> None:
    """Also where several steps share a chunk; and what is not asked for is not sent."""
    settings = {"model": model, "temperature": 0.0, "max_tokens": 120}
    settings["messages"] = [{"role": "user", "content": "Write the Python function read."}]
    extra = {"vllm_xargs": {"nld.mode": mode, "nld.report": 1}, "return_token_ids": True}
    whole = client.chat.completions.create(**settings, extra_body=extra).model_dump()
    chunks = [chunk.model_dump() for chunk in client.chat.completions.create(**settings, extra_body=extra, stream=True)]
    streamed = [token for chunk in chunks if chunk.get("nld") for token in chunk["nld"]["tokens"]]
    assert "".join(token["text"] for token in streamed) == whole["choices"][0]["message"]["content"]
    assert [token["id"] for token in streamed] == whole["choices"][0]["token_ids"]
    for tokens in (streamed, whole["nld"]["tokens"]):
        assert len(tokens) == 120
        assert {token["origin"] for token in tokens} <= KINDS_OF_TOKENS[mode]
    assert whole["kv_transfer_params"] is None
    figures = whole["nld"]
    forwards = sum(count for kind, count in figures["forwards"].items() if kind != "prefill")
    assert figures["tokens_per_forward"] == 120 / forwards
    if mode == "self_speculation":
        by_kind = Counter(token["origin"] for token in figures["tokens"])
        assert by_kind["drafted"] + by_kind["looked_up"] == figures["accepted_drafts"] > 0
        assert by_kind["looked_up"] > 0  # the text repeats itself
        assert by_kind["corrected"] + by_kind["bonus"] == figures["verified_blocks"] > 0
    silent = client.chat.completions.create(
        **settings | {"max_tokens": 4}, extra_body={"vllm_xargs": {"nld.mode": mode}}
    )
    assert "nld" not in silent.model_dump()


def test_reports_of_several_texts_are_refused(client: OpenAI, model: str) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=r"n=2 with .*report=True; allowed: 1"):
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "x"}],
            n=2,
            temperature=1.0,
            extra_body={"vllm_xargs": {"nld.report": 1}},
        )


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_chat_page_shows_two_modes_of_a_real_server(base_url: str, tmp_path: Path) -> None:
    """Pictures of it: ``VLLM_NLD_PICTURES=FOLDER``."""
    pictures = Path(os.environ.get("VLLM_NLD_PICTURES", tmp_path))
    with ChatServer(Target(base_url)) as server, running(server), browser() as driver:
        driver.get(server.url)
        driver.find_element("css selector", "#other option[value='ar']").click()
        driver.execute_script("document.querySelector('#max-tokens').value = 120")
        driver.find_element("css selector", "#prompt").send_keys("Write the Python function read.\n")
        end = time.monotonic() + 120
        while not (verdict := driver.find_elements("css selector", ".verdict")):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert verdict[0].text.startswith("Both texts are the same.")
        counts = [int(node.text) for node in driver.find_elements("css selector", ".figures div:last-child dd")]
        assert counts[0] == counts[1] == len(driver.find_elements("css selector", ".pair .answer:first-child .bar i"))
        assert driver.find_elements("css selector", ".text .looked_up")
        assert accessibility_faults(driver) == []
        assert driver.save_screenshot(str(pictures / "chat.png"))


def test_json_schemas_are_kept_in_every_mode(client: OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    for mode in ("ar", "self_speculation", "diffusion", "auto"):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Pick."}],
            response_format={"type": "json_schema", "json_schema": {"name": "pick", "schema": schema}},
            max_tokens=100,
            extra_body={"vllm_xargs": {"nld.mode": mode}},
        )
        assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2, 3), mode


def test_metrics_distinguish_the_modes(client: OpenAI, model: str, base_url: str) -> None:
    ((_, prompt),) = held_out_prompts(1)

    def tokens_of(mode: str) -> float:
        return metric(base_url, "vllm:nld_tokens", f'mode="{mode}"')

    for mode in ("ar", "self_speculation", "diffusion"):
        before = tokens_of(mode)
        settings = {"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 0.0}
        client.completions.create(**settings, extra_body={"vllm_xargs": {"nld.mode": mode}})
        for _ in range(50):  # the last values come with the step that tells the worker of the request's end
            if tokens_of(mode) >= before + 39:
                break
            time.sleep(0.1)
        # The last token may come from a plain step; at most one block too many is decided.
        assert before + 39 <= tokens_of(mode) <= before + 40 + 16
    for kind in ("prefill", "ar", "draft", "verify", "denoise", "commit"):
        assert metric(base_url, "vllm:nld_request_forwards", f'kind="{kind}"') > 0
    assert metric(base_url, "vllm:nld_model_forwards", 'pass="draft"') > 0
    assert metric(base_url, "vllm:nld_tokens_per_forward", 'mode="self_speculation"') > 0.5
    assert metric(base_url, "vllm:nld_acceptance_length") >= 1
    assert metric(base_url, "vllm:nld_denoising_passes") > 0


@pytest.mark.skipif(dashboards.missing() is not None, reason=str(dashboards.missing()))
def test_every_query_of_the_dashboard_has_data(client: OpenAI, model: str, base_url: str, tmp_path: Path) -> None:
    """In a real Prometheus. A picture of it: ``VLLM_NLD_PICTURES=FOLDER``."""
    ((_, prompt),) = held_out_prompts(1)
    kinds = [{"nld.mode": mode} for mode in MODES] + [{"nld.mode": "self_speculation", "nld.branches": 4}]
    with reserved_port() as port, dashboards.scraping(base_url.removeprefix("http://"), port, tmp_path) as prometheus:
        begun = time.time()
        empty = wanted = queries(interval="5s")
        found: dict[Query, list[Series]] = {}
        while empty:
            assert time.time() < begun + 120, empty
            for xargs in kinds:
                settings = {"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 0.0}
                client.completions.create(**settings, extra_body={"vllm_xargs": xargs})
            found = {query: prometheus.series(query, begun, time.time(), 1.0) for query in wanted}
            empty = [query for query in wanted if not found[query]]
    picture = Path(os.environ.get("VLLM_NLD_PICTURES", tmp_path)) / "dashboard_panels.png"
    draw(list(found.items()), begun, picture)
    assert picture.stat().st_size > 10_000


def test_example_client_runs(base_url: str) -> None:
    command = [sys.executable, str(EXAMPLES / "openai_client.py"), "--base-url", f"{base_url}/v1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def in_every_mode(base_url: str) -> Iterator[dict[str, str]]:
    """Each mode as a request's options, in JSON; afterwards every mode must have generated tokens."""

    def tokens() -> dict[str, float]:
        modes = ("ar", "self_speculation", "diffusion")  # auto's tokens are AR's or self-speculation's
        return {mode: metric(base_url, "vllm:nld_tokens", f'mode="{mode}"') for mode in modes}

    before = tokens()
    yield {mode: json.dumps({"vllm_xargs": {"nld.mode": mode}}) for mode in MODES}
    assert all(tokens()[mode] > count for mode, count in before.items())


def test_bench_serve_runs_in_every_mode(
    base_url: str, model: str, in_every_mode: dict[str, str], tmp_path: Path
) -> None:
    """With the user's own prompts, as JSONL, and the local tokenizer."""
    prompts = "\n".join(json.dumps({"prompt": text[-80:]}) for _, text in held_out_prompts(3))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    common = ["--model", model, "--tokenizer", str(checkpoint_path("tiny")), "--base-url", base_url]
    common += ["--dataset-name", "custom", "--dataset-path", "prompts.jsonl", "--skip-chat-template"]
    common += ["--custom-output-len", "16", "--num-prompts", "3", "--temperature", "0", "--disable-tqdm"]
    common += ["--save-result", "--result-dir", str(tmp_path)]
    lines = [
        ["vllm", "bench", "serve", *common, "--result-filename", f"{mode}.json", "--extra-body", body]
        for mode, body in in_every_mode.items()
    ]
    output = run_in_one_process(sys.executable, "vllm.entrypoints.cli.main:main", lines, tmp_path)
    for mode in MODES:
        found = json.loads((tmp_path / f"{mode}.json").read_text())
        assert (found["completed"], found["total_output_tokens"]) == (3, 48), mode
    assert "Acceptance length" in output


@pytest.mark.skipif(
    python_with_lm_eval() is None,
    reason="lm-eval is not installed: pip install 'lm-eval[api]', or name its interpreter in VLLM_NLD_LM_EVAL",
)
def test_lm_eval_runs_in_every_mode(base_url: str, model: str, in_every_mode: dict[str, str], tmp_path: Path) -> None:
    """On a local task, without a hub. Modes that keep AR's text get AR's result."""
    python = python_with_lm_eval()
    assert python is not None
    for file in (EXAMPLES / "lm_eval").iterdir():
        shutil.copy(file, tmp_path)
    common = ["--model", "local-completions", "--tasks", "continue_code", "--include_path", ".", "--log_samples"]
    arguments = f"model={model},base_url={base_url}/v1/completions,tokenizer_backend=None,num_concurrent=2"
    lines = [
        ["lm_eval", "run", *common, "--model_args", arguments, "--gen_kwargs", body, "--output_path", mode]
        for mode, body in in_every_mode.items()
    ]
    run_in_one_process(python, "lm_eval.__main__:cli_evaluate", lines, tmp_path)
    answers = {}
    for mode in MODES:
        (samples,) = (tmp_path / mode).rglob("samples_*.jsonl")
        rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers[mode] = [row["filtered_resps"] for row in rows]
        assert len(rows) == 4
    assert answers["ar"] == answers["self_speculation"] == answers["auto"]
