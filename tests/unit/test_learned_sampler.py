"""The learned sampler: files, independence of rows and padding, and that it knows more than the model's confidence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.errors import NLDError
from vllm_nld.learned_sampler import LearnedSampler, LearnedSamplerConfig
from vllm_nld.reference import KVCache, load_reference

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


def test_the_paper_s_size() -> None:
    sampler = LearnedSampler(LearnedSamplerConfig(vocab_size=10))
    assert 4.5e6 < sum(parameter.numel() for parameter in sampler.parameters()) < 5.1e6


def test_saved_and_loaded(tmp_path: Path) -> None:
    sampler, (logits, blocks, masked) = small(), states(3, 8)
    sampler.save(tmp_path)
    loaded = LearnedSampler.load(tmp_path)
    assert torch.allclose(
        loaded.scores(logits, blocks, masked), sampler.scores(logits, blocks, masked), atol=5e-3
    )
    found = loaded.scores(logits, blocks, masked)
    assert found.shape == (3, 8)
    assert (found[~masked] == 0).all()
    assert ((found > 0) & (found < 1))[masked].all()


def test_an_untrained_network_says_what_the_model_says() -> None:
    sampler = LearnedSampler(LearnedSamplerConfig(vocab_size=20)).eval()
    logits, blocks, masked = states(4, 8)
    confidence = logits.softmax(-1).amax(-1)
    assert torch.allclose(sampler.scores(logits, blocks, masked)[masked], confidence[masked], atol=1e-4)


def test_a_row_depends_on_neither_other_rows_nor_padding() -> None:
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
def test_files_that_do_not_fit(tmp_path: Path, broken: str) -> None:
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


@torch.inference_mode()
def test_it_knows_more_than_the_model_s_confidence() -> None:
    """Log loss of "the most probable token is what serial denoising ends with", on held-out modules."""
    from tokenizers import Tokenizer

    model, sampler = load_reference(checkpoint_path("tiny")), LearnedSampler.load(FOLDER)
    tokenizer, mask_id = (
        Tokenizer.from_file(str(checkpoint_path("tiny") / "tokenizer.json")),
        model.config.mask_token_id,
    )
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:96] for _, text in held_out_prompts(120)]
    prefixes = torch.tensor([row for row in ids if len(row) == 96])
    cache = KVCache()
    seeds = model.causal(prefixes, cache)[:, -1].argmax(-1, keepdim=True)
    blocks = torch.cat((seeds, torch.full((len(seeds), 15), mask_id)), dim=1)
    seen = []
    while (masked := blocks == mask_id).any():
        logits = model.bidirectional(blocks, cache)
        confidence, tokens = logits.softmax(-1).max(-1)
        seen.append((masked, tokens, confidence, sampler.scores(logits, blocks, masked)))
        surest = confidence.masked_fill(~masked, -1.0).argmax(1, keepdim=True)
        blocks.scatter_(1, surest, tokens.gather(1, surest))
    losses = []
    for column in (2, 3):
        predicted = torch.cat([state[column][state[0]] for state in seen]).clamp(1e-4, 1 - 1e-4)
        right = torch.cat([(state[1] == blocks)[state[0]] for state in seen]).float()
        losses.append(float(torch.nn.functional.binary_cross_entropy(predicted, right)))
    assert losses[1] < 0.97 * losses[0]
