"""Moved to :mod:`vllm_nld.serving.replica`; the old name works for one more release."""

import sys

from vllm_nld.serving import replica

sys.modules[__name__] = replica
