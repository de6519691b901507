"""Whether this process runs vLLM's second model runner in Triton's interpreter. Imports nothing of vLLM.

vLLM wants a Triton with a CPU backend there; a placeholder is enough, because nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types

ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
INTERPRETING = all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())


def pretend_triton_runs() -> None:
    """Give Triton a CPU backend; before vLLM is imported."""
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=staticmethod(lambda: True))
    backends.setdefault("cpu", types.SimpleNamespace(driver=driver))


def hasten_interpreter() -> None:
    """Leave out two thirds of the interpreter's time, which it spends on what it has done already or never reads.

    It replaces Triton's whole language at every launch and at every call of a function within a kernel; looks up a type
    in a table that it builds anew; and repeats integer operations in int64 for an assertion that only debug mode makes.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    sees_all = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(sees_all)
    once = types.SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda _: once
    looked_up = functools.cache(interpreter._get_np_dtype)
    type_of = interpreter._get_np_dtype  # of pointers, which have no hash
    interpreter._get_np_dtype = lambda t: (looked_up if type(t.scalar) is tl.dtype else type_of)(t.scalar)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
