"""Selection policies of block diffusion: which masked positions a denoising forward commits. One file a policy.

To add one: write its file, and name it in ``POLICIES`` below. Options, admission, the draft pass, the table in
``docs/user/modes.md`` and the tests read the registry. The reference (:mod:`vllm_nld.reference.diffusion`) has its own
version of each policy, and a test fails until the new one is there.
"""

from __future__ import annotations

from vllm_nld.option import Option
from vllm_nld.policies.base import Policy, Rows
from vllm_nld.policies.confidence_threshold import ConfidenceThreshold
from vllm_nld.policies.entropy_budget import EntropyBudget
from vllm_nld.policies.learned import Learned
from vllm_nld.policies.left_to_right import LeftToRight
from vllm_nld.policies.top_k import TopK

POLICIES: dict[str, Policy] = {
    policy.name: policy for policy in (ConfidenceThreshold(), TopK(), LeftToRight(), EntropyBudget(), Learned())
}
"""Policies by their name in ``nld.sampler``; the first is the default."""

OPTIONS: dict[str, Option] = {option.name: option for policy in POLICIES.values() for option in policy.options}
"""All options of policies by name. Policies may share an option."""

__all__ = ["OPTIONS", "POLICIES", "Option", "Policy", "Rows", "policies_with"]


def policies_with(option: str) -> tuple[str, ...]:
    """Return the names of the policies that read an option; empty if none does."""
    return tuple(name for name, policy in POLICIES.items() if any(own.name == option for own in policy.options))
