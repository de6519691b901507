"""vLLM extension that serves Nemotron-Labs-Diffusion checkpoints.

Importing this package is cheap: torch, transformers and vLLM are imported only when they are used.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Resolve ``vllm_nld.SelfSpeculation`` on demand, so that importing the package stays cheap."""
    if name == "SelfSpeculation":
        from vllm_nld.proposer.self_speculation import SelfSpeculation

        return SelfSpeculation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
