"""The networks on vLLM's layers, and the checks before they load."""


def __getattr__(name: str) -> object:
    """Resolve ``vllm_nld.model:NLDForCausalLM`` and its like, the paths that vLLM's registry holds, on demand."""
    if name == "NLDForCausalLM":
        from vllm_nld.model.network import NLDForCausalLM

        return NLDForCausalLM
    if name == "NLDForConditionalGeneration":
        from vllm_nld.model.vision_language import NLDForConditionalGeneration

        return NLDForConditionalGeneration
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
