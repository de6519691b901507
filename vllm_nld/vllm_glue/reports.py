"""How a report gets from the engine into the responses of chat completions.

vLLM's outputs have no field for extensions. From scheduler to API process a report goes in ``kv_transfer_params``, the
one dictionary that every output may carry. There, vLLM's chat handler, which makes the responses, is wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import inspect
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Protocol

from vllm_nld.errors import NLDError
from vllm_nld.names import NAMESPACE
from vllm_nld.vllm_glue.versions import SUPPORTED

Decode = Callable[[list[int]], str]
"""Text of token ids."""

CHAT = "vllm.entrypoints.openai.chat_completion.serving"


def attach(outputs: dict[int, Any], reports: dict[str, dict[str, Any]]) -> None:
    """Put reports on the outputs of their requests.

    Args:
        outputs: vLLM's ``EngineCoreOutputs`` of a step, by client.
        reports: by request.
    """
    if not reports:
        return
    for output in (output for of_client in outputs.values() for output in of_client.outputs):
        if output.request_id in reports:
            others = output.kv_transfer_params or {}
            output.kv_transfer_params = {**others, NAMESPACE: reports[output.request_id]}


def detach(output: Any) -> dict[str, Any] | None:
    """Take the report off a ``RequestOutput``, and return it; None if there is none."""
    params = output.kv_transfer_params
    if not params or NAMESPACE not in params:
        return None
    rest = {key: value for key, value in params.items() if key != NAMESPACE}
    output.kv_transfer_params = rest or None
    report: dict[str, Any] = params[NAMESPACE]
    return report


def show_in_responses(account: Callable[[Decode], Account]) -> None:
    """Have chat completions show reports, in this process; idempotent. Only an API process ever imports the handler.

    Args:
        account: makes what a response says of its tokens.
    """
    if CHAT in sys.modules:
        _wrap(sys.modules[CHAT], account)
    elif not any(isinstance(finder, _WrapsWhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WrapsWhenImported(account))


class Account(Protocol):
    """What a response says of its tokens (:class:`vllm_nld.serving.report.Account`)."""

    def next(self, tokens: Sequence[int], known: dict[str, Any] | None) -> dict[str, Any]:
        """Return what goes with further tokens, given the engine's report so far."""


class _WrapsWhenImported(importlib.abc.MetaPathFinder):
    """Finds the chat handler as everyone does, and wraps it as soon as it is loaded."""

    def __init__(self, account: Callable[[Decode], Account]) -> None:
        self._account = account

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != CHAT:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_wrap(module: ModuleType) -> None:
                load(module)
                _wrap(module, self._account)

            spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType, account: Callable[[Decode], Account]) -> None:
    handler = module.OpenAIServingChat
    if getattr(handler, "shows_nld_reports", False):
        return
    stream, whole = handler.chat_completion_stream_generator, handler.chat_completion_full_generator
    signatures = {original: inspect.signature(original) for original in (stream, whole)}
    for signature in signatures.values():
        if not {"request", "result_generator", "tokenizer"} <= signature.parameters.keys():
            raise NLDError(f"{CHAT}.OpenAIServingChat changed; supported vLLM: {SUPPORTED}")

    def watched(original: Callable[..., Any], given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, _Watched]:
        bound = signatures[original].bind(*given, **named)
        results, tokenizer = bound.arguments["result_generator"], bound.arguments["tokenizer"]
        request = bound.arguments["request"]
        skip, hides = request.skip_special_tokens, not getattr(request, "include_reasoning", True)
        watching = _Watched(results, account(lambda ids: tokenizer.decode(ids, skip_special_tokens=skip)), hides)
        bound.arguments["result_generator"] = watching
        return original(*bound.args, **bound.kwargs), watching

    @functools.wraps(stream)
    async def chat_completion_stream_generator(*given: Any, **named: Any) -> AsyncIterator[str]:
        lines, watching = watched(stream, given, named)
        async with contextlib.aclosing(lines):
            async for line in lines:
                yield watching.tell(line)

    @functools.wraps(whole)
    async def chat_completion_full_generator(*given: Any, **named: Any) -> Any:
        answer, watching = watched(whole, given, named)
        response = await answer
        report = watching.take()
        if report is not None and hasattr(response, "choices"):
            setattr(response, NAMESPACE, report)
        return response

    handler.chat_completion_stream_generator = chat_completion_stream_generator
    handler.chat_completion_full_generator = chat_completion_full_generator
    handler.shows_nld_reports = True


class _Watched:
    """The results of a request, on their way to the handler.

    Args:
        results: vLLM's ``RequestOutput`` objects.
        account: says what the response says of them.
        hides: whether the response keeps the model's reasoning to itself, and so all tokens.
    """

    def __init__(self, results: AsyncIterator[Any], account: Account, hides: bool) -> None:
        self._results, self._account, self._hides = results, account, hides
        self._tokens: list[int] = []
        self._report: dict[str, Any] | None = None

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Any:
        result = await anext(self._results)
        found = detach(result)
        if found is not None:
            self._report = found
        if self._report is not None:
            self._tokens += result.outputs[0].token_ids
        return result

    def take(self) -> dict[str, Any] | None:
        """Return the report of what has come since the last time; None if the request wants none, or nothing has."""
        if self._report is None or not self._tokens:
            return None
        tokens, self._tokens = self._tokens, []
        told = self._account.next(tokens, self._report)
        return told | {"tokens": []} if self._hides else told

    def tell(self, line: str) -> str:
        """Return a line of the stream with the report of the tokens that have come; the line that ends it has none."""
        if self._report is None or not line.startswith("data: {"):
            return line
        chunk = json.loads(line.removeprefix("data: "))
        if not chunk.get("choices") or chunk["choices"][0]["delta"].get("role"):
            return line  # the first says who speaks: the same tokens' text comes with the next
        report = self.take()
        return line if report is None else f"data: {json.dumps(chunk | {NAMESPACE: report}, ensure_ascii=False)}\n\n"
