"""The blocks of requests, before any forward: how long, what is in them already, how their tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_nld.draft_pass.block import Block, CommitRule
from vllm_nld.draft_pass.token_choice import DraftChoice, SeededDraftChoice, TokenChoice
from vllm_nld.proposer.request_state import RequestState


@dataclass
class Sizes:
    """What the blocks of an engine have in common.

    Attributes:
        longest: tokens of the longest block, seed included.
        vocab_size: tokens that a draw is among.
        mask_token_id: stands for an undecided position.
        max_model_len: positions of a text; vLLM may lower it at start-up.
    """

    longest: int
    vocab_size: int
    mask_token_id: int
    max_model_len: int

    @classmethod
    def of(cls, vllm_config: Any) -> Sizes:
        """Read them from vLLM's config."""
        model = vllm_config.model_config
        longest = 1 + vllm_config.speculative_config.num_speculative_tokens
        return cls(longest, model.get_vocab_size(), model.hf_config.mask_token_id, model.max_model_len)


def draft_block(state: RequestState, sizes: Sizes, seed: int, prefix: int, length: int) -> Block:
    """Return a block of self-speculation to fill: ``length`` tokens, seed included, after ``prefix`` cached ones."""
    block = Block(prefix, [seed] + [sizes.mask_token_id] * (length - 1), CommitRule.for_drafts(state.options))
    block.adapted, block.task = state.options.draft_adapter, state.task
    if _samples_drafts(state):
        block.choice = _choice(state, prefix, sizes.vocab_size, SeededDraftChoice if state.is_seeded else DraftChoice)
    return block


def _samples_drafts(state: RequestState) -> bool:
    """Whether drafts are drawn, and not the most probable tokens.

    A seeded request's may be anything (:class:`SeededDraftChoice`). Others' must be verified by the distribution that
    they were drawn from, and whether one is verified must not depend on what it is. So they are not drawn over several
    forwards, whose distributions depend on drafts that come later in the text. Nor under a grammar: the scheduler drops
    drafts that it forbids.
    """
    plain = state.options.draft_threshold == 0 and state.params.structured_outputs is None
    return (plain or state.is_seeded) and state.options.sampled_drafts and state.params.temperature > 0


def diffusion_block(state: RequestState, sizes: Sizes, seed: int, prefix: int) -> Block | None:
    """Return a block of diffusion to fill, or None if there is nothing to decide.

    Args:
        state: the request's.
        sizes: the engine's.
        seed: the causal pass's token, which opens the block unless the request wants its blocks unseeded.
        prefix: tokens in the cache.
    """
    mask, room = sizes.mask_token_id, sizes.max_model_len - prefix - 1
    options = state.options
    # The seed is generated already, and the token that the commit yields may be dropped.
    length = min(options.block_length or sizes.longest, state.remaining(sizes.longest) + 1, room)
    if length < (2 if options.seed_first else 1):
        return None
    tokens = [seed if options.seed_first else mask] + [mask] * (length - 1)
    _force_end_of_thinking(state, tokens)
    choice = _choice(state, prefix, sizes.vocab_size)
    return Block(prefix, tokens, CommitRule.for_diffusion(options), choice, state.stop_ids, task=state.task)


def _force_end_of_thinking(state: RequestState, tokens: list[int]) -> None:
    """Write the end of thinking where the budget ends; the causal pass commits it like any other token."""
    if state.thinking is None:
        return
    seeded = state.options.seed_first
    output = state.cached.output_token_ids if seeded else state.cached.output_token_ids[:-1]
    left = state.thinking.left(state.cached.prompt_token_ids or [], output)
    if left is None:
        return
    start = left + int(seeded)
    for position, token in enumerate(state.thinking.end_tokens, start):
        if position < len(tokens):
            tokens[position] = token


def _choice(
    state: RequestState, prefix: int, vocab_size: int, kind: type[TokenChoice] = TokenChoice
) -> TokenChoice | None:
    """Return how tokens are chosen, or None where it is simply the most probable one."""
    params, generated = state.params, len(state.cached.output_token_ids)
    temperature = params.temperature
    if state.is_diffusion and state.options.temperature is not None:
        temperature = state.options.temperature
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    seeded = int(state.options.seed_first or not state.is_diffusion)
    too_early = params.min_tokens - generated + seeded
    plain = penalties == (0.0, 0.0, 1.0) and params.allowed_token_ids is None and too_early <= 0
    if temperature == 0 and plain:
        return None
    history = state.cached.output_token_ids[: generated - 1 + seeded]
    return kind(
        vocab_size=vocab_size,
        noise=state.noise,
        prefix=prefix,
        temperature=temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        allowed=params.allowed_token_ids,
        barred=state.thinking.barred if state.thinking is not None and kind is DraftChoice else None,
        forbidden_until=(sorted(params.all_stop_token_ids), too_early),
        history=(list(state.cached.prompt_token_ids or []), list(history)),
        penalties=None if penalties == (0.0, 0.0, 1.0) else penalties,
    )
