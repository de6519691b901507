"""Text of the model's own making: real prefixes, continued greedily by the causal pass.

A draft is judged against what the causal pass would say, not against what a human wrote. Real text hides that from
the draft (many continuations are right, one is verified), so the draft stage trains on the model's own continuations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vllm_nld.reference.model import KVCache, ReferenceModel


@torch.inference_mode()
def continue_greedily(model: ReferenceModel, prefixes: Tensor, new_tokens: int) -> Tensor:
    """Return ``[sequences, prefix + new_tokens]``: int64 ``prefixes`` and their greedy continuations."""
    cache, columns = KVCache(), [prefixes]
    with torch.autocast(prefixes.device.type, dtype=torch.bfloat16):
        for _ in range(new_tokens):
            logits = model.causal(columns[-1], cache)[:, -1]
            columns.append(logits.argmax(-1, keepdim=True))
    return torch.cat(columns, dim=1)


def make_pool(model: ReferenceModel, stream: np.ndarray, count: int, length: int, seed: int) -> Tensor:
    """Return int64 ``[count, length]`` on the CPU: each row is half real text, half greedy continuation."""
    generator = torch.Generator().manual_seed(seed)
    device, prefix = next(model.parameters()).device, length // 2
    starts = torch.randint(len(stream) - prefix, (count,), generator=generator).tolist()
    real = torch.stack([torch.from_numpy(stream[s : s + prefix].astype(np.int64)) for s in starts])
    parts = tqdm(real.split(128), unit="batch", desc="continuing text", leave=False)
    return torch.cat([continue_greedily(model, part.to(device), length - prefix).cpu() for part in parts])


class Pool:
    """Rows of half real, half own text, renewed now and then as the model changes, kept on disk for a resumed run."""

    ROWS = 768

    def __init__(self, file: Path, stream: np.ndarray, length: int, refresh_every: int, seed: int) -> None:
        self.file, self.stream, self.length = file, stream, length
        self.refresh_every, self.seed = refresh_every, seed
        self.age, self.rows = -1, torch.empty(0)
        if file.is_file():
            self.age, self.rows = torch.load(file)

    def sample(self, model: ReferenceModel, step: int, count: int) -> Tensor:
        """Return the draft stage's batch of ``step`` (0 is its first): int64 ``[count, length]``."""
        age = step // self.refresh_every
        if age != self.age:
            seed = self.seed * 1_000_003 + age
            self.age, self.rows = age, make_pool(model, self.stream, self.ROWS, self.length, seed)
            torch.save((self.age, self.rows), self.file)
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        return self.rows[torch.randperm(len(self.rows), generator=generator)[:count]]
