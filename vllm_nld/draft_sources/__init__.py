"""Draft sources of self-speculation: where drafts come from. One file a source.

To add one: write its file, and name it in ``SOURCES`` below. Options, admission, the proposer, auto mode, metrics and
the tests read the registry (``docs/developer/add_a_draft_source.md``).
"""

from __future__ import annotations

from vllm_nld.draft_sources.base import DraftSource
from vllm_nld.draft_sources.model_drafts import ModelDrafts
from vllm_nld.draft_sources.prompt_lookup import PromptLookup
from vllm_nld.option import Option

SOURCES: tuple[type[DraftSource], ...] = (ModelDrafts, PromptLookup)
"""All sources. Where several could follow an unsure draft, the first one that has something does."""

OPTIONS: dict[str, Option] = {option.name: option for source in SOURCES for option in source.options}
"""All options of sources, by name."""

__all__ = ["OPTIONS", "SOURCES", "DraftSource", "ModelDrafts", "PromptLookup"]
