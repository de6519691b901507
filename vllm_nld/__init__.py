"""vLLM extension that serves Nemotron-Labs-Diffusion checkpoints.

Importing this package is free: nothing of torch, transformers or vLLM is imported until it is used.
"""

__version__ = "0.1.0"

ARCHITECTURE = "NemotronLabsDiffusionModel"
"""Name under ``architectures`` in a released checkpoint's ``config.json``."""

MODEL_TYPE = "nemotron_labs_diffusion"
"""Value of ``model_type`` in a released checkpoint's ``config.json``."""
