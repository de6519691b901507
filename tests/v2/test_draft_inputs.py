"""The speculator's kernels against what they say they do, in Triton's interpreter, without an engine."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.interpreted import INTERPRETING

if INTERPRETING:
    from vllm_nld.ops import BIDIRECTIONAL
    from vllm_nld.speculator import kernels
    from vllm_nld.speculator.buffers import OWN_STREAM, DraftBuffers, Shape, StepTensors

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="its tensors are on the CPU")

MASK, PAGE, LONGEST, BLOCK, REQUESTS = 5, 16, 100, 6, 7


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def step() -> Any:
    """Five rows of seven requests: one prefills, one is AR, one is at the end of its room, two draft."""
    generator = torch.Generator().manual_seed(1)
    return StepTensors(
        requests=torch.tensor([4, 0, 6, 2, 3]),
        seq_lens=ints(20, 33, 98, 9, 50),
        num_rejected=ints(3, 0, 0, 0, 1),
        last_sampled=torch.arange(REQUESTS).view(-1, 1) + 10,
        block_table=torch.randint(1, 90, (REQUESTS, 8), generator=generator, dtype=torch.int32),
        temperature=torch.arange(REQUESTS) / 10,
        seeds=torch.arange(REQUESTS) * 100,
    )


def filled(step: Any, padded: int, slot_length: int = BLOCK) -> Any:
    buffers = DraftBuffers(Shape(REQUESTS, BLOCK, 8, PAGE, LONGEST, MASK), torch.float32, torch.device("cpu"))
    buffers.valid.fill_(9)
    lengths, kinds, adapters = ints(1, 1, 1, 6, 4, 1, 6), ints(1, 1, 1, 0, 1, 1, 0), ints(0, 0, 0, 1, 0, 0, 1)
    buffers.fill(ints(0, -1, 1, -1, 2), step, (lengths, kinds, adapters), 3, padded, slot_length)
    return buffers


@pytest.mark.parametrize("padded", [3, 5])
def test_inputs_of_a_pass(step: Any, padded: int) -> None:
    buffers = filled(step, padded)
    ids, positions = buffers.inputs(0, padded, BLOCK)
    metadata = buffers.metadata(0, padded, BLOCK, 99, adapts=True)
    # Row 0 is a block of 4 after 17 tokens; row 2 has room for 2 after 98; row 4 is whole, after 49.
    prefixes, lengths, seeds = [17, 98, 49], [4, 2, 6], [14, 16, 13]
    for slot, (prefix, length, seed) in enumerate(zip(prefixes, lengths, seeds, strict=True)):
        own = slice(slot * BLOCK, (slot + 1) * BLOCK)
        assert ids[own].tolist() == [seed] + [MASK] * (BLOCK - 1)
        assert positions[own].tolist() == [min(prefix + place, LONGEST - 1) for place in range(BLOCK)]
        assert metadata.prefix_lens[slot] == prefix
        used = -(-prefix // PAGE)
        assert metadata.block_table[slot, :used].equal(step.block_table[[0, 2, 4][slot], :used])
        assert metadata.adapted[own].flatten().tolist() == [[0, 1, 1][slot]] * BLOCK
        requests, places, columns = buffers.draws(slot, 1, BLOCK)
        assert requests.tolist() == [[4, 6, 3][slot] if place < length - 1 else -1 for place in range(BLOCK - 1)]
        own_stream = [0, OWN_STREAM, OWN_STREAM][slot]
        assert places.tolist() == [prefix + place + own_stream for place in range(BLOCK - 1)]
        assert columns.tolist() == list(range(BLOCK - 1))
    assert metadata.block_starts.tolist() == [BLOCK * slot for slot in range(padded + 1)]
    parts = buffers.metadata(0, padded, BLOCK, 99, adapts=False, whole=False)
    lengths += [BLOCK] * (padded - 3)
    assert parts.block_starts.diff().tolist() == [part for own in lengths for part in (own, BLOCK - own)]
    assert parts.prefix_lens.tolist() == [part for own in metadata.prefix_lens.tolist() for part in (own, 0)]
    assert parts.block_table[::2].equal(metadata.block_table) and len(parts.block_table) == 2 * padded
    assert (parts.mask_kinds == BIDIRECTIONAL).all() and parts.adapted is None
    for slot in range(3, padded):  # padding reads no page, belongs to no request, and sees itself
        assert ids[slot * BLOCK : (slot + 1) * BLOCK].tolist() == [MASK] * BLOCK
        assert metadata.prefix_lens[slot] == 0
        assert buffers.draws(slot, 1, BLOCK)[0].tolist() == [-1] * (BLOCK - 1)


def test_results_go_to_their_rows(step: Any) -> None:
    buffers = filled(step, 5)
    buffers.hand_out(torch.arange(5 * (BLOCK - 1)) + 100, 0, 5, BLOCK)
    seeds = (10 + step.requests).tolist()
    assert buffers.drafts[:5].tolist() == [
        [100, 101, 102, seeds[0], seeds[0]],  # after a shorter block: tokens that the model can read
        [seeds[1]] * 5,
        [105, seeds[2], seeds[2], seeds[2], seeds[2]],
        [seeds[3]] * 5,
        [110, 111, 112, 113, 114],
    ]
    assert buffers.valid.tolist() == [0, 9, 0, 5, 3, 9, 1]  # of the batch's requests only
    assert buffers.temperature[[4, 6, 3]].equal(step.temperature[[4, 6, 3]])
    assert buffers.seeds[[4, 6, 3]].equal(step.seeds[[4, 6, 3]])


def test_shorter_slots_cut_no_block_that_fits(step: Any) -> None:
    buffers = filled(step, 3, slot_length=4)
    assert buffers.metadata(0, 3, 4, 99, False, whole=False).block_starts.diff().tolist() == [4, 0, 2, 2, 4, 0]
    buffers.hand_out(torch.arange(9) + 100, 0, 3, 4)
    assert buffers.drafts[0, :3].tolist() == [100, 101, 102] and buffers.drafts[4, :3].tolist() == [106, 107, 108]
    assert buffers.draws(1, 2, 4)[2].tolist() == [0, 1, 2] * 2


def accepted(drafts: list[int], targets: list[int], kind: int, valid: int) -> list[int]:
    text = []
    for draft, target in zip(drafts[:valid], targets, strict=False):
        if draft < 0 or (draft != target and kind != kernels.COMMIT):
            return [*text, target]
        text.append(draft)
    return [*text, targets[len(text)]]


@pytest.mark.parametrize("every", [True, False])
def test_drafts_are_accepted_as_far_as_they_are_the_verifier_s(every: bool) -> None:
    rng = random.Random(3)
    for _ in range(20):
        rows = rng.randint(1, 5)
        requests = rng.sample(range(REQUESTS), rows)
        counts = [rng.randint(0, 4) for _ in requests]
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count + 1)
        targets = [rng.randint(0, 2) for _ in range(starts[-1])]
        drafts = [rng.choice([-1, 0, 1, 2, 2, 1]) for _ in range(starts[-1])]
        kinds = [rng.randint(0, 2) for _ in range(REQUESTS)]
        valid = [rng.randint(0, 5) for _ in range(REQUESTS)]
        handed = torch.arange(REQUESTS * 5).view(REQUESTS, 5) + 50
        sampled, found = torch.full((rows, 6), -7), torch.full((rows,), -7, dtype=torch.int32)
        kernels.accept_kernel[(rows,)](
            sampled, 6, found, ints(*drafts), torch.tensor(targets), ints(*starts), torch.tensor(requests),
            ints(*kinds), ints(*valid), handed, 5, EVERY=every,
        )  # fmt: skip
        for row, request in enumerate(requests):
            if not every and kinds[request] == kernels.REJECTION:
                assert found[row] == -7 and (sampled[row] == -7).all()
                continue
            own = slice(starts[row], starts[row + 1])
            text = accepted(drafts[own][1:], targets[own], kinds[request], valid[request])
            if kinds[request] == kernels.COMMIT and len(text) == counts[row] + 1 and valid[request] > counts[row]:
                text[-1] = int(handed[request, counts[row]])  # what a step has no room for comes after its drafts
            assert found[row] == len(text)
            assert sampled[row, : len(text)].tolist() == text


def test_padding_is_not_a_row_s(step: Any) -> None:
    """A batch in which no request drafts leaves no draft of an earlier step."""
    buffers = filled(step, 3)
    ones = ints(*[1] * REQUESTS)
    buffers.fill(ints(-1, -1, -1, -1, -1), step, (ones, ones, ones), 0, 0, BLOCK)
    assert buffers.valid[step.requests].tolist() == [0] * 5
    assert (buffers.drafts[:5] >= 0).all()


def test_rows_of_the_step_before_are_not_copied_again(step: Any) -> None:
    buffers = filled(step, 3)
    drafting = np.array([True, False, True])
    slots = buffers.slot_of_row(drafting)
    assert slots.tolist() == [0, -1, 1] and slots.dtype == torch.int32
    assert buffers.slot_of_row(drafting.copy()) is slots
    assert buffers.slot_of_row(~drafting).tolist() == [-1, 0, -1]
    assert buffers.slot_of_row(drafting).tolist() == [0, -1, 1]
    assert buffers.slot_of_row(np.array([True, False, True, False])).tolist() == [0, -1, 1, -1]
