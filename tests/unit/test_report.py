"""What a request is told of how its tokens came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_nld.names import NAMESPACE
from vllm_nld.options import NLDOptions
from vllm_nld.origins import WORDS, put
from vllm_nld.serving.ledger import Tally
from vllm_nld.serving.report import Account, Pieces, report
from vllm_nld.serving.second_reports import SecondReports
from vllm_nld.vllm_glue.reports import _Watched, attach, detach


def decode(ids: list[int]) -> str:
    """Bytes, as a byte-level tokenizer has them; 0 stands for a special token."""
    return bytes(i for i in ids if i).decode(errors="replace")


def test_pieces_together_are_the_text() -> None:
    text = "def café(x): return 'naïve ☃'\n"
    pieces = Pieces(decode)
    found = [pieces.next(token) for token in [*text.encode(), 0]]
    assert "".join(found) == text
    assert found[text.encode().index("é".encode())] == ""  # the first of its two bytes is no character
    assert found[-1] == ""


@pytest.mark.parametrize(
    ("known", "start", "more", "expected"),
    [("", 0, "a", "a"), ("adc", 3, "dd", "adcdd"), ("a", 3, "d", "a??d"), ("abc", 1, "d", "ad")],
)
def test_origins_belong_to_positions(known: str, start: int, more: str, expected: str) -> None:
    assert put(known, start, more) == expected


def test_account_tells_only_what_is_new() -> None:
    tally = Tally()
    tally.forwards.update(prefill=1, draft=1, verify=1)
    tally.blocks["self_speculation"], tally.accepted["self_speculation"] = 1, 2
    account = Account(decode)
    first = account.next([65], report("a", Tally()))
    assert first["tokens"] == [{"id": 65, "text": "A", "origin": "ar"}]
    assert first["tokens_per_forward"] is first["acceptance_length"] is None
    second = account.next([66, 67, 68], report("adlc", tally))
    assert [token["origin"] for token in second["tokens"]] == ["drafted", "looked_up", "corrected"]
    assert (second["tokens_per_forward"], second["acceptance_length"]) == (2, 3)
    (last,) = account.next([69], None)["tokens"]
    assert last["origin"] == "unknown"


def test_reports_travel_next_to_what_others_put_there() -> None:
    """A KV connector uses the same dictionary."""
    mine = SimpleNamespace(request_id="a", kv_transfer_params={"remote": 1})
    other = SimpleNamespace(request_id="b", kv_transfer_params=None)
    attach({0: SimpleNamespace(outputs=[mine, other])}, {"a": {"origins": "d"}})
    assert detach(mine) == {"origins": "d"}
    assert mine.kv_transfer_params == {"remote": 1}
    assert other.kv_transfer_params is detach(other) is None


def saw(*steps: tuple[str, int, int, bool, bool], branches: int | str = "off") -> dict[str, Any]:
    """The report of a request with these steps: mode, tokens, places for drafts, prefill, cut."""
    options = NLDOptions(mode="self_speculation", report=True, branches=branches)
    reports, request = SecondReports(lambda request: options), SimpleNamespace(request_id="a", num_output_tokens=0)
    for mode, tokens, drafts, prefill, cut in steps:
        reports.saw(request, mode, tokens, drafts, prefill, cut)
        request.num_output_tokens += tokens
    return reports.take(())["a"]


def test_second_runner_tells_what_its_scheduler_knows() -> None:
    mode = "self_speculation"
    known = saw(
        (mode, 1, 0, True, True), (mode, 3, 5, False, False), (mode, 3, 2, False, True), (mode, 1, 0, False, True)
    )
    assert known["origins"] == "a" + "ddv" + "ddb" + "a"
    assert known["forwards"] == {"prefill": 1, "verify": 2, "draft": 2, "ar": 1}
    known = saw((mode, 1, 0, True, True), (mode, 3, 5, False, False), branches=3)
    assert known["forwards"].get("draft", 0) == 0
    mode = "diffusion"
    known = saw(
        (mode, 1, 0, True, True), (mode, 4, 3, False, False), (mode, 3, 2, False, True), (mode, 2, 2, False, True)
    )
    assert known["origins"] == "s" + "nnns" + "nn?" + "ns"
    assert known["forwards"] == {}


def test_every_origin_has_a_word_of_its_own() -> None:
    assert len(set(WORDS.values())) == len(WORDS) == 9


@pytest.mark.parametrize("hides", [False, True])
def test_tokens_of_hidden_reasoning_stay_hidden(hides: bool) -> None:
    async def results() -> AsyncIterator[Any]:
        known = {NAMESPACE: report("ad", Tally())}
        yield SimpleNamespace(kv_transfer_params=known, outputs=[SimpleNamespace(token_ids=list(b"hi"))])

    async def told() -> Any:
        watching = _Watched(results(), Account(decode), hides)
        async for _ in watching:
            pass
        return watching.take()

    found = asyncio.run(told())
    assert "".join(token["text"] for token in found["tokens"]) == ("" if hides else "hi")
    assert found["verified_blocks"] == 0
