"""Self-speculation on vLLM's second model runner (V2): on device tensors only, in a CUDA graph as a whole.

The first runner hands a proposer lists of tokens on the host; the second never brings tokens there between two steps.
So nothing here reads a tensor back, and nothing is done per request in Python during a step: what a request asks for
is in tables (:mod:`vllm_nld.speculator.table`), which change when the request arrives.
"""
