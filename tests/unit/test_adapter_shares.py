"""The ranks of tensor parallelism, one after the other, together give what one rank gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.support.adapters import random_adapter
from tests.support.models import small_config
from vllm_nld.checkpoints.draft_lora import TARGETS, DraftLoRA
from vllm_nld.config import NemotronLabsDiffusionConfig
from vllm_nld.model import draft_adapter
from vllm_nld.model.adapter_shares import PACKED, ROW_PARALLEL, shares_of
from vllm_nld.model.draft_adapter import DraftAdapter, MaskRow, load_adapter
from vllm_nld.reference import DraftAdapter as Reference

CONFIG = small_config()


def loaded(lora: DraftLoRA, config: NemotronLabsDiffusionConfig, linear: str, rank: int, shards: int) -> DraftAdapter:
    """A rank's adapter of layer 1, read from disk."""
    shares = [share for share in shares_of(config, linear, rank, shards) if share.target in lora.targets]
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), DraftAdapter(lora.rank, shares)])})
    load_adapter(lora, model)
    return model["layers"][1]


def added(adapter: DraftAdapter, x: Tensor, width: int) -> Tensor:
    output = torch.zeros(len(x), width)
    adapter(x, output)
    return output


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("linear", PACKED)
@pytest.mark.parametrize("targets", [TARGETS, ("k_proj", "o_proj", "up_proj", "down_proj")])
def test_ranks_add_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, linear: str, shards: int, targets: tuple[str, ...]
) -> None:
    """With 4 ranks, the 2 KV heads are replicated."""
    monkeypatch.setattr(draft_adapter, "adapted_tokens", lambda _: slice(None))
    made = random_adapter(CONFIG, targets=targets)
    made.write(tmp_path, "somewhere")
    lora = DraftLoRA.open(tmp_path, CONFIG)
    total = torch.zeros(5, CONFIG.hidden_size)
    x = torch.randn(5, len(shares_of(CONFIG, linear, 0, 1)[0].inputs), generator=torch.Generator().manual_seed(0))
    for rank in range(shards):
        own = shares_of(CONFIG, linear, rank, shards)
        width = own[-1].start + len(own[-1].outputs)
        inputs = x[:, own[0].inputs.start : own[0].inputs.stop]
        found = added(loaded(lora, CONFIG, linear, rank, shards), inputs, width if linear not in ROW_PARALLEL else 64)
        if linear in ROW_PARALLEL:
            total += found
            continue
        for share in own:
            # vLLM gives a rank whole heads: rank r of 4 has the KV head r // 2.
            expected = _expected(made, share.target, x)
            pieces = min(shards, 2) if share.target in ("k_proj", "v_proj") else shards
            cut = expected.chunk(pieces, dim=1)[rank * pieces // shards]
            torch.testing.assert_close(found[:, share.start : share.start + cut.shape[1]], cut)
    if linear in ROW_PARALLEL:
        torch.testing.assert_close(total, _expected(made, PACKED[linear][0], x))


def _expected(made: Reference, target: str, x: Tensor) -> Tensor:
    if (1, target) not in made.b:
        outputs = next(share for name in PACKED for share in shares_of(CONFIG, name, 0, 1) if share.target == target)
        return torch.zeros(len(x), len(outputs.outputs))
    return made.add(1, target, x, torch.zeros(len(x), len(made.b[1, target])))


def test_shares_are_those_of_vllm_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own loader, asked for each rank's rows of weights that hold their row's number."""
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.linear import QKVParallelLinear

    for shards in (1, 2, 4):
        for rank in range(shards):
            monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=rank, world_size=shards))
            qkv = QKVParallelLinear(64, 32, 4, 2, bias=False)
            rows = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
            for name, size in rows.items():
                numbers = torch.arange(size).float()[:, None].expand(size, 64).contiguous()
                qkv.weight_loader(qkv.weight, numbers, name[0])
            for share in shares_of(CONFIG, "qkv_proj", rank, shards):
                found = qkv.weight[share.start : share.start + len(share.outputs), 0]
                assert found.tolist() == list(share.outputs), (shards, rank, share)


def test_the_mask_token_s_row_is_whole_on_every_rank(tmp_path: Path) -> None:
    made = random_adapter(CONFIG, mask_row=True)
    made.write(tmp_path, "somewhere")
    model = SimpleNamespace(named_modules=lambda: [("model.mask_row", row)])
    row = MaskRow(CONFIG.hidden_size, CONFIG.mask_token_id)
    load_adapter(DraftLoRA.open(tmp_path, CONFIG), model)  # type: ignore[arg-type]
    assert torch.equal(row.row, made.mask_row)
