"""Whether this process runs vLLM's second model runner in Triton's interpreter. Imports nothing of vLLM.

vLLM wants a Triton with a CPU backend there; a placeholder is enough, because nothing is compiled.
"""

from __future__ import annotations

import os
import types

ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
INTERPRETING = all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())


def pretend_triton_runs() -> None:
    """Give Triton a CPU backend; before vLLM is imported."""
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=staticmethod(lambda: True))
    backends.setdefault("cpu", types.SimpleNamespace(driver=driver))
