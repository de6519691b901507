"""Dense, unpaged NLD in PyTorch: the tests compare against it, and it shows the algorithm on one page."""

from vllm_nld.reference.adapter import DraftAdapter
from vllm_nld.reference.branches import branch_spec_generate, quadratic_spec_generate
from vllm_nld.reference.checkpoint import load_reference
from vllm_nld.reference.diffusion import generate
from vllm_nld.reference.generate import Generation, ar_generate, linear_spec_generate
from vllm_nld.reference.model import KVCache, ReferenceModel, RoomyKVCache
from vllm_nld.reference.vision_language import ReferenceVLM

__all__ = [
    "DraftAdapter",
    "Generation",
    "KVCache",
    "ReferenceModel",
    "ReferenceVLM",
    "RoomyKVCache",
    "ar_generate",
    "branch_spec_generate",
    "generate",
    "linear_spec_generate",
    "load_reference",
    "quadratic_spec_generate",
]
