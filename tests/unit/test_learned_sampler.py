"""The learned sampler: files, and independence of rows and padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.draft_pass.learned_sampler import WRONG_COST, Forecast, LearnedSampler, LearnedSamplerConfig
from vllm_nld.errors import NLDError

FOLDER = checkpoint_path("tiny") / "learned_sampler"


def small() -> LearnedSampler:
    torch.manual_seed(0)
    sampler = LearnedSampler(LearnedSamplerConfig(vocab_size=20, d_model=16, layers=2, heads=2, feed_forward=32))
    for parameter in sampler.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sampler.token_features.normal_()
    return sampler.eval()


def states(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.randn(rows, length, 20) * 3
    masked = torch.rand(rows, length) < 0.6
    return logits, torch.where(masked, 5, torch.randint(6, 20, (rows, length))), masked


def test_size_equals_that_of_the_paper() -> None:
    sampler = LearnedSampler(LearnedSamplerConfig(vocab_size=10))
    assert 4.7e6 < sum(parameter.numel() for parameter in sampler.parameters()) < 5.3e6


def test_saved_sampler_can_be_loaded(tmp_path: Path) -> None:
    sampler, (logits, blocks, masked) = small(), states(3, 8)
    sampler.save(tmp_path)
    loaded = LearnedSampler.load(tmp_path)
    assert torch.allclose(loaded.scores(logits, blocks, masked), sampler.scores(logits, blocks, masked), atol=5e-3)
    found = loaded.scores(logits, blocks, masked)
    assert found.shape == (3, 8)
    assert (found[~masked] == 0).all()
    assert ((found >= 0) & (found <= 1))[masked].all()


def test_untrained_network_returns_confidence_of_the_model() -> None:
    sampler = LearnedSampler(LearnedSamplerConfig(vocab_size=20)).eval()
    logits, blocks, masked = states(4, 8)
    confidence = logits.softmax(-1).amax(-1)
    assert torch.allclose(sampler.scores(logits, blocks, masked)[masked], confidence[masked], atol=1e-4)


def test_score_counts_the_cost_of_a_commit() -> None:
    sure = torch.tensor([50.0])
    share = torch.logit(torch.tensor([1 - WRONG_COST / 2]))
    assert float(Forecast(sure, sure, -sure).score()) == pytest.approx(1.0)
    assert float(Forecast(-sure, sure, -sure).score()) == 0.0
    assert float(Forecast(sure, share, -sure).score()) == pytest.approx(0.5, abs=1e-5), "right, but it changes the rest"
    assert float(Forecast(-sure, sure, share).score()) == pytest.approx(0.5, abs=1e-5), (
        "wrong, but little depends on it"
    )


def test_row_depends_neither_on_other_rows_nor_on_padding() -> None:
    sampler, (logits, blocks, masked) = small(), states(4, 8)
    present = torch.ones_like(masked)
    whole = sampler.scores(logits, blocks, masked, present)
    for row in range(4):
        alone = sampler.scores(*(x[row : row + 1] for x in (logits, blocks, masked)))
        assert torch.allclose(alone[0], whole[row], atol=1e-5)
    wide = [torch.nn.functional.pad(x, (0, 5)) for x in (blocks, masked, present)]
    padded = sampler.scores(torch.nn.functional.pad(logits, (0, 0, 0, 5), value=3.0), *wide)
    assert torch.allclose(padded[:, :8], whole, atol=1e-5)


def test_logits_of_decided_positions_do_not_matter() -> None:
    sampler, (logits, blocks, masked) = small(), states(4, 8)
    before = sampler.scores(logits, blocks, masked)
    assert torch.equal(sampler.scores(torch.where(masked[..., None], logits, 1e3), blocks, masked), before)


@pytest.mark.parametrize("broken", ["missing", "config", "size"])
def test_files_that_do_not_fit_are_refused(tmp_path: Path, broken: str) -> None:
    small().save(tmp_path)
    if broken == "missing":
        (tmp_path / "model.safetensors").unlink()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"speed": 1} if broken == "config" else {"d_model": 32}
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NLDError, match="learned sampler in") as caught:
        LearnedSampler.load(tmp_path)
    assert "\n" not in str(caught.value)
