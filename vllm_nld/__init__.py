"""vLLM extension that serves Nemotron-Labs-Diffusion checkpoints.

Importing this package is free: nothing of torch, transformers or vLLM is imported until it is used.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Resolve ``vllm_nld.SelfSpeculation`` on demand, so that importing the package stays free."""
    if name == "SelfSpeculation":
        from vllm_nld.proposer.self_speculation import SelfSpeculation

        return SelfSpeculation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
