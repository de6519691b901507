"""Images: what they become before the network, and the network that reads them."""


def __getattr__(name: str) -> object:
    """Resolve ``vllm_nld.vision:NLDForConditionalGeneration``, the path that vLLM's registry holds, on demand."""
    if name == "NLDForConditionalGeneration":
        from vllm_nld.vision.network import NLDForConditionalGeneration

        return NLDForConditionalGeneration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
