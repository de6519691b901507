"""When vLLM's samplers only take an argmax, and the form of their output."""

from __future__ import annotations

from typing import Any


def decides_by_argmax(rejection_sampler: Any, sampling_metadata: Any) -> bool:
    """Whether vLLM's rejection sampler would only take the argmax of each row of unchanged logits.

    Everything that could change a logit must be known and off. A field that this vLLM lacks counts as on.
    """
    on: Any = object()
    plain = {"all_greedy": True, "no_penalties": True, "max_num_logprobs": None, "allowed_token_ids_mask": None}
    if any(getattr(sampling_metadata, name, on) is not value for name, value in plain.items()):
        return False
    if any(getattr(sampling_metadata, name, on) for name in ("bad_words_token_ids", "logprob_token_ids")):
        return False
    if getattr(rejection_sampler, "synthetic_mode", on):
        return False
    thinking = getattr(sampling_metadata, "thinking_budget_state_holder", on)
    if thinking is on or (thinking is not None and thinking.has_tracked_requests()):
        return False
    # The others (min_p) never change an argmax, and greedy rows do not run them.
    processors = getattr(getattr(sampling_metadata, "logitsprocs", on), "non_argmax_invariant", [on])
    return all(map(_is_idle, processors))


def always_decides_by_argmax(params: Any) -> bool:
    """Whether a request with these ``SamplingParams`` never makes a step fail :func:`decides_by_argmax`.

    The request may not be in the runner's batch yet, so this check is more cautious.
    """
    off = {"temperature": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_tokens": 0}
    if any(getattr(params, name) != value for name, value in off.items()):
        return False
    others = ("logprobs", "logprob_token_ids", "allowed_token_ids", "thinking_token_budget")
    return not (params.bad_words or params.logit_bias) and all(getattr(params, name, None) is None for name in others)


def _is_idle(processor: Any) -> bool:
    """Whether a logits processor changes no request's logits. One that is not from vLLM may always change them."""
    from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor

    requests = {MinTokensLogitsProcessor: "min_toks", LogitBiasLogitsProcessor: "biases"}.get(type(processor))
    return requests is not None and not getattr(processor, requests, True)


def sampler_output(token_ids: Any) -> Any:
    """Return vLLM's ``SamplerOutput`` of tokens, int32 ``[requests, most tokens]``, without log-probabilities."""
    from vllm.v1.outputs import SamplerOutput

    return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=None)
