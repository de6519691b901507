"""The model's own text: real prefixes, continued greedily by the causal pass.

A draft is compared with the causal pass's text, not with human text. Real text does not show that to the draft (many
continuations are right, one is verified), so the draft stage trains on the model's own continuations.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import corpus
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


def own_text(model: ReferenceModel, stream: np.ndarray, count: int, prefix: int, new_tokens: int, seed: int) -> Tensor:
    """Return int64 ``[count, prefix + new_tokens]`` on the CPU: real text from ``stream``, then its continuation."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    real = corpus.draw(stream, count, prefix, generator)
    parts = tqdm(real.split(128), unit="batch", desc="own text")
    return torch.cat([continue_greedily(model, part.to(device), new_tokens).cpu() for part in parts])


@dataclass
class DraftStage:
    """The fixed inputs of the draft stage: the model after the earlier stages, and that model's own text."""

    teacher: ReferenceModel
    rows: Tensor
    prefix: int

    @classmethod
    def prepare(cls, file: Path, model: ReferenceModel, stream: np.ndarray, args: argparse.Namespace) -> DraftStage:
        """Make it from the current model, or load what an interrupted run saved in ``file``."""
        prefix, new_tokens = args.length // 2, args.length // 4
        teacher = copy.deepcopy(model).requires_grad_(False)
        if file.is_file():
            state = torch.load(file, map_location=next(model.parameters()).device)
            teacher.load_state_dict(state["teacher"])
            return cls(teacher, state["rows"].cpu(), prefix)
        rows = own_text(teacher, stream, args.own_rows, prefix, new_tokens, args.seed)
        torch.save({"teacher": teacher.state_dict(), "rows": rows}, file)
        return cls(teacher, rows, prefix)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return a batch, int64 ``[count, length]``."""
        return self.rows[torch.randperm(len(self.rows), generator=generator)[:count]]
