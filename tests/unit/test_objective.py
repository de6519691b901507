"""The training objective of the embedded checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import models
import pytest
import torch

from vllm_nld.reference import KVCache

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_tiny"))

from objective import Batch, ar_loss_sum, dual_stream_mask, joint_loss_sum

LENGTH, BLOCK = 16, 4


def draw(seed: int = 0, sequences: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch.draw(torch.randint(6, 24, (sequences, LENGTH), generator=generator), generator)


def test_mask_rule() -> None:
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


def test_ar_part_is_an_ordinary_language_models_loss() -> None:
    """The clean stream must not see the noise: whatever is masked, the AR loss is the same."""
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


def test_diffusion_part_is_a_draft_pass() -> None:
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


def test_draft_batches_mask_all_but_seeds() -> None:
    batch = Batch.draw_drafts(torch.zeros(2, 8, dtype=torch.long), 4)
    assert batch.masked.tolist() == [[False, True, True, True] * 2] * 2
    assert batch.probability.tolist() == [[1.0], [1.0]]
