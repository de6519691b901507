"""Auto mode's choices, on made-up prices."""

from __future__ import annotations

import math
import random

import pytest

from vllm_nld.auto.candidates import ALL_AR, AtHand, Candidate, Choice, Taken, most_promising
from vllm_nld.auto.costs import KNOWN, RECENT, CostCurve
from vllm_nld.auto.expectations import REMEMBERED_DRAFTS, ExpectedVsActual
from vllm_nld.auto.mode import STEPS_PER_CHOICE, AutoMode
from vllm_nld.auto.probing import AR_SAMPLES, PROBE_SHARE
from vllm_nld.draft_sources.acceptance import TRIES, Acceptance, Prior
from vllm_nld.draft_sources.base import ByForward
from vllm_nld.draft_sources.calibration import Calibration
from vllm_nld.draft_sources.model_drafts import chance_classes
from vllm_nld.ops.sizes import round_size


def made(clock: list[float] | None = None, slope: float = 0.01, cap: int = 512) -> AutoMode:
    """A machine on which a forward takes 1 s + ``slope`` s per token; AR's price is known."""
    auto = AutoMode(16, clock=(lambda: clock[0]) if clock is not None else lambda: 0.0)
    for size in range(1, cap):
        auto.costs.start(size, 1 + slope * size)
        for _ in range(AR_SAMPLES):
            auto.costs.ar.observe(size, 1 + slope * size)
    return auto


def candidates(*rates: float) -> list[Candidate]:
    found = []
    for row, rate in enumerate(rates):
        acceptance = Acceptance(Prior(), accepted=1e6 * rate, tested=1e6, blocks=TRIES)
        found.append(Candidate(row, ByForward("forward", acceptance, 16)))
    return found


def at_hand(*chances: float) -> AtHand:
    return AtHand("at hand", chances)


def test_good_drafts_are_chosen_and_bad_ones_are_not() -> None:
    assert made().plan(candidates(0.95), 1, 1).choice == Choice({0: 16}, {})
    assert made().plan(candidates(0.1), 1, 1).choice == ALL_AR
    assert made().plan([], 3, 3).choice == ALL_AR


def test_block_length_follows_acceptance() -> None:
    """If tokens have a price, a long block pays only if it is accepted."""
    lengths = [made(slope=0.08).plan(candidates(rate), 1, 1).choice.blocks.get(0, 1) for rate in (0.3, 0.8, 0.9, 0.98)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 1
    assert 1 < lengths[1] < lengths[-1] == 16


def test_only_promising_requests_draft() -> None:
    chosen = made(slope=0.05).plan(candidates(0.05, 0.97, 0.1, 0.96), 4, 4).choice
    assert set(chosen.blocks) == {1, 3}


def test_busy_device_decodes_one_token_at_a_time() -> None:
    """If every token has its full price, as at high concurrency, drafts cannot pay."""
    auto = AutoMode(16, clock=lambda: 0.0)
    for size in range(1, 600):
        auto.costs.start(size, 0.01 * size)
        for _ in range(AR_SAMPLES):
            auto.costs.ar.observe(size, 0.01 * size)
    assert auto.plan(candidates(*[0.8] * 32), 32, 32).choice == ALL_AR


def test_request_block_limit_is_respected() -> None:
    (candidate,) = candidates(0.95)
    candidate.forward.longest = 3
    assert made().plan([candidate], 1, 1).choice.blocks == {0: 3}


def test_ar_is_priced_before_any_choice() -> None:
    auto = AutoMode(16, clock=lambda: 0.0)
    for size in range(1, 64):
        auto.costs.start(size, 1.0)
    steps = 0
    while not (cycle := auto.plan(candidates(0.95), 1, 1)).choice.drafts:
        cycle.finish(1, 1, 0, 1.0)
        steps += 1
        assert steps < 50
    assert steps == AR_SAMPLES


def test_choice_of_ar_is_kept_for_some_steps() -> None:
    auto = made()
    assert auto.plan(candidates(0.1, 0.1), 2, 2).choice == ALL_AR
    for _ in range(STEPS_PER_CHOICE):
        again = auto.replan([0, 1], 2, 2, {})
        assert again is not None
        assert again.choice == ALL_AR
    assert auto.replan([0, 1], 2, 2, {}) is None
    auto.plan(candidates(0.1, 0.1), 2, 2)
    assert auto.replan([0, 1, 2], 3, 3, {}) is None, "the batch is another one"
    assert auto.decisions["ar", 1] == 2 + 2 * STEPS_PER_CHOICE + 2


def test_drafts_at_hand_are_verified_without_drafting() -> None:
    """At 1 s + 0.01 s per token, 15 drafts of which 10 are accepted are well worth 0.15 s; poor ones are not."""
    (good,), (poor,) = candidates(0.1), candidates(0.1)
    good.at_hand, poor.at_hand = at_hand(*[0.9] * 15), at_hand(*[0.02] * 15)
    assert made().plan([good], 1, 1).choice == Choice({}, {0: Taken("at hand", 15)})
    assert made().plan([poor], 1, 1).choice == ALL_AR


def test_request_with_drafts_at_hand_does_not_draft() -> None:
    four = candidates(0.97, 0.97, 0.97, 0.97)
    four[0].at_hand = at_hand(*[0.97] * 15)
    choice = made().plan(four, 4, 4).choice
    assert choice == Choice({1: 16, 2: 16, 3: 16}, {0: Taken("at hand", 15)})


def test_drafts_at_hand_are_chosen_by_chance_up_to_sizes_with_a_kernel() -> None:
    pair = candidates(0.1, 0.1)
    pair[0].at_hand, pair[1].at_hand = at_hand(*[0.9] * 15), at_hand(*[0.5] * 15)
    choice = made(slope=0.08).plan(pair, 2, 2).choice
    assert choice.at_hand[0].drafts > (choice.at_hand[1].drafts if 1 in choice.at_hand else 0)
    assert round_size(size := 2 + choice.tokens_at_hand) == size


def test_most_promising_of_several_sources_is_offered() -> None:
    """Twenty drafts that are wrong from the third on are worth less than four good ones."""
    long_, short = AtHand("long", [0.9, 0.9, *[0.01] * 18]), AtHand("short", [0.9] * 4)
    assert most_promising([long_, short]) == short == most_promising([short])


def test_drafts_at_hand_are_considered_in_every_step() -> None:
    """For drafting, a choice of AR holds for some steps, but a source may find something at any token."""
    auto = made()
    auto.plan(candidates(0.1, 0.1), 2, 2)
    poor, found = (auto.replan([0, 1], 2, 2, {1: at_hand(*chances)}) for chances in ([0.02] * 15, [0.95] * 14))
    assert poor is not None and found is not None
    assert poor.choice == ALL_AR
    assert found.choice == Choice({}, {1: Taken("at hand", 14)})
    assert auto.decisions == {("ar", 1): 2 + 2 + 1, ("at hand", 15): 1}


def test_drafts_at_hand_do_not_delay_drafting() -> None:
    """If drafting pays, the step after one with drafts at hand is planned again; if not, AR is kept."""
    for rate, settled in ((0.8, 0), (0.1, STEPS_PER_CHOICE)):
        auto = made()
        (candidate,) = candidates(rate)
        candidate.at_hand = at_hand(*[0.95] * 15)
        cycle = auto.plan([candidate], 1, 1)
        assert cycle.choice == Choice({}, {0: Taken("at hand", 15)})
        assert cycle.steps == settled


def test_better_draft_is_preferred_to_poor_ones_at_hand() -> None:
    (candidate,) = candidates(0.95)
    candidate.at_hand = at_hand(0.5, *[0.7] * 14)
    assert made().plan([candidate], 1, 1).choice == Choice({0: 16}, {})


def test_idle_requests_are_probed_while_others_have_drafts_at_hand() -> None:
    auto, probed = made(slope=0.05), 0
    for _ in range(2000):
        pair = candidates(0.05, 0.05)
        pair[0].at_hand, pair[1].forward.idle_steps = at_hand(*[0.95] * 15), 10_000
        cycle = auto.plan(pair, 2, 2)
        choice = cycle.choice
        assert 0 in choice.at_hand
        if choice.blocks:
            assert set(choice.blocks) == {1}
            probed += 1
            cycle.drafted(8, 1.4)
        size = 2 + choice.tokens_at_hand + sum(choice.blocks.values()) - len(choice.blocks)
        cycle.finish(2, size, 0, 1 + 0.05 * size)
    assert 5 < probed < 100


def test_rare_long_runs_are_not_counted_as_shortfall() -> None:
    """Blocks with 15 accepted drafts make up for those with none: on average the expected 3 are accepted."""
    actual = ExpectedVsActual()
    for number in range(2000):
        actual.observe(15 if number % 5 == 0 else 0, 3.0, 1.0)
    assert actual.gain == pytest.approx(1.0, abs=0.02)
    for _ in range(int(REMEMBERED_DRAFTS)):
        actual.observe(1.5, 3.0, 1.0)
    assert actual.gain == pytest.approx(0.5, abs=0.05)


def test_probes_stay_within_their_budget() -> None:
    """Requests with unknown acceptance are tried, but only in a small share of the time."""
    auto, idle, probing, busy = made(), 0, 0.0, 0.0
    for _ in range(8_000):
        (candidate,) = candidates(0.05)
        candidate.forward.idle_steps = idle
        cycle = auto.plan([candidate], 1, 1)
        chosen = cycle.choice.drafts
        idle = 0 if chosen else idle + 1
        seconds = 1.01
        if chosen:
            cycle.drafted(8, 1.08)
            seconds = 1.08
            probing += 1.08 + 0.07
        cycle.finish(1, 8 if chosen else 1, 0, seconds)
        busy += seconds + (1.08 if chosen else 0.0)
    assert 0.3 * PROBE_SHARE < probing / busy < 1.5 * PROBE_SHARE


def test_probes_with_a_dropped_causal_pass_are_charged() -> None:
    """A pass that also prefilled gives no measurement, but the draft forwards before it took time."""
    auto = AutoMode(16, clock=lambda: 0.0)
    for size in range(1, 64):
        auto.costs.start(size, 0.01 + 1e-4 * size)
    (candidate,) = candidates(0.05)
    for _ in range(500):
        auto.plan([candidate], 1, 1).finish(1, 1, 0, 0.0101)
    candidate.forward.idle_steps, saved, probes = 100, auto.probing.saved, 0
    for _ in range(100):
        cycle = auto.plan([candidate], 1, 1)
        if cycle.choice.blocks:
            probes += 1
            cycle.drafted(8, 0.0108)
    assert 0 < probes <= saved / 0.01


def test_no_request_is_probed_if_good_drafts_would_not_pay() -> None:
    auto = AutoMode(16, clock=lambda: 0.0)
    for size in range(1, 600):
        auto.costs.start(size, 0.01 * size)
        for _ in range(AR_SAMPLES):
            auto.costs.ar.observe(size, 0.01 * size)
    for _ in range(1000):
        idle = candidates(*[0.1] * 16)
        for candidate in idle:
            candidate.forward.idle_steps = 10_000
        cycle = auto.plan(idle, 16, 16)
        assert cycle.choice == ALL_AR
        cycle.finish(16, 16, 0, 0.16)


def test_overestimated_gains_are_corrected() -> None:
    """If expected gains of 10 tokens per cycle never come, drafting ends, although each request's rate looks good."""
    auto = made(slope=0.05)
    cycles = 0
    for _ in range(800):
        cycle = auto.plan(candidates(0.95), 1, 1)
        chosen = cycle.choice.drafts
        if chosen:
            cycles += 1
            cycle.drafted(16, 1.8)
        cycle.finish(1, 16 if chosen else 1, 0, 1.8 if chosen else 1.05)
    assert 5 < cycles < 400


def test_cycles_with_dear_branches_are_given_up() -> None:
    """Their time is no price of a pass without branches, but drafting costs it all the same."""
    auto = made()
    for _ in range(100):
        cycle = auto.plan(candidates(0.8), 1, 1)
        if cycle.choice == ALL_AR:
            break
        before = auto.costs.verify.seconds(16)
        cycle.drafted(16, 1.16)
        cycle.finish_branched(1, 16 + 64, 3, 8.0)
        assert auto.costs.verify.seconds(16) == before
    assert cycle.choice == ALL_AR
    assert made().plan(candidates(0.8), 1, 1).choice.blocks  # without branches it would pay


def test_trim_keeps_drafts_that_pay() -> None:
    auto = made(slope=0.2)
    assert auto.idle().trim([[0.99] * 15], 1, 1.0) == [15]
    (kept,) = auto.idle().trim([[0.97, 0.97, 0.97] + [0.05] * 12], 1, 1.0)
    assert kept == 3
    assert auto.idle().trim([[0.99] * 7, [0.05] * 7], 2, 1.0)[1] == 0
    assert sum(auto.idle().trim([[0.01] * 15], 1, 1.0)) >= 1, "what is drafted is put to the test"


def test_number_of_rounded_sizes_is_small() -> None:
    assert [round_size(n) for n in (1, 4, 5, 16, 17, 64, 65, 500)] == [4, 4, 8, 16, 24, 64, 80, 512]
    assert len({round_size(n) for n in range(1, 513)}) < 45


def test_cost_curve() -> None:
    curve = CostCurve()
    assert curve.seconds(5) == 0.0
    curve.start(4, 1.0)
    curve.start(8, 3.0)
    assert curve.seconds(6) == pytest.approx(2.0)
    assert curve.seconds(1) == 1.0
    assert curve.seconds(16) == pytest.approx(6.0)
    curve.observe(8, 50.0)
    assert curve.seconds(8) == 3.0, "the first one may have compiled a kernel"
    for _ in range(20):
        curve.observe(8, 4.0)
    assert curve.seconds(8) == 4.0, "measurements replace the first guess"
    curve.observe(8, 1000.0)
    assert curve.seconds(8) == 4.0, "an outlier is no cost"
    curve.observe(16, 7.0)
    assert curve.seconds(16) == 7.0, "without a guess a measurement is all there is"


def test_host_time_of_one_size_is_expected_at_other_sizes() -> None:
    """Start-up times bare forwards; a step of any size also schedules and samples."""
    curve = CostCurve()
    for size in (4, 8, 16, 32):
        curve.start(size, 1.0 * size)
    for _ in range(KNOWN):
        curve.observe(8, 13.0)
    assert curve.seconds(4) == 9.0
    assert curve.seconds(32) == 37.0
    assert curve.ceiling(8) == 13.0
    assert curve.ceiling(16) == math.inf, "a guess is no ceiling"
    for _ in range(RECENT):
        curve.observe(8, 6.0)
    assert curve.ceiling(8) == 6.0


def test_interruption_does_not_change_a_price() -> None:
    """Idle time between two steps must not make AR, or drafting, look expensive."""
    auto = made()
    for _ in range(2 * KNOWN):
        auto.idle().finish(4, 4, 0, 1.04)
    prices = auto.search.prices
    plain, saved = prices.plain_seconds(4, 4), auto.probing.saved
    auto.plan(candidates(0.95, 0.95, 0.95, 0.95), 4, 4).finish(4, 4, 0, 500.0)
    assert prices.actual(4).plain == pytest.approx(1.0)
    assert prices.actual(4).seconds == 1.0
    assert (prices.plain_seconds(4, 4), auto.probing.saved) == (plain, saved)


def test_mixed_cycle_does_not_change_expected_gains() -> None:
    auto = made()
    for void in (True, False):
        cycle = auto.plan(candidates(0.95), 1, 1)
        assert cycle.choice.blocks
        if void:
            cycle.void()
        cycle.drafted(16, 1.16)
        cycle.finish(1, 16, 0, 1.16)
        assert (auto.search.prices.actual(1).gain == 1.0) is void


@pytest.mark.parametrize(("rates", "weight"), [((0.7,) * 20, 48.0), ((0.05, 0.95) * 10, 3.0)])
def test_average_counts_more_if_requests_are_alike(rates: tuple[float, ...], weight: float) -> None:
    prior, generator = Prior(), random.Random(0)
    for _ in range(5):
        for rate in rates:
            own = Acceptance(prior)
            for _ in range(8):
                accepted = 0
                while accepted < 15 and generator.random() < rate:
                    accepted += 1
                own.observe(15, accepted)
    assert prior.weight == weight


def test_acceptance_learns_and_forgets() -> None:
    own = Acceptance(Prior())
    assert own.rate == pytest.approx(0.75)
    for _ in range(30):
        own.observe(15, 1)
    assert own.rate < 0.62
    low = own.rate
    for _ in range(300):
        own.forget(0.05)
    assert own.rate == pytest.approx(own.prior.rate) != low
    assert Acceptance(Prior(), 1e9 * 0.5, 1e9).expected_tokens(3) == pytest.approx(1.75)


def test_confidence_is_calibrated_by_outcome() -> None:
    calibration, (sure, even) = Calibration(), chance_classes([0.97, 0.5])
    assert calibration.probability(sure) == pytest.approx(0.97)
    for _ in range(500):
        calibration.observe([sure], 0)
    assert calibration.probability(sure) < 0.1
    assert calibration.chances([even, sure, even])[0] == pytest.approx(0.55)


def test_new_request_is_tried_if_good_ones_are_common() -> None:
    """If half of the requests draft well, a new one is worth two blocks. If none does, it is not."""
    for accepted, expected in ((3, True), (0, False)):
        prior = Prior()
        for number in range(64):
            own = Acceptance(prior)
            for _ in range(8):
                own.observe(7, accepted if number % 2 else 0)
            prior.note_end(own)
        new = Acceptance(prior)
        hopes = [new.hopeful_rate > new.rate + 0.05]
        for _ in range(TRIES):
            new.observe(7, 0)
            hopes.append(new.hopeful_rate > new.rate + 0.05)
        assert hopes == [expected, expected, False]
