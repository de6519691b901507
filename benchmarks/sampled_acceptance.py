"""The cost of a seed: acceptance length of sampled drafts with rejection sampling, and with the seed's own draws.

    python benchmarks/sampled_acceptance.py [--prompts 16] [--max-tokens 128] [--temperature 1.0] [--no-adapter]

It runs on the dense reference and the embedded checkpoint. Both ways draw the drafts from the draft's distribution q.
Rejection sampling accepts a draft with probability min(1, p / q); a seed's draws accept it if it is the token that the
causal pass draws from its distribution p with the same random numbers (the Gumbel coupling, ``vllm_nld/ops/noise.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoTokenizer

from vllm_nld.checkpoints import checkpoint_path
from vllm_nld.checkpoints.draft_lora import FOLDER
from vllm_nld.checkpoints.held_out import held_out_prompts
from vllm_nld.reference import DraftAdapter, KVCache, ReferenceModel, load_reference
from vllm_nld.reference.generate import ids_tensor

Verify = Callable[[Tensor, Tensor, Tensor, Tensor], list[int]]
"""Takes p, float64 ``[drafts + 1, vocab]``, q ``[drafts, vocab]``, exponential noise of p's shape, and drafts; returns
the accepted ones and the token after them."""


def by_rejection(p: Tensor, q: Tensor, noise: Tensor, drafts: Tensor) -> list[int]:
    """Accept with the overlap of the distributions (Leviathan et al. 2023)."""
    for place, draft in enumerate(drafts.tolist()):
        if torch.rand(()) * q[place, draft] > p[place, draft]:
            rest = (p[place] - q[place]).clamp_min(0)
            return [*drafts[:place].tolist(), int(torch.multinomial(rest, 1))]
    return [*drafts.tolist(), int(torch.multinomial(p[-1], 1))]


def by_own_draws(p: Tensor, q: Tensor, noise: Tensor, drafts: Tensor) -> list[int]:
    """Accept the tokens that the causal pass itself draws."""
    drawn = (p / noise).argmax(-1).tolist()
    for place, draft in enumerate(drafts.tolist()):
        if draft != drawn[place]:
            return drawn[: place + 1]
    return drawn


def acceptance_length(
    model: ReferenceModel, prompts: list[list[int]], tokens: int, temperature: float, verify: Verify
) -> float:
    """Return the tokens per cycle, over ``tokens`` tokens after each prompt."""
    cycles = emitted = 0
    for prompt in prompts:
        cache = KVCache()
        first = (model.causal(ids_tensor(model, prompt), cache)[0, -1] / temperature).softmax(-1)
        text = [int(torch.multinomial(first, 1))]
        while len(text) < tokens:
            prefix = cache.length
            masks = [model.config.mask_token_id] * (model.config.block_size - 1)
            logits = model.draft(ids_tensor(model, [text[-1], *masks]), cache)[0, 1:]
            q = (logits.double() / temperature).softmax(-1)
            noise = torch.empty(len(q) + 1, q.shape[1], dtype=torch.float64).exponential_()
            drafts = (q / noise[:-1]).argmax(-1)
            logits = model.causal(ids_tensor(model, [text[-1], *drafts.tolist()]), cache)[0]
            new = verify((logits.double() / temperature).softmax(-1), q, noise, drafts)
            cache.crop(prefix + len(new))
            text += new
            cycles += 1
            emitted += len(new)
    return emitted / cycles


@torch.no_grad()
def main() -> None:
    """Print both acceptance lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--no-adapter", action="store_true")
    args = parser.parse_args()
    folder = checkpoint_path("tiny")
    model = load_reference(folder)
    if not args.no_adapter:
        model.draft_adapter = DraftAdapter.read(folder / FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for _, text in held_out_prompts(args.prompts, characters=200)]
    for name, verify in (("rejection sampling", by_rejection), ("the seed's own draws", by_own_draws)):
        torch.manual_seed(0)
        length = acceptance_length(model, prompts, args.max_tokens, args.temperature, verify)
        print(f"{name}: acceptance length {length:.3f}", flush=True)


if __name__ == "__main__":
    main()
