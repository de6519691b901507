"""Training of the draft adapter; needs neither vLLM's engine nor a GPU."""

from vllm_nld.training.settings import Settings
from vllm_nld.training.trainer import Trainer

__all__ = ["Settings", "Trainer"]
