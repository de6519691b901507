"""What vLLM calls after every step: drafts for the next one, and diffusion blocks."""


def __getattr__(name: str) -> object:
    """Resolve ``vllm_nld.proposer.SelfSpeculation``, which users type, on demand."""
    if name == "SelfSpeculation":
        from vllm_nld.proposer.self_speculation import SelfSpeculation

        return SelfSpeculation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
