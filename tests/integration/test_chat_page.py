"""The page of ``vllm-nld chat`` in a real browser, with a stand-in for the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.browser import accessibility_faults, browser, missing
from tests.support.stand_in import STORY, StandIn, running, standing_in
from vllm_nld.chat.server import ChatServer, Target

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture
def upstream() -> Iterator[StandIn]:
    with standing_in() as server:
        yield server


@pytest.fixture
def page(driver: Any, upstream: StandIn) -> Iterator[Any]:
    """The page, open; at the end the browser must not have complained of anything but refused requests."""
    with ChatServer(Target(upstream.url)) as server, running(server):
        driver.get(server.url)
        wait(lambda: "stand-in" in find(driver, "#server").text)
        yield driver
        complaints = [entry["message"] for entry in driver.get_log("browser")]
        assert not [one for one in complaints if "status of" not in one], complaints


def find(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def texts(driver: Any, selector: str) -> list[str]:
    return [node.text for node in driver.find_elements("css selector", selector)]


def wait(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def say(driver: Any, text: str) -> None:
    find(driver, "#prompt").send_keys(f"{text}\n")


def choose(driver: Any, name: str, value: str) -> None:
    find(driver, f"#{name} option[value='{value}']").click()


def is_over(driver: Any) -> bool:
    return bool(find(driver, "#send").is_displayed())


def test_tokens_are_colored_by_how_they_came(page: Any, upstream: StandIn) -> None:
    choose(page, "mode", "self_speculation")
    say(page, "Tell me")
    wait(lambda: is_over(page))
    tokens = page.find_elements("css selector", ".answer .text .t")
    told = [(token.get_property("textContent"), token.get_attribute("class").split()[1]) for token in tokens]
    assert told == STORY
    figures = texts(page, ".figures dd")
    assert (figures[0], figures[1], figures[3]) == ("2.50", "3.00", "5")
    assert float(figures[2]) > 0
    assert find(page, ".strip").get_attribute("aria-label") == "5 tokens in 3 steps, 1.7 a step"
    (request,) = upstream.requests
    assert request["vllm_xargs"] == {"nld.mode": "self_speculation", "nld.report": 1}
    assert request["messages"] == [{"role": "user", "content": "Tell me"}]


def test_two_modes_answer_one_message_and_the_chat_goes_on(page: Any, upstream: StandIn) -> None:
    choose(page, "mode", "ar")
    choose(page, "other", "diffusion")
    say(page, "One")
    wait(lambda: is_over(page) and texts(page, ".verdict"))
    assert [request["vllm_xargs"]["nld.mode"] for request in upstream.requests] == ["ar", "diffusion"]
    assert texts(page, ".answer h2") == ["AR", "Diffusion"]
    assert "Both texts are the same." in texts(page, ".verdict")[0]
    say(page, "Two")
    wait(lambda: is_over(page) and len(texts(page, ".verdict")) == 2)
    assert [message["content"] for message in upstream.requests[-1]["messages"]] == ["One", "Once upon a time.", "Two"]


def test_new_chat_knows_nothing_of_an_answer_that_was_still_coming(page: Any, upstream: StandIn) -> None:
    upstream.behavior = "stop after a token"
    say(page, "Old")
    wait(lambda: texts(page, ".answer .t"))
    find(page, "#new").click()
    wait(lambda: is_over(page))
    upstream.behavior = "answer"
    say(page, "New")
    wait(lambda: is_over(page) and texts(page, ".answer h2"))
    assert [message["content"] for message in upstream.requests[-1]["messages"]] == ["New"]


@pytest.mark.parametrize("behavior", ["refuse", "refuse in the stream"])
def test_refused_option_is_shown_in_the_server_s_words(page: Any, upstream: StandIn, behavior: str) -> None:
    upstream.behavior = behavior
    find(page, "#more summary").click()
    find(page, "#options").send_keys("speed=3 sampler=top_k on=true")
    say(page, "Quick")
    wait(lambda: texts(page, "[role=alert]"))
    sent = upstream.requests[0]["vllm_xargs"]
    assert {key: sent[key] for key in ("nld.speed", "nld.sampler", "nld.on")} == {
        "nld.speed": 3,
        "nld.sampler": "top_k",
        "nld.on": 1,
    }
    assert texts(page, "[role=alert]") == [
        'The server refused this request\nextra_args["nld"].speed=3 is unknown; allowed keys: mode'
    ]
    upstream.behavior = "answer"
    find(page, "#options").clear()
    say(page, "Again")  # what was refused is not part of the chat
    wait(lambda: is_over(page))
    assert [message["content"] for message in upstream.requests[-1]["messages"]] == ["Again"]


def test_what_is_no_option_is_not_sent(page: Any, upstream: StandIn) -> None:
    find(page, "#more summary").click()
    find(page, "#options").send_keys("fast")
    say(page, "Quick")
    wait(lambda: texts(page, "[role=alert]"))
    assert "“fast” is no option" in texts(page, "[role=alert]")[0]
    assert is_over(page)
    assert not upstream.requests


def test_slow_server_is_shown_and_can_be_stopped(page: Any, upstream: StandIn) -> None:
    upstream.behavior = "slow"
    say(page, "Hello")
    wait(lambda: texts(page, ".slow"))
    assert texts(page, ".slow")[0].startswith("No token yet, after ")
    find(page, "body").send_keys("\ue00c")  # Escape
    wait(lambda: texts(page, ".status") == ["stopped"])
    assert upstream.hung_up.wait(30)
    assert not texts(page, ".slow")


def test_dead_server_is_shown_and_found_again(page: Any, upstream: StandIn) -> None:
    upstream.shutdown()
    upstream.socket.close()
    say(page, "Hello")
    wait(lambda: texts(page, "[role=alert]"))
    assert texts(page, "[role=alert]")[0].startswith(f"No server answers\nno server answers at {upstream.url}")
    wait(lambda: find(page, "#server").get_attribute("data-state") == "down")


def test_broken_answer_keeps_what_came(page: Any, upstream: StandIn) -> None:
    upstream.behavior = "break"
    say(page, "Hello")
    wait(lambda: texts(page, "[role=alert]"))
    assert texts(page, "[role=alert]")[0].startswith("The answer broke off")
    assert texts(page, ".answer .text") == ["Once"]


def test_server_that_cannot_tell_still_answers(page: Any, upstream: StandIn) -> None:
    upstream.behavior = "no report"
    say(page, "Hello")
    wait(lambda: is_over(page))
    assert texts(page, ".answer .text") == ["Once upon a time."]
    assert "This server cannot say how tokens come" in texts(page, ".notes")[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 860), (380, 740)], ids=["wide", "narrow"])
def test_page_is_accessible(page: Any, upstream: StandIn, scheme: str, size: tuple[int, int]) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                         {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    assert accessibility_faults(page) == []
    choose(page, "other", "ar")
    find(page, "#more summary").click()
    say(page, "One")
    wait(lambda: is_over(page))
    upstream.behavior = "refuse"
    say(page, "Two")
    wait(lambda: is_over(page) and texts(page, "[role=alert]"))
    assert accessibility_faults(page) == []
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    for command in ("Emulation.clearDeviceMetricsOverride", "Emulation.setEmulatedMedia"):
        page.execute_cdp_cmd(command, {})


def test_everything_can_be_reached_by_keyboard(page: Any, upstream: StandIn) -> None:
    find(page, "#more summary").click()
    page.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(30):
        find(page, "body") if not reached else None
        page.switch_to.active_element.send_keys("\t")
        reached.append(page.execute_script("const a = document.activeElement; return a.id || a.textContent"))
    for name in ("mode", "other", "temperature", "max-tokens", "seed", "options", "system", "prompt", "send", "new"):
        assert name in reached, name
    assert "Write the Python function read." in reached


def test_accessibility_check_finds_faults(page: Any) -> None:
    page.execute_script("""
        const main = document.querySelector("main");
        main.innerHTML = "<button></button><h4 id=mode>x</h4><p>faint</p>";
        Object.assign(main.querySelector("p").style, { color: "#999", background: "#aaa" });
    """)
    faults = accessibility_faults(page)
    assert any("button without a name" in fault for fault in faults)
    assert "id mode twice" in faults
    assert "heading of level 4 after 1" in faults
    assert any("faint" in fault for fault in faults)
