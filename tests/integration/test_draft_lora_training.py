"""Training of the draft adapter: what it learns from and changes, how it resumes, what it writes and refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from tests.support import adapters, models
from tests.support.commands import invoke
from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.draft_lora import MODULES, TARGETS
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.errors import NLDError
from vllm_nld.reference import (
    DraftAdapter,
    KVCache,
    ReferenceModel,
    ar_generate,
    generate,
    linear_spec_generate,
    load_reference,
)
from vllm_nld.training import objective
from vllm_nld.training.acceptance import measure, walk
from vllm_nld.training.objective import Drafts, Draws, Objective, Support, Target, lk_hybrid, next_cycles
from vllm_nld.training.settings import Settings
from vllm_nld.training.text import Rows, Stream, continue_greedily, read_documents
from vllm_nld.training.trainer import Schedule, Trainer

BLOCK, PROMPT = 8, [1, 3, 7, 2, 9, 4]
SMALL: dict[str, Any] = {
    "rank": 3, "steps": 6, "batch": 4, "blocks": 3, "rows": 12, "prefix_tokens": 10, "new_tokens": 20,
    "held_out_rows": 3, "learning_rate": 0.01, "warm_up": 1,
}  # fmt: skip


def model_of(seed: int = 0) -> ReferenceModel:
    return models.random_model(models.small_config(), seed).requires_grad_(False)


def random_adapter(model: ReferenceModel, seed: int = 0, rank: int = 3, **rest: Any) -> DraftAdapter:
    return adapters.random_adapter(model.config, rank, seed, size=0.3, **rest)


def stream_of(seed: int = 0) -> Stream:
    generator = torch.Generator().manual_seed(seed)
    return Stream(*(torch.randint(6, 24, (200,), generator=generator) for _ in range(2)))


def trainer_in(folder: Path, resume: bool = False, **changed: Any) -> Trainer:
    trainer = Trainer(model_of(), stream_of(), Settings.of(**SMALL | changed), folder)
    trainer.begin(resume)
    return trainer


def finish(trainer: Trainer, **schedule: Any) -> bool:
    with Progress(disable=True) as progress:
        return trainer.run(Schedule(**schedule), progress)


# --- the reference with an adapter ---


def test_zero_adapter_changes_nothing() -> None:
    model = model_of()
    plain = linear_spec_generate(model, PROMPT, 30, BLOCK)
    model.draft_adapter = DraftAdapter.fresh(model.config, 4, 16.0, torch.Generator().manual_seed(0))
    assert any(bool(a.any()) for a in model.draft_adapter.a.values())
    assert linear_spec_generate(model, PROMPT, 30, BLOCK) == plain


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_adapter_changes_only_drafts(threshold: float) -> None:
    model = model_of()
    ar, diffused = ar_generate(model, PROMPT, 40), generate(model, PROMPT, 40, threshold=0.9)
    plain = linear_spec_generate(model, PROMPT, 40, BLOCK, threshold=threshold)
    model.draft_adapter = random_adapter(model)
    drafted = linear_spec_generate(model, PROMPT, 40, BLOCK, threshold=threshold)
    assert drafted.drafts != plain.drafts
    assert drafted.ids == plain.ids == ar.ids
    assert ar_generate(model, PROMPT, 40) == ar
    assert generate(model, PROMPT, 40, threshold=0.9) == diffused, "block diffusion does without the adapter"


def merge(model: ReferenceModel, adapter: DraftAdapter) -> None:
    """Put an adapter into the weights."""
    for (layer, target), a in adapter.a.items():
        model.get_parameter(f"encoder.layers.{layer}.{MODULES[target]}.weight").add_(2.0 * adapter.b[layer, target] @ a)
    if adapter.mask_row is not None:
        model.encoder.embed_tokens.weight[model.config.mask_token_id] = adapter.mask_row


@pytest.mark.parametrize("targets", [*((target,) for target in TARGETS), TARGETS])
@pytest.mark.parametrize("mask_row", [False, True])
def test_adapter_is_a_change_of_weights(targets: tuple[str, ...], mask_row: bool) -> None:
    model, ids = model_of(), torch.tensor([[*PROMPT, 5, 5]])
    assert model.config.mask_token_id == 5
    model.draft_adapter = adapter = random_adapter(model, targets=targets, mask_row=mask_row)
    found = model.draft(ids)
    assert not torch.allclose(found, model.bidirectional(ids), atol=1e-2)
    merge(model, adapter)  # scale 2
    torch.testing.assert_close(found, model.bidirectional(ids), atol=2e-4, rtol=2e-4)


def test_mask_row_counts_only_for_masks() -> None:
    model = model_of()
    model.draft_adapter = adapter = random_adapter(model, mask_row=True)
    for b in adapter.b.values():
        b.zero_()
    plain, masked = torch.tensor([PROMPT]), torch.tensor([[*PROMPT, 5]])
    assert torch.equal(model.draft(plain), model.bidirectional(plain))
    assert not torch.allclose(model.draft(masked), model.bidirectional(masked), atol=1e-2)


# --- objective ---


def by_hand(wanted: Tensor, found: Tensor, support: list[int], temperature: float, eta: float) -> float:
    p, q = ([math.exp(float(x[token]) / temperature) for token in support] for x in (wanted, found))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    agreement = sum(map(min, p, q))
    share = math.exp(-eta * agreement)
    return share * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) + (1 - share) * (1 - agreement)


def matching(wanted: Tensor, found: Tensor, temperature: float, top_k: int, eta: float = 3.0) -> Tensor:
    support = Support.of(wanted, found, top_k)
    return lk_hybrid(support.log_softmax(wanted, temperature), support.log_softmax(found, temperature), eta)


def test_cross_entropy_sees_the_union_of_both_supports_only() -> None:
    """Ids 0, 1 and 3 are the two best of either row; id 2 is in the vocabulary, and counts for nothing."""
    wanted = torch.tensor([[4.0, 1.0, 0.5, -1.0, -torch.inf]])
    found = torch.tensor([[1.0, 2.0, 9.0, 3.0, -torch.inf]])
    found[0, 2] = 0.0
    support = Support.of(wanted, found, 2)
    assert sorted(support.columns[support.inside].tolist()) == [0, 1, 3]
    place = support.place_of(torch.tensor([0]))
    expected = 1.0 - math.log(math.exp(1) + math.exp(2) + math.exp(3))
    assert float(support.log_softmax(found).gather(-1, place)) == pytest.approx(expected, rel=1e-5)


def test_rows_with_smaller_supports_are_filled_up_with_nothing() -> None:
    wanted = torch.tensor([[5.0, 4.0, 1.0, 0.0, 2.0], [5.0, 4.0, 1.0, 0.0, 2.0]])
    found = torch.tensor([[5.0, 4.0, 1.0, 0.0, 2.0], [0.0, 1.0, 4.0, 5.0, 2.0]])
    support = Support.of(wanted, found, 2)
    assert support.inside.sum(-1).tolist() == [2, 4]
    torch.testing.assert_close(support.log_softmax(found).exp().sum(-1), torch.ones(2))
    assert bool((support.log_softmax(found)[~support.inside].exp() == 0).all())


def test_lk_hybrid_equals_manual_result() -> None:
    wanted = torch.tensor([[4.0, 1.0, 0.5, -1.0, -torch.inf], [0.0, 3.0, 2.0, 1.0, -torch.inf]])
    found = torch.tensor([[1.0, 2.0, 0.0, 3.0, -torch.inf], [0.0, 3.0, 2.5, 1.0, -torch.inf]])
    loss = matching(wanted, found, 3.0, 2)
    expected = [by_hand(wanted[0], found[0], [0, 1, 3], 3.0, 3.0), by_hand(wanted[1], found[1], [1, 2], 3.0, 3.0)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert matching(wanted, wanted, 3.0, 200).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_lk_hybrid_holds_the_share_fixed() -> None:
    """The weight between KL and total variation has no gradient."""
    generator = torch.Generator().manual_seed(0)
    wanted, found = (torch.randn(4, 12, generator=generator) for _ in range(2))
    found.requires_grad_()
    matching(wanted, found, 2.0, 200).sum().backward()
    assert found.grad is not None
    p, q = (wanted / 2.0).softmax(-1), (found.detach() / 2.0).softmax(-1)
    share = torch.exp(-3.0 * torch.minimum(p, q).sum(-1, keepdim=True))
    smaller = (q < p).float()
    of_kl = (q - p) / 2.0
    of_overlap = q * (smaller - (smaller * q).sum(-1, keepdim=True)) / 2.0
    torch.testing.assert_close(found.grad, share * of_kl - (1 - share) * of_overlap, atol=1e-6, rtol=1e-4)


def counted_by_hand(
    model: ReferenceModel, adapter: DraftAdapter, ids: list[int], start: int
) -> list[tuple[Tensor, Tensor]]:
    """Logits (verify's, draft's) of the accepted drafts and the first rejected one, one cycle as in the reference."""
    cache = KVCache()
    model.draft_adapter = adapter
    model.causal(torch.tensor([ids[:start]]), cache)
    block = [ids[start]] + [model.config.mask_token_id] * (BLOCK - 1)
    drafted = model.draft(torch.tensor([block]), cache)[0]
    judged = model.causal(torch.tensor([ids[start : start + BLOCK]]), cache)[0]
    found = []
    for place in range(1, BLOCK):
        wanted = int(judged[place - 1].argmax())
        found.append((judged[place - 1], drafted[place]))
        if wanted != int(drafted[place].argmax()) or wanted != ids[start + place]:
            break
    return found


@pytest.mark.parametrize("own", [True, False])
def test_loss_equals_that_of_single_cycles(own: bool) -> None:
    """Many blocks in one pass give the loss of single drafts over a cached prefix, on own text and on other text."""
    model = model_of(1)
    adapter = random_adapter(model, rank=4)
    ids = torch.randint(6, 24, (3, 30), generator=torch.Generator().manual_seed(4))
    if own:
        ids = continue_greedily(model, ids[:, :8], 22)
    starts = torch.stack([torch.randperm(22, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]) + 1
    expected, matched, accepted, everything = (
        0.0,
        0.0,
        0,
        [token for token in range(24) if token != model.config.mask_token_id],
    )
    for row, places in zip(ids.tolist(), starts.tolist(), strict=True):
        for start in places:
            counted = counted_by_hand(model, adapter, row, start)
            for wanted, found in counted:
                matching_loss = by_hand(wanted, found, everything, 3.0, 0.5)
                matched += matching_loss / len(counted)
                loss = 0.5 * matching_loss
                loss -= 2.0 * float(found.log_softmax(-1)[wanted.argmax()])
                expected += loss / len(counted)
                accepted += int(wanted.argmax()) == int(found.argmax())
    target = Target.of(model, ids)
    drafts = Drafts.over(model, adapter, target, starts, BLOCK)
    losses = Objective(kl_weight=0.5, ce_weight=2.0)
    assert float(losses.loss_sum(model, target, drafts)) == pytest.approx(expected, rel=1e-4)
    only_matching = Objective(ce_weight=0.0).loss_sum(model, target, drafts)
    assert float(only_matching) == pytest.approx(matched, rel=1e-4), "small next to the cross-entropy"
    alone = torch.zeros(starts.shape)
    alone[1, 4] = 1.0
    one = Drafts.over(model, adapter, Target.of(model, ids[1:2]), starts[1:2, 4:5], BLOCK)
    assert float(losses.loss_sum(model, target, drafts, alone)) == pytest.approx(
        float(losses.loss_sum(model, Target.of(model, ids[1:2]), one)), rel=1e-4
    )
    assert int(drafts.accepted.sum()) == accepted > 0
    assert int(drafts.emitted().sum()) == accepted + starts.numel()


def test_drafts_beyond_the_first_rejected_one_count_less_with_distance() -> None:
    model = model_of(1)
    adapter = random_adapter(model, rank=4)
    ids = continue_greedily(model, torch.randint(6, 24, (1, 8), generator=torch.Generator().manual_seed(4)), 22)
    target, eos = Target.of(model, ids), frozenset({int(ids[0, 20])})
    starts = torch.tensor([[9, 12, 16]])
    drafts = Drafts.over(model, adapter, target, starts, BLOCK)
    everything = Drafts.over(model, adapter, Target.of(model, ids, 8, eos), starts, BLOCK)
    assert bool((drafts.beyond >= 0).all()), "all is the model's own text"
    assert bool((everything.beyond == -1).any()), "the text ends in a block"
    for found in (drafts, everything):
        assert torch.equal(found.counted, found.beyond == 0)
        expected = 0.0
        for block in range(3):
            losses, shares = [], []
            for place in range(BLOCK - 1):
                if (distance := int(found.beyond[0, block, place])) < 0:
                    continue
                alone = torch.full_like(found.beyond, -1)
                alone[0, block, place] = 0
                losses.append(float(Objective().loss_sum(model, target, replace(found, beyond=alone))))
                shares.append(0.7**distance)
            if shares:
                expected += sum(map(math.prod, zip(losses, shares, strict=True))) / sum(shares)
        assert float(Objective(beyond=0.7).loss_sum(model, target, found)) == pytest.approx(expected, rel=1e-4)


def test_logits_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = model_of(1), torch.Generator().manual_seed(4)
    ids, starts = torch.randint(6, 24, (2, 30), generator=generator), torch.tensor([[3, 8, 20], [1, 9, 12]])
    draws = Draws.of(2, 3, BLOCK, 0.5, generator)

    def run() -> tuple[Drafts, float]:
        target = Target.of(model, ids)
        drafts = Drafts.over(model, random_adapter(model), target, starts, BLOCK, draws)
        return drafts, float(Objective(beyond=0.9).loss_sum(model, target, drafts))

    whole, loss = run()
    monkeypatch.setattr(objective, "_LOGITS_AT_ONCE", 5 * model.config.vocab_size)
    parts, same = run()
    assert torch.equal(parts.beyond, whole.beyond)
    assert same == pytest.approx(loss, rel=1e-5)


def test_drawn_drafts_have_the_drafter_s_distribution() -> None:
    """Drawn blocks accept as often as the drafter's probability of verify's token says; the others as by argmax."""
    model = model_of(1)
    adapter, generator = random_adapter(model, rank=4), torch.Generator().manual_seed(3)
    ids = continue_greedily(model, torch.randint(6, 24, (1, 8), generator=generator), 22)
    target, places = Target.of(model, ids), torch.arange(8, 22)[None]
    greedy = Drafts.over(model, adapter, target, places, BLOCK)
    chances = model.logits(greedy.hidden[0, :, 0]).softmax(-1).gather(-1, target.tokens[0, 8:22, None]).squeeze(-1)
    start = int((chances - 0.5).abs().argmin())
    chance = float(chances[start])
    assert 0.05 < chance < 0.95, "else this shows nothing"
    rows, blocks = 200, 40  # half of the blocks are drawn
    draws = Draws.of(rows, blocks, BLOCK, 0.5, generator)
    drawn = draws.drawn
    drafts = Drafts.over(
        model,
        adapter,
        Target.of(model, ids.expand(rows, -1)),
        places[:, start, None].expand(rows, blocks),
        BLOCK,
        draws,
    )
    accepted = drafts.accepted[..., 0]
    error = (chance * (1 - chance) / int(drawn.sum())) ** 0.5
    assert float(accepted[drawn].float().mean()) == pytest.approx(chance, abs=4 * error)
    assert bool((drafts.accepted[~drawn] == greedy.accepted[0, start]).all())


def test_the_mask_token_is_never_drawn() -> None:
    model = model_of(1)
    last = torch.full((1, 3, BLOCK - 1), 1 - 2**-24)
    target = Target.of(model, torch.randint(6, 24, (1, 30), generator=torch.Generator().manual_seed(4)))
    hidden = Drafts.over(model, None, target, torch.tensor([[9, 10, 11]]), BLOCK).hidden
    drawn = objective._chosen(model, hidden, Draws(torch.ones(1, 3, dtype=torch.bool), last))
    assert bool((drawn != model.config.mask_token_id).all())


def test_nothing_counts_after_the_end() -> None:
    model = model_of(1)
    ids = continue_greedily(model, torch.randint(6, 24, (2, 8), generator=torch.Generator().manual_seed(4)), 22)
    starts, adapter = torch.tensor([[8, 9, 14]] * 2), random_adapter(model)
    free = Drafts.over(model, adapter, Target.of(model, ids, 8), starts, BLOCK)
    for end in (8, 10, 15):
        eos = frozenset({int(ids[0, end])})
        first = [next((i for i in range(8, 30) if int(token_row[i]) in eos), 99) for token_row in ids]
        found = Drafts.over(model, adapter, Target.of(model, ids, 8, eos), starts, BLOCK)
        before = found.rows < torch.tensor(first)[:, None, None]
        assert torch.equal(found.counted, free.counted & before)
        assert torch.equal(found.accepted, free.accepted & before)


@pytest.mark.parametrize("seed", range(4))
def test_measured_acceptance_equals_self_speculation(seed: int) -> None:
    model = model_of(seed)
    adapter = random_adapter(model, seed)
    prefixes = torch.randint(6, 24, (3, 8), generator=torch.Generator().manual_seed(seed))
    found = measure(model, adapter, Rows.even(continue_greedily(model, prefixes, 40), 8), BLOCK, blocks=5)
    model.draft_adapter = adapter
    for prefix, cycles in zip(prefixes.tolist(), found.cycles, strict=True):
        expected = linear_spec_generate(model, prefix, 41, BLOCK).accepted  # the last token is a bonus after the text
        assert cycles == expected[: len(cycles)]
        assert sum(cycles) > 40 - BLOCK, "cycles whose block would leave the text are left out, no others"
    assert found.length == sum(map(sum, found.cycles)) / sum(map(len, found.cycles))
    assert found.length == pytest.approx(1 + sum(found.by_position))


def test_rows_measured_together_are_as_measured_alone() -> None:
    model, generator = model_of(2), torch.Generator().manual_seed(2)
    adapter, empty = random_adapter(model, 2), torch.zeros(0, dtype=torch.int64)
    prefixes = [torch.randint(6, 24, (length,), generator=generator) for length in (4, 4, 7, 11, 12)]
    rows = Rows.of(prefixes, [empty] * 5, 0, 3)
    rows = Rows(continue_greedily(model, rows.ids, 40, rows.begins), rows.begins)
    for eos in (frozenset[int](), frozenset({int(rows.ids[0, 30]), int(rows.ids[3, 25])})):
        alone = measure(model, adapter, rows, BLOCK, eos, blocks=5)
        seen: list[int] = []
        assert measure(model, adapter, rows, BLOCK, eos, 7, seen.append, batch=2) == alone
        assert seen == [2, 2, 1]


def test_next_cycles_begin_where_cycles_end() -> None:
    model = model_of(1)
    adapter = random_adapter(model)
    prefix = torch.randint(6, 24, (1, 8), generator=torch.Generator().manual_seed(1))
    model.draft_adapter = adapter
    cycles = linear_spec_generate(model, prefix[0].tolist(), 41, BLOCK).accepted
    target = Target.of(model, continue_greedily(model, prefix, 40))
    place = 8
    for count in cycles:
        starts = torch.tensor([[place]])
        starts, weights = next_cycles(target, starts, Drafts.over(model, adapter, target, starts, BLOCK))
        following = int(starts)
        assert float(weights) == pytest.approx(1 / count)
        if place + count > 48 - BLOCK:
            assert following == place, "it would leave the text"
            break
        assert following == place + count
        place = following
    assert max(cycles) > 1


def test_rows_take_turns(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, batch=5)
    seen = []
    for step in range(12):
        trainer.step = step
        seen += trainer._turn(12).tolist()
    laps = [seen[start : start + 12] for start in range(0, 60, 12)]
    assert all(sorted(lap) == list(range(12)) for lap in laps)
    assert laps[0] != laps[1]


def test_walk_follows_cycles() -> None:
    assert walk([3, 9, 9, 1, 2, 9], [False] * 6) == [3, 1, 2]
    assert walk([3, 9, 9, 1, 2, 9], [False] * 4 + [True] * 2) == [3, 1]


# --- training ---


@pytest.mark.parametrize("changed", [{}, {"targets": TARGETS, "mask_row": True}])
def test_only_the_adapter_changes_and_the_loss_falls(tmp_path: Path, changed: dict[str, Any]) -> None:
    trainer = trainer_in(tmp_path, steps=40, learning_rate=0.02, **changed)
    assert len(trainer.adapter.parameters) == (29 if changed else 4)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    matrices = [matrix.detach().clone() for matrix in trainer.adapter.parameters]
    assert finish(trainer, measure_every=40)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not any(torch.equal(now, old) for now, old in zip(trainer.adapter.parameters, matrices, strict=True))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert [row["step"] for row in trainer.curve] == [0, 40]


def test_micro_batches_add_up(tmp_path: Path) -> None:
    whole, parts = trainer_in(tmp_path / "1"), trainer_in(tmp_path / "2", micro_batch=1)
    rows = Rows.even(continue_greedily(whole.model, stream_of().train[:60].view(6, 10), 20), 10)
    losses = [trainer.train_step(rows)["loss"] for trainer in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, other in zip(whole.adapter.parameters, parts.adapter.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("changed", [{}, {"own_text": False}, {"targets": "all", "mask_row": True}])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, changed: dict[str, Any]) -> None:
    straight = trainer_in(tmp_path / "straight", **changed)
    assert finish(straight, measure_every=2)
    stopped = trainer_in(tmp_path / "parts", **changed)
    step = stopped.train_step

    def stop_after_three(rows: Rows) -> dict[str, float]:
        if stopped.step == 3:
            raise KeyboardInterrupt
        return step(rows)

    stopped.train_step = stop_after_three  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        finish(stopped, measure_every=2, save_every=2)
    resumed = trainer_in(tmp_path / "parts", resume=True, **changed)
    assert resumed.step == 2, "the last save"
    assert finish(resumed, measure_every=2)
    assert resumed.curve == straight.curve
    for one, other in zip(resumed.adapter.parameters, straight.adapter.parameters, strict=True):
        assert torch.equal(one, other)
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("straight", "parts"))
    assert first.read_bytes() == second.read_bytes()


def test_own_text_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_nld.training import text

    monkeypatch.setattr(text, "_OWN_BATCH", 2)
    model, prefixes = model_of(), torch.randint(6, 24, (5, 6), generator=torch.Generator().manual_seed(0))
    even = Rows.even(prefixes, 6)
    whole = text.own_text(model, even, 7, 0, tmp_path / "a.pt", lambda _: None).ids
    assert torch.equal(whole, continue_greedily(model, prefixes, 7))
    torch.save(whole[:2], tmp_path / "b.pt")
    ready: list[int] = []
    assert torch.equal(text.own_text(model, even, 7, 0, tmp_path / "b.pt", ready.append).ids, whole)
    assert ready == [2, 2, 1]
    for row in whole.tolist():
        assert row == ar_generate(model, row[:6], 7).ids


def test_own_text_after_prefixes_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_nld.training import text

    monkeypatch.setattr(text, "_OWN_BATCH", 3)
    model, generator = model_of(), torch.Generator().manual_seed(0)
    prefixes = [torch.randint(6, 24, (length,), generator=generator) for length in (2, 5, 9, 9, 3)]
    empty = [torch.zeros(0, dtype=torch.int64)] * 5
    rows = text.own_text(model, Rows.of(prefixes, empty, 0, 3), 7, 3, tmp_path / "a.pt", lambda _: None)
    assert rows.ids.shape == (5, 16)
    for row, prefix in zip(rows.ids.tolist(), prefixes, strict=True):
        written = ar_generate(model, prefix.tolist(), 7).ids
        assert row == written + [3] * (16 - len(written))


def test_the_rate_falls_with_time(tmp_path: Path) -> None:
    settings = Settings.of(**SMALL | {"steps": 1000, "warm_up": 0, "seconds": 10.0})
    rates = [settings.rate(step, seconds) for step, seconds in ((0, 0.0), (1, 5.0), (900, 5.0), (2, 10.0), (3, 11.0))]
    assert rates == pytest.approx([0.01, 0.005, 0.001, 0, 0])
    trainer = trainer_in(tmp_path, steps=1_000_000, seconds=1.0)
    assert finish(trainer, measure_every=1_000_000)
    assert 0 < trainer.step < 1_000_000
    assert trainer.seconds >= 1
    assert [row["step"] for row in trainer.curve] == [0, trainer.step]
    resumed = trainer_in(tmp_path, resume=True, steps=1_000_000, seconds=1.0)
    assert resumed.seconds == trainer.seconds
    assert finish(resumed)
    assert resumed.step == trainer.step, "its time is over"


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_bfloat16_weights_train_a_float32_adapter(tmp_path: Path, micro_batch: int | None) -> None:
    settings = Settings.of(**SMALL | {"steps": 16, "learning_rate": 0.02, "targets": "all", "mask_row": True,
                                      "micro_batch": micro_batch})  # fmt: skip
    trainer = Trainer(model_of().bfloat16(), stream_of(), settings, tmp_path)
    trainer.begin(False)
    assert finish(trainer, measure_every=40)
    assert {matrix.dtype for matrix in trainer.adapter.parameters} == {torch.float32}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_training_stops_when_time_is_up(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    assert not finish(trainer, minutes=1e-9)
    resumed = trainer_in(tmp_path, resume=True)
    assert (resumed.step, len(resumed.curve)) == (0, 1)
    assert finish(resumed)


# --- files ---


def test_file_layout(tmp_path: Path) -> None:
    """The released layout: PEFT's names, o_proj only, scale alpha / r = 4."""
    trainer = trainer_in(tmp_path)
    finish(trainer)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 12, ["o_proj"])
    assert (config["peft_type"], config["bias"], config["use_rslora"]) == ("LORA", "none", False)
    prefix = "base_model.model.encoder.layers"
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        f"{prefix}.{layer}.self_attn.o_proj.lora_{matrix}.weight": shape
        for layer in range(2)
        for matrix, shape in (("A", (3, 128)), ("B", (64, 3)))
    }
    read = DraftAdapter.read(tmp_path)
    assert read.scale == 4.0
    for one, other in zip(read.parameters, trainer.adapter.parameters, strict=True):
        assert torch.equal(one, other)


def test_embedded_adapter_gains_and_changes_no_text() -> None:
    """Fewer cycles for the same text; four prompts of the 87 that docs/user/draft_lora.md measures."""
    folder = checkpoint_path("tiny")
    model, adapter = load_reference(folder), DraftAdapter.read(folder / "linear_spec_lora")
    assert list(adapter.a) == [(layer, "o_proj") for layer in range(model.config.num_hidden_layers)]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cycles = {True: 0, False: 0}
    for _, prompt in held_out_prompts(4):
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        expected = ar_generate(model, ids, 64).ids
        for on in cycles:
            model.draft_adapter = adapter if on else None
            found = linear_spec_generate(model, ids, 64)
            cycles[on] += len(found.accepted)
            assert found.ids == expected
    assert cycles[True] < cycles[False]


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert read_documents(tmp_path / "a.txt", "--data") == ["one\n\ntwo\n"]
    assert read_documents(tmp_path / "a.jsonl", "--data") == ["one", "two"]


# --- the command ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.save(models.random_model(models.small_config()), tmp_path_factory.mktemp("model") / "small")
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(24)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "data.txt").write_text(" ".join(f"t{6 + i * i % 17}" for i in range(900)))
    return folder


def command(checkpoint: Path, *arguments: str, data: str = "data.txt") -> Any:
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "warm_up"]
    path = str(checkpoint / data)
    return invoke("train-draft-lora", str(checkpoint), "--data", path, *small, *arguments)


def test_command_trains_writes_and_draws(checkpoint: Path) -> None:
    result = command(checkpoint)
    assert result.exit_code == 0, result.output
    folder = checkpoint / "linear_spec_lora"
    assert "acceptance length on held-out text" in result.output
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "small"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training",
    ]
    curve = json.loads((folder / "training" / "curve.json").read_text())
    assert [row["step"] for row in curve["curve"]] == [0, 6]
    assert curve["settings"]["rank"] == 3
    assert (folder / "training" / "curve.png").stat().st_size > 1000
    model = load_reference(checkpoint)
    model.draft_adapter = DraftAdapter.read(folder)
    assert linear_spec_generate(model, PROMPT, 20).ids == ar_generate(model, PROMPT, 20).ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets=q_proj,qkv"], "--targets q_proj,qkv: allowed: 'q_proj', 'k_proj'"),
        (["--targets="], "--targets : allowed: 'q_proj'"),
        (["--rank=0"], "--rank 0: allowed: greater than or equal to 1"),
        (["--rank=-3"], "--rank -3"),
        (["--alpha=0"], "--alpha 0.0: allowed: greater than 0"),
        (["--block-length=1"], "--block-length 1"),
        (["--steps=0"], "--steps 0"),
        (["--learning-rate=-1"], "--learning-rate -1.0"),
        (["--temperature=0"], "--temperature 0.0"),
        (["--dtype=int8"], "--dtype int8: allowed: 'float32' or 'bfloat16'"),
        (["--new-tokens=4"], "--new-tokens 4: allowed: the block length (8) or more"),
        (["--prefix-tokens=5000"], "allowed: more than 5000"),
        (["--resume"], "holds no run to continue"),
        (["--held-out=nowhere.txt"], "--held-out nowhere.txt"),
    ],
)
def test_unsuitable_arguments_are_refused(checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = command(checkpoint, f"--output={tmp_path / 'out'}", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no text"),
        ("blank.txt", " \n\n", "holds no text"),
        ("short.txt", "t7 t8", "tokens; allowed: more than"),
        ("empty.jsonl", "", "holds no text"),
        ("broken.jsonl", '{"text": "t7"}\n{"text"', "every line must be an object"),
        ("other.jsonl", '{"prompt": "t7"}', "every line must be an object"),
        ("number.jsonl", '{"text": 7}', "every line must be an object"),
        ("missing.txt", None, "No such file"),
        ("latin.txt", b"caf\xe9", "allowed: a UTF-8 text file"),
    ],
)
def test_unsuitable_data(
    checkpoint: Path, tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    result = command(checkpoint, f"--output={tmp_path / 'out'}", data=str(tmp_path / name))
    assert result.exit_code == 1
    assert message in result.output
    if name != "short.txt":
        assert f"--data {tmp_path / name}" in result.output


def test_missing_model_is_refused(tmp_path: Path) -> None:
    result = invoke("train-draft-lora", str(tmp_path / "gone"), "--data", "x.txt")
    assert result.exit_code == 1
    assert f"MODEL={tmp_path / 'gone'}: no config.json there" in result.output


def test_folder_without_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "data.txt"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    result = command(tmp_path)
    assert result.exit_code == 1
    assert "holds no *.safetensors" in result.output


@pytest.mark.parametrize(("changed", "named"), [({"rank": 4}, "--rank is 4"), ({"seed": 2}, "--seed is 2")])
def test_other_settings_are_not_resumed(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    trainer_in(tmp_path)
    with pytest.raises(NLDError, match=named) as caught:
        trainer_in(tmp_path, resume=True, **changed)
    assert f"began with {SMALL.get(next(iter(changed)), 0)}" in str(caught.value)


def test_other_text_or_weights_are_not_resumed(tmp_path: Path) -> None:
    trainer_in(tmp_path)
    settings = Settings.of(**SMALL)
    with pytest.raises(NLDError, match="--data has changed"):
        Trainer(model_of(), stream_of(1), settings, tmp_path).begin(True)
    with pytest.raises(NLDError, match="MODEL has changed"):
        Trainer(model_of(1), stream_of(), settings, tmp_path).begin(True)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    trainer_in(tmp_path / "run")
    with pytest.raises(NLDError, match="holds an adapter or a run"):
        trainer_in(tmp_path / "run")
    random_adapter(model_of()).write(tmp_path / "adapter", "base")
    with pytest.raises(NLDError, match="holds an adapter or a run"):
        trainer_in(tmp_path / "adapter")


# --- beginning with an adapter ---


def given(folder: Path, **rest: Any) -> DraftAdapter:
    adapter = random_adapter(model_of(), **{"mask_row": True, "targets": TARGETS} | rest)
    adapter.write(folder, "small")
    return adapter


OF_GIVEN = ("--targets=all", "--mask-row", "--alpha=6")
SETTINGS_OF_GIVEN = Settings.of(**SMALL | {"targets": "all", "mask_row": True, "alpha": 6})


def test_training_begins_with_the_adapter(checkpoint: Path, tmp_path: Path) -> None:
    """Its weights are what the first step changes, and the curve begins with its acceptance length."""
    adapter = given(tmp_path / "given")
    start = f"--from={tmp_path / 'given'}"
    arguments = (f"--output={tmp_path / 'out'}", start, *OF_GIVEN)
    result = command(checkpoint, *arguments, "--steps=1", "--learning-rate=1e-9")
    assert result.exit_code == 0, result.output
    trained = DraftAdapter.read(tmp_path / "out")
    assert (trained.scale, trained.targets) == (adapter.scale, TARGETS)
    for before, after in zip(adapter.parameters, trained.parameters, strict=True):
        torch.testing.assert_close(after, before)
    curve = json.loads((tmp_path / "out" / "training" / "curve.json").read_text())["curve"]
    fresh = command(checkpoint, f"--output={tmp_path / 'fresh'}", *OF_GIVEN, "--steps=1")
    assert fresh.exit_code == 0, fresh.output
    untrained = json.loads((tmp_path / "fresh" / "training" / "curve.json").read_text())["curve"]
    assert curve[0] == curve[1] | {"step": 0}
    assert curve[0] != untrained[0]
    again = command(checkpoint, *arguments, "--steps=1", "--learning-rate=1e-9", "--resume")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank=2"], "--rank 2: the adapter of --from {given} has rank 3; allowed: 3 or more"),
        (["--alpha=12"], "--alpha 12: the adapter of --from {given} has scale 2; allowed: 6"),
        (["--targets=o_proj"], "--targets o_proj: the adapter of --from {given} has others; allowed: q_proj,k_proj,"),
        (["--from=nowhere"], "--from nowhere: nowhere has no adapter_config.json"),
    ],
)
def test_an_unsuitable_adapter_is_refused(checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    given(tmp_path / "given")
    start = f"--from={tmp_path / 'given'}"
    result = command(checkpoint, f"--output={tmp_path / 'out'}", start, *OF_GIVEN, *arguments)
    assert result.exit_code == 1
    assert message.format(given=tmp_path / "given") in result.output
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_or_without_a_mask_row_is_refused(tmp_path: Path) -> None:
    given(tmp_path / "bare", mask_row=False)
    with pytest.raises(NLDError, match=r"--mask-row on: .*bare has no row for the mask token"):
        Trainer(model_of(), stream_of(), SETTINGS_OF_GIVEN, tmp_path / "out", tmp_path / "bare")
    given(tmp_path / "given")
    with pytest.raises(NLDError, match=r"--mask-row off: .*given has a row for the mask token; allowed: --mask-row"):
        plain = SETTINGS_OF_GIVEN.model_copy(update={"mask_row": False})
        Trainer(model_of(), stream_of(), plain, tmp_path / "out", tmp_path / "given")
    other = models.random_model(models.small_config(num_hidden_layers=3), 0).requires_grad_(False)
    with pytest.raises(NLDError, match=r"--from .*given: .*layers"):
        Trainer(other, stream_of(), SETTINGS_OF_GIVEN, tmp_path / "out", tmp_path / "given")


def test_a_higher_rank_begins_with_the_same_drafts(tmp_path: Path) -> None:
    adapter = given(tmp_path / "given")
    settings = SETTINGS_OF_GIVEN.model_copy(update={"rank": 5, "alpha": 10.0})
    trainer = Trainer(model_of(), stream_of(), settings, tmp_path / "out", tmp_path / "given")
    assert {len(a) for a in trainer.adapter.a.values()} == {5}
    model, ids = model_of(), torch.tensor([[*PROMPT, 5, 5, 5]])
    found = []
    for model.draft_adapter in (adapter, trainer.adapter):
        found.append(model.draft(ids).detach())
    torch.testing.assert_close(found[1], found[0])
    trainer.begin(False)
    finish(trainer)
    assert all(b[:, 3:].any() for b in trainer.adapter.b.values())


def test_a_run_does_not_go_on_from_another_adapter(tmp_path: Path) -> None:
    given(tmp_path / "given")
    Trainer(model_of(), stream_of(), SETTINGS_OF_GIVEN, tmp_path / "out", tmp_path / "given").begin(False)
    given(tmp_path / "other", seed=1)
    for start in (tmp_path / "other", None):
        with pytest.raises(NLDError, match="--from has changed since the run began"):
            Trainer(model_of(), stream_of(), SETTINGS_OF_GIVEN, tmp_path / "out", start).begin(True)
