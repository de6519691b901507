"""Every name under which this extension is known to vLLM, in files and in options. Imports nothing."""

ARCHITECTURE = "NemotronLabsDiffusionModel"
"""Name under ``architectures`` in a released checkpoint's ``config.json``."""

OWN_ARCHITECTURE = "VllmNLDForCausalLM"
"""Name under which this extension's model is always registered, even if vLLM itself registers ``ARCHITECTURE``."""

MODEL_TYPE = "nemotron_labs_diffusion"
"""Value of ``model_type`` in a released checkpoint's ``config.json``."""

VLM_ARCHITECTURE = "NemotronLabsDiffusionVLMModel"
"""``ARCHITECTURE`` of the model that also reads images."""

OWN_VLM_ARCHITECTURE = "VllmNLDForConditionalGeneration"
"""``OWN_ARCHITECTURE`` of the model that also reads images."""

VLM_MODEL_TYPE = "nemotron_labs_diffusion_vlm"
"""``MODEL_TYPE`` of the model that also reads images."""

MODEL_TYPES = (MODEL_TYPE, VLM_MODEL_TYPE)

NAMESPACE = "nld"
"""Key of our options in ``--additional-config``, and in a request's ``extra_args``."""

PROPOSER_PATHS = ("vllm_nld.SelfSpeculation", "vllm_nld.proposer.SelfSpeculation")
"""What ``--speculative-config`` may give as ``model``."""

SCHEDULER = "vllm_nld.scheduler.NLDScheduler"
"""Path of our scheduler, for vLLM's ``scheduler_cls``."""

ASYNC_SCHEDULER = "vllm_nld.async_scheduler.NLDAsyncScheduler"
"""Path of our scheduler for vLLM's second model runner, scheduling asynchronously."""

SECOND_SCHEDULER = "vllm_nld.async_scheduler.NLDSecondScheduler"
"""The same, scheduling synchronously."""

MODEL_STATE = "vllm_nld.speculator.model_state.NLDModelState"
"""Path of what our model keeps about requests on vLLM's second model runner."""

ENVIRONMENT = {
    "VLLM_NLD_OPS": "the implementation of the operators to use, by name, instead of the best that runs here; "
    "`vllm-nld doctor` lists them",
    "VLLM_NLD_CUDA_LIBRARY": "path of the CUDA operators' library, instead of the one in the package",
    "VLLM_NLD_CACHE": "folder for fetched checkpoints, instead of `$XDG_CACHE_HOME/vllm-nld` or `~/.cache/vllm-nld`",
}
"""Every environment variable that the package reads, and what it does; shown in the documentation."""
