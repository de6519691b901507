"""Moved to :mod:`vllm_nld.draft_pass.learned_sampler`; the old name works for one more release."""

import sys

from vllm_nld.draft_pass import learned_sampler

sys.modules[__name__] = learned_sampler
