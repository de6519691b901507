"""The network on vLLM's layers, and the checks before it loads."""


def __getattr__(name: str) -> object:
    """Resolve ``vllm_nld.model:NLDForCausalLM``, the path that vLLM's registry holds, on demand."""
    if name == "NLDForCausalLM":
        from vllm_nld.model.network import NLDForCausalLM

        return NLDForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
