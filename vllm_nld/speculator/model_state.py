"""How the speculator learns of model, cache, samplers and requests: by vLLM's own hook, the model's state."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_nld.speculator.speculator import Speculator
from vllm_nld.speculator.verify import NLDRejectionSampler, NLDSampler, verify
from vllm_nld.vllm_glue import second_runner


def make_speculator(vllm_config: Any, device: Any) -> Speculator:
    """Return an engine's speculator; vLLM makes it before the model."""
    speculator = Speculator(vllm_config, device)
    # Not with the whole config, of which vLLM makes a copy for the text model of one that reads images.
    vllm_config.speculative_config.nld_speculator = speculator
    return speculator


def install() -> None:
    """Have vLLM's second runner draft and verify by this extension; idempotent."""
    second_runner.install_speculator(make_speculator)
    second_runner.install_verification(verify)


class NLDModelState(DefaultModelState):  # type: ignore[misc]
    """vLLM's state of a dense model, which tells the speculator what it needs to know."""

    def __init__(self, vllm_config: Any, model: Any, *others: Any) -> None:
        super().__init__(vllm_config, model, *others)
        self._speculator: Speculator | None = getattr(vllm_config.speculative_config, "nld_speculator", None)
        if self._speculator is not None:
            self._speculator.load_model(model)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Take in a request."""
        super().add_request(req_index, new_req_data)
        if self._speculator is not None:
            self._speculator.add_request(req_index, new_req_data)

    def apply_staged_writes(self) -> None:
        """Bring what new requests ask for to the device, before the step that they are in."""
        super().apply_staged_writes()
        if self._speculator is not None:
            self._speculator.take_in_requests()

    def prepare_attn(self, input_batch: Any, mode: Any, block_tables: Any, *others: Any, **named: Any) -> Any:
        """Return the layers' attention metadata of a step, and lay out the step's branches."""
        causal = super().prepare_attn(input_batch, mode, block_tables, *others, **named)
        branching = None if self._speculator is None else self._speculator.branching
        if branching is None or not branching.has_pages:
            return causal
        if named.get("for_capture"):
            return branching.capture(causal, input_batch.num_reqs, input_batch.num_tokens_after_padding)
        return branching.lay_out(input_batch, block_tables[0], causal, mode)

    def custom_sampler(self, sampler: Any) -> Any:
        """Return this extension's sampler and rejection sampler, in place of vLLM's."""
        if self._speculator is None:
            return None
        sampler = NLDSampler(sampler, self._speculator)
        verifier = NLDRejectionSampler(sampler, self.vllm_config.speculative_config, self.device, self._speculator)
        return sampler, verifier
