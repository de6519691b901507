"""Sums and ratios of ``vllm-nld bench tasks``, and its order of engines and prompts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_nld.cli.bench_tasks import ALL, AR, Options, _chosen_ways, pools
from vllm_nld.cli.bench_tasks.figures import Figures, agreeing_share, is_right, rows_of, total
from vllm_nld.cli.bench_tasks.measure import Answers, Encoded, Spent, complete, figures
from vllm_nld.cli.bench_tasks.prompts import TaskPrompt
from vllm_nld.cli.bench_tasks.ways import all_ways
from vllm_nld.errors import NLDError


def some(way: str, category: str, **changes: object) -> Figures:
    settings: dict[str, object] = {
        "concurrency": 1, "requests": 2, "tokens": 20, "forwards": 10, "drafts": 5, "accepted": (4, 1), "seconds": 2.0,
        "cpu_seconds": 1.0, "user_rates": 18.0, "same": 1, "agreement": 1.5,
    }  # fmt: skip
    return Figures(way=way, category=category, **(settings | changes))  # type: ignore[arg-type]


def test_ratios_of_a_row() -> None:
    row = some("ours", "qa", checked=2, right=1).row(some(AR, "qa", seconds=4.0, cpu_seconds=0.5))
    assert row["tpf"] == 2
    assert row["acceptance_length"] == 2
    assert row["accepted_by_position"] == [0.8, 0.2]
    assert row["agreement"] == 0.75
    assert row["accuracy"] == 0.5
    assert row["tokens_per_s"] == 10
    assert row["tokens_per_s_per_user"] == 9
    assert row["speed_up"] == 2
    assert row["cpu_speed_up"] == 0.5


def test_nothing_to_divide_by() -> None:
    """Answers of one token come from the prefill; plain vLLM drafts nothing."""
    row = some(AR, "qa", forwards=0, drafts=0, accepted=()).row(None)
    assert row["tpf"] is row["acceptance_length"] is row["accuracy"] is row["speed_up"] is None
    assert row["accepted_by_position"] == []


def test_categories_add_up() -> None:
    both = total([some("ours", "qa"), some("ours", "math", forwards=30, accepted=(1, 1, 1), drafts=1)])
    assert (both.category, both.forwards, both.drafts, both.accepted) == (ALL, 40, 6, (5, 2, 1))
    rows = rows_of([some(AR, "qa"), some(AR, "math"), some("ours", "qa", seconds=1.0), some("ours", "math")], AR)
    assert [(row["way"], row["category"]) for row in rows[4:]] == [(AR, ALL), ("ours", ALL)]
    assert rows[2]["speed_up"] == 2
    assert rows[5]["speed_up"] == round(4 / 3, 3)


@pytest.mark.parametrize(
    ("tokens", "expected", "share"),
    [([1, 2, 3], [1, 2, 3], 1), ([1, 9, 3], [1, 2, 3], 1 / 3), ([1, 2], [1, 2, 3, 4], 0.5), ([1, 2, 3, 4], [1, 2], 0.5),
     ([], [], 1), ([], [1], 0)],
)  # fmt: skip
def test_agreement(tokens: list[int], expected: list[int], share: float) -> None:
    assert agreeing_share(tokens, expected) == share


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [("It is 3 + 4 = 7.", "7", True), ("7 of 8", "7", False), ("1,200 dollars", "1200", True), ("None.", "0", False),
     ("$12.50", "12.5", True), ("-3", "3", False), ("so 18.0!", "18", True)],
)  # fmt: skip
def test_the_last_number_is_the_answer(text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer) is right


def test_forwards_of_an_engine_that_does_not_count_them() -> None:
    """The prefill yields the first token; more drafts are accepted than an answer has tokens, and then cut off."""
    prompts = [Encoded(TaskPrompt("math", "s", "?", answer="4"), [1])] * 2
    answers = Answers([[1] * 11, [4] * 6], [1.0, 2.0], [4, 2])
    spent = Spent(4, (4, 4, 4, 4), None, 3.0, 1.0)
    found = figures("ngram", "math", 1, prompts, answers, spent, [[1] * 11, [5] * 6], lambda ids: f"is {ids[0]}")
    assert found.forwards == 4 + 2 - 2
    assert (found.same, found.agreement, found.checked, found.right) == (1, 1.0, 2, 1)
    assert found.user_rates == 11 + 3


class TwoRequests:
    """An engine whose steps yield these tokens of each request; a step may yield none, as while a prompt is read."""

    STEPS = ([[7], []], [[7], [1]], [[7, 8, 9], []], [[2, 3, 4, 5]])

    def __init__(self) -> None:
        self.llm_engine = self
        self.names: list[str] = []
        self.ids: dict[str, list[int]] = {}
        self.steps = iter(self.STEPS)

    def add_request(self, name: str, prompt: object, params: object) -> None:
        self.names.append(name)
        self.ids[name] = []

    def step(self) -> list[SimpleNamespace]:
        outputs = []
        for name, new in zip(list(self.names), next(self.steps), strict=True):
            self.ids[name] = self.ids[name] + new
            finished = len(self.ids[name]) == 5
            if finished:
                self.names.remove(name)
            output = SimpleNamespace(token_ids=self.ids[name])
            outputs.append(SimpleNamespace(request_id=name, outputs=[output], finished=finished))
        return outputs


def test_outputs_with_new_tokens_are_forwards() -> None:
    answers = complete(TwoRequests(), [[1], [2]], None, 2, 5)
    assert answers.ids == [[7, 7, 7, 8, 9], [1, 2, 3, 4, 5]]
    assert answers.forwards == [3, 2]


def test_engines_come_in_an_order_that_works() -> None:
    ways = all_ways((0.5, 0.9))
    assert next(iter(ways)) == AR
    assert list(ways)[-1] == "ngram"  # no engine starts after it in its process
    assert {"diffusion 0.5", "diffusion 0.9"} < set(ways)
    assert list(_chosen_ways(Options(ways=["auto"]))) == [AR, "auto"]
    with pytest.raises(NLDError, match=r"--way beam: allowed are AR, self-speculation, "):
        _chosen_ways(Options(ways=["beam"]))


def test_categories_run_alone_at_the_lowest_concurrency_only() -> None:
    one, two = (Encoded(TaskPrompt(name, "s", name), [1]) for name in "ab")
    found = pools({"a": [one], "b": [two]}, [5, 1, 2])
    assert [(pool.category, pool.clients, len(pool.prompts)) for pool in found] == [
        ("a", 1, 1), ("b", 1, 1), (ALL, 2, 2), (ALL, 5, 6),
    ]  # fmt: skip


def test_the_picture_shows_reports_with_and_without_drafts(tmp_path: Path) -> None:
    from vllm_nld.cli.bench_tasks.plots import draw

    settings = {"model": "m", "dtype": "float32", "prompts": 2, "max_tokens": 8}
    published = {"acceptance_length_without_and_with_adapter": {"qa": [4.0, 5.0]}}
    ways = [some(AR, "qa", drafts=0, accepted=()), some("self-speculation", "qa", checked=1)]
    for number in (1, 2):
        report = {"settings": settings, "published": published, "results": rows_of(ways[:number], AR)}
        draw(report, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 10_000
