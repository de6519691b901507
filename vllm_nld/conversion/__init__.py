"""Making an NLD checkpoint of an AR model of the Llama family: the same weights under NLD's names, and a mask token."""

from vllm_nld.conversion.checkpoint import Options, convert
from vllm_nld.conversion.opening import open_source
from vllm_nld.conversion.source import Source

__all__ = ["Options", "Source", "convert", "open_source"]
