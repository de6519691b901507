"""The training objective of the embedded checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from objective import Batch, ar_loss_sum, draft_loss_sum, draft_weights, dual_stream_mask, joint_loss_sum
from self_text import DraftStage, own_text

from tests.support import models
from vllm_nld.reference import KVCache, ar_generate

LENGTH, BLOCK = 16, 4


def draw(seed: int = 0, sequences: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.draw(torch.randint(6, 24, (sequences, LENGTH), generator=generator), generator)


def test_masking_follows_the_recipe() -> None:
    mask = dual_stream_mask(8, 4, torch.device("cpu"))
    assert mask.shape == (16, 16)
    for row in range(16):
        for column in range(16):
            row_noisy, column_noisy = row < 8, column < 8
            i, j = row % 8, column % 8
            if row_noisy and column_noisy:
                allowed = (i < 4) == (j < 4)
            elif row_noisy:
                allowed = j < 4 <= i
            else:
                allowed = not column_noisy and j <= i
            assert bool(mask[row, column]) == allowed, (row, column)


def test_ar_part_equals_a_language_model_loss() -> None:
    """The clean stream must not depend on the noise: the AR loss is equal for any mask."""
    model, batch = models.random_model(models.small_config()), draw()
    with torch.no_grad():
        plain = ar_loss_sum(model, batch.ids)
        logits = model.diffusion_head(
            model.hidden(batch.ids, torch.arange(LENGTH), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
        )
        chances = logits.log_softmax(-1)[:, :-1].gather(-1, batch.ids[:, 1:, None])
        for masked in (batch.masked, torch.ones_like(batch.masked)):
            joint, _ = joint_loss_sum(model, Batch(batch.ids, masked, batch.probability), BLOCK)
            assert float(joint) == pytest.approx(float(plain), rel=1e-5)
    assert float(plain) == pytest.approx(-float(chances.sum()), rel=1e-5)


def test_diffusion_part_equals_a_draft_pass() -> None:
    """Block by block over a cached clean prefix, as the engine drafts, gives the dual stream's diffusion loss."""
    model, batch = models.random_model(models.small_config()), draw(seed=1)
    assert batch.masked.any()
    expected = 0.0
    with torch.no_grad():
        for ids, masked, probability in zip(batch.ids, batch.masked, batch.probability, strict=True):
            cache = KVCache()
            for start in range(0, LENGTH, BLOCK):
                cut = slice(start, start + BLOCK)
                noisy = torch.where(masked[cut], model.config.mask_token_id, ids[cut])[None]
                everything = torch.ones(1, start + BLOCK, dtype=torch.bool)
                hidden = model.hidden(noisy, torch.arange(start, start + BLOCK), everything, cache)
                chances = model.diffusion_head(hidden)[0].log_softmax(-1)
                for row in range(BLOCK):
                    if masked[start + row]:
                        expected -= float(chances[row, ids[start + row]]) / float(probability)
                model.causal(ids[None, cut], cache)
        _, found = joint_loss_sum(model, batch, BLOCK)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_split_keeps_everything() -> None:
    batch = draw(sequences=5)
    parts = batch.split(2)
    assert [part.ids.shape[0] for part in parts] == [2, 2, 1]
    for name in ("ids", "masked", "probability"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    for joint in (False, True):
        assert sum(part.global_count(joint) for part in parts) == batch.global_count(joint)
    assert batch.global_count(False) == 5 * LENGTH
    assert batch.global_count(True) == 5 * LENGTH + int(batch.masked.sum())


def test_draw_follows_its_generator() -> None:
    ids = torch.zeros(400, 50, dtype=torch.long)
    first, again, other = (Batch.draw(ids, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.masked, again.masked)
    assert torch.equal(first.probability, again.probability)
    assert not torch.equal(first.masked, other.masked)
    assert first.probability.shape == (400, 1)
    assert 1e-3 <= float(first.probability.min()) < float(first.probability.max()) <= 1
    assert (first.masked.float().mean(1) - first.probability[:, 0]).mean().abs() < 0.02


def test_draft_weights() -> None:
    weights = draft_weights(2 * BLOCK, BLOCK).tolist()
    assert weights == pytest.approx([0, 1, 0.85, 0.85**2] * 2)


def test_draft_loss_equals_a_single_pass_draft_after_the_prefix() -> None:
    """Every block of the second half, drafted over its cached clean prefix, gives the weighted draft loss."""
    model, ids = models.random_model(models.small_config()), draw(seed=2).ids
    prefix, weights = 2 * BLOCK, draft_weights(BLOCK, BLOCK)
    expected = 0.0
    with torch.no_grad():
        for row in ids:
            cache = KVCache()
            model.causal(row[None, :prefix], cache)
            for start in range(prefix, LENGTH, BLOCK):
                own = row[start : start + BLOCK]
                noisy = torch.cat((own[:1], torch.full((BLOCK - 1,), model.config.mask_token_id)))[None]
                everything = torch.ones(1, start + BLOCK, dtype=torch.bool)
                hidden = model.hidden(noisy, torch.arange(start, start + BLOCK), everything, cache)
                chances = model.diffusion_head(hidden)[0].log_softmax(-1).gather(-1, own[:, None])[:, 0]
                expected -= float((chances * weights).sum())
                model.causal(own[None], cache)
        anchor, drafts = draft_loss_sum(model, model, ids, prefix, BLOCK)
    assert float(drafts) == pytest.approx(expected, rel=1e-4)
    assert float(anchor) == pytest.approx(0, abs=1e-4)


def test_anchor_equals_divergence_from_causal_pass_of_teacher() -> None:
    model, teacher = (models.random_model(models.small_config(), seed=seed) for seed in (0, 1))
    ids = draw(seed=3).ids
    with torch.no_grad():
        anchor, _ = draft_loss_sum(model, teacher, ids, 2 * BLOCK, BLOCK)
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        hidden = [m.hidden(ids, torch.arange(LENGTH), causal) for m in (model, teacher)]
        found, wanted = (m.diffusion_head(x).log_softmax(-1) for m, x in zip((model, teacher), hidden, strict=True))
    assert float(anchor) == pytest.approx(float((wanted.exp() * (wanted - found)).sum()), rel=1e-4)
    assert float(anchor) > 1


def test_own_text_equals_greedy_continuation() -> None:
    model = models.random_model(models.small_config())
    stream = np.random.default_rng(0).integers(6, 24, 500).astype(np.int32)
    prefix, new_tokens = 8, 6
    rows = own_text(model, stream, 5, prefix, new_tokens, seed=0)
    assert rows.shape == (5, prefix + new_tokens)
    text = "".join(map(chr, stream))
    for row in rows.tolist():
        assert "".join(map(chr, row[:prefix])) in text
        # Own text is made under bfloat16 autocast, the reference in float32, so a near-tie may end the agreement.
        assert row[prefix] == ar_generate(model, row[:prefix], new_tokens, eos_token_id=-1).ids[prefix]


def test_interrupted_draft_stage_keeps_its_teacher_and_text(tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(6, 24, 500).astype(np.int32)
    args = argparse.Namespace(length=LENGTH, own_rows=6, seed=0)
    first, later = (models.random_model(models.small_config(), seed=seed) for seed in (0, 1))
    begun = DraftStage.prepare(tmp_path / "stage.pt", first, stream, args)
    resumed = DraftStage.prepare(tmp_path / "stage.pt", later, stream, args)
    assert torch.equal(resumed.rows, begun.rows)
    for key, tensor in first.state_dict().items():
        assert torch.equal(resumed.teacher.state_dict()[key], tensor)
    batches = [begun.sample(4, torch.Generator().manual_seed(step)) for step in (0, 0, 1)]
    assert batches[0].shape == (4, LENGTH // 2 + LENGTH // 4)
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
